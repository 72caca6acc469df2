"""How JAX is set up: the flags of a process that serves."""

from __future__ import annotations

from serve.engine.runtime import with_gpu_flag


def test_a_gpu_multiplies_with_cublas_unless_the_user_says_otherwise() -> None:
    assert with_gpu_flag("") == "--xla_gpu_enable_triton_gemm=false"
    assert with_gpu_flag("--xla_dump_to=x") == "--xla_dump_to=x --xla_gpu_enable_triton_gemm=false"
    assert with_gpu_flag("--xla_gpu_enable_triton_gemm=true") == "--xla_gpu_enable_triton_gemm=true"
