"""Writes compressed_tensors.safetensors, by the `compressed-tensors` package itself, which the tests do without.

    python -m tests.model.formats.write_compressed_tensors

Each case is a module: what the package stores for it, `<case>.expected`, what the package makes of that again, and in
the file's metadata its entry of `config_groups`. Written with compressed-tensors 0.20.1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

FILE = Path(__file__).with_name("compressed_tensors.safetensors")
OUTPUTS, INPUTS = 24, 40
PACKED, INT, NAIVE, FLOAT = "pack-quantized", "int-quantized", "naive-quantized", "float-quantized"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4_groups": (PACKED, {"num_bits": 4, "strategy": "group", "group_size": 8}),
    "int4_groups_with_zeros": (PACKED, {"num_bits": 4, "strategy": "group", "group_size": 8, "symmetric": False}),
    "int4_outputs": (PACKED, {"num_bits": 4, "strategy": "channel"}),
    "int4_outputs_with_zeros": (PACKED, {"num_bits": 4, "strategy": "channel", "symmetric": False}),
    "int8_groups_with_zeros": (PACKED, {"num_bits": 8, "strategy": "group", "group_size": 8, "symmetric": False}),
    "int8_outputs": (INT, {"num_bits": 8, "strategy": "channel"}),
    "int8_outputs_with_zeros": (NAIVE, {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "int8_matrix": (NAIVE, {"num_bits": 8, "strategy": "tensor"}),
    "fp8_outputs": (FLOAT, {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8_matrix": (FLOAT, {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8_blocks": (NAIVE, {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 16]}),
}


def in_blocks(weight: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """The weights that share a scale, along the last axis, [blocks of outputs, blocks of inputs, weights]."""
    rows, columns = {
        "group": (1, settings.get("group_size")),
        "channel": (1, INPUTS),
        "tensor": (OUTPUTS, INPUTS),
        "block": settings.get("block_structure", (0, 0)),
    }[settings["strategy"]]
    padded = torch.nn.functional.pad(weight, (0, -INPUTS % columns, 0, -OUTPUTS % rows))
    tiles = padded.reshape(padded.shape[0] // rows, rows, -1, columns)
    return tiles.transpose(1, 2).flatten(2)


def main() -> None:
    """Write the file."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    tensors: dict[str, torch.Tensor] = {}
    groups: dict[str, Any] = {}
    torch.manual_seed(0)
    for case, (layout, settings) in CASES.items():
        weight = torch.randn(OUTPUTS, INPUTS)
        scheme = QuantizationScheme(targets=[case], weights=QuantizationArgs(**settings), format=layout)
        blocks = in_blocks(weight, settings)
        scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights)
        if settings["strategy"] == "tensor":
            scale, zero = scale.reshape(1), zero.reshape(1)
        compressor = BaseCompressor.get_value_from_registry(layout)
        stored = compressor.compress({"weight": weight, "weight_scale": scale, "weight_zero_point": zero}, scheme)
        tensors |= {f"{case}.{name}": tensor for name, tensor in stored.items()}
        tensors[f"{case}.expected"] = compressor.decompress(stored, scheme)["weight"].contiguous()
        groups[case] = json.loads(scheme.model_dump_json())
    save_file(tensors, FILE, metadata={"config_groups": json.dumps(groups)})


if __name__ == "__main__":
    main()
