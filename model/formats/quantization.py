"""Which reader the `quantization_config` of a config.json asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from model.formats import awq, compressed_tensors, fp8, gptq, mxfp4
from model.formats.grouped import Reader, Settings, choice

# By `quant_method`: https://huggingface.co/docs/transformers/main/en/quantization/overview has them all.
METHODS: dict[str, Callable[[Settings], Reader]] = {
    "awq": awq.reader,
    "compressed-tensors": compressed_tensors.reader,
    "fp8": fp8.reader,
    "gptq": gptq.reader,
    "mxfp4": mxfp4.reader,
}


def reader_for(config: Mapping[str, Any]) -> Reader:
    """What turns the tensors of the files into those of the model, from the parsed config.json.

    Where nothing is quantised, they are the same. Raises ValueError, with what is supported, for any other method, or
    for settings of it that are not supported; no tensor is looked at.
    """
    settings = config.get("quantization_config")
    if not settings:
        return dict
    if not isinstance(settings, Mapping):
        raise ValueError(f"quantization_config is {settings!r:.80}, expected a JSON object")
    return METHODS[choice(settings, "quant_method", tuple(METHODS))](settings)
