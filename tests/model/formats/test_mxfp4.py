"""gpt-oss' experts in 4-bit floats, as transformers dequantises them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from model.formats import mxfp4
from tests.model.formats.writing import mapped


def random_blocks(experts: int, outputs: int, groups: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (experts, outputs, groups, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(90, 140, (experts, outputs, groups), dtype=torch.uint8, generator=generator)
    return {"experts.down_proj_blocks": blocks, "experts.down_proj_scales": scales}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_what_transformers_makes_of_them(tmp_path, dtype):
    stored = random_blocks(3, 20, 2)
    tensors = mxfp4.read(mapped(tmp_path, stored | {"experts.down_proj_bias": torch.ones(3, 20)}))
    expected = convert_moe_packed_tensors(*stored.values(), dtype=dtype).float()
    made = tensors["experts.down_proj"]
    assert made.shape == tuple(expected.shape) == (3, 64, 20)
    np.testing.assert_array_equal(made.values(), expected)
    np.testing.assert_array_equal(made.values(1, 2), expected[1:2])
    assert tensors.keys() == {"experts.down_proj", "experts.down_proj_bias"}
    assert made.nbytes == 3 * 20 * 2 * 17


def test_what_lacks_its_scales_is_named(tmp_path):
    tensors = mapped(tmp_path, {"experts.down_proj_blocks": random_blocks(1, 2, 2)["experts.down_proj_blocks"]})
    with pytest.raises(ValueError, match=r"down_proj_blocks is U8, but experts\.down_proj_scales is missing"):
        mxfp4.read(tensors)


def test_groups_of_another_size_are_named(tmp_path):
    stored = random_blocks(1, 2, 2)
    stored["experts.down_proj_blocks"] = stored["experts.down_proj_blocks"][..., :8].contiguous()
    with pytest.raises(ValueError, match=r"blocks has shape \(1, 2, 2, 8\), expected \(1, 2, 2, 16\)"):
        mxfp4.read(mapped(tmp_path, stored))
