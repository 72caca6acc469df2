"""Baselines of `experiments.gpu_bench`: the attention of torch and the one that comes with JAX.

Both read contiguous keys and values; ours reads pages by table. If one is missing or refuses, the result says why.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

Json = dict[str, Any]


def torch_attention(queries: int, keys: int, batch: int, heads: int, kv_heads: int, head_dim: int) -> Json:
    """Seconds of torch's scaled_dot_product_attention, causal at the bottom right, by backend, and the best of them.

    cuDNN has no such mask where there are fewer queries than keys, and torch would write one out for it, which is not
    its speed: there only flash is timed.
    """
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.attention.bias import causal_lower_right
        from torch.nn.functional import scaled_dot_product_attention
    except ImportError as error:
        return {"missing": str(error)}
    if not torch.cuda.is_available():
        return {"missing": "torch has no CUDA device"}

    def random(count: int, length: int) -> Any:
        return torch.randn(batch, count, length, head_dim, device="cuda", dtype=torch.bfloat16)

    # One query sees everything; as many as keys are the plain causal case, which every backend takes.
    plain = queries in (1, keys)
    causal: Json = {"is_causal": queries > 1} if plain else {"attn_mask": causal_lower_right(queries, keys)}
    options: Json = causal | {"enable_gqa": True}
    backends = {"flash": SDPBackend.FLASH_ATTENTION} | ({"cudnn": SDPBackend.CUDNN_ATTENTION} if plain else {})
    found: Json = {}
    arrays: Any = None
    call: Any = None
    for name, backend in backends.items():
        try:
            with sdpa_kernel(backend), torch.inference_mode():
                arrays = random(heads, queries), random(kv_heads, keys), random(kv_heads, keys)
                call = partial(scaled_dot_product_attention, *arrays, **options)
                found[name] = torch_seconds(torch, call)
        except Exception as error:  # a baseline that refuses must not end the run
            found[f"{name}_refused"] = first_line(error)
        arrays = call = None
    torch.cuda.empty_cache()
    times = [value for value in found.values() if isinstance(value, float)]
    return found | ({"best": min(times)} if times else {})


def torch_seconds(torch: Any, call: Any, budget: float = 0.5) -> float:
    """Seconds of a call on torch's stream: the mean of as many as fit the budget, after one to warm up."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    repeats = max(3, min(100, int(budget / (time.perf_counter() - start))))
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def jax_attention(tokens: int, heads: int, kv_heads: int, head_dim: int, seconds: Any) -> Json:
    """Seconds of jax's own `attention_mgpu` on a cold causal prompt, timed by `seconds(function, *arguments)`."""
    try:
        from jax.experimental.pallas.ops.gpu import attention_mgpu

        keys = jax.random.split(jax.random.key(0), 3)
        # Its buffers are always float16, which costs the same as bf16.
        q, k, v = (
            jax.random.normal(key, (1, tokens, count, head_dim), jnp.float16)
            for key, count in zip(keys, (heads, kv_heads, kv_heads), strict=True)
        )
        config = attention_mgpu.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=True)
        return {"seconds": seconds(jax.jit(lambda *arrays: attention_mgpu.attention(*arrays, config)), q, k, v)}
    except Exception as error:  # a baseline that refuses must not end the run
        return {"refused": first_line(error)}


def first_line(error: Exception) -> str:
    """What went wrong, in a line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
