"""The demo model as a GGUF file: every weight, every token (tests/clients/test_llama_cpp.py runs it)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from experiments.workloads.demo_model import CONTROLS, MARKS, TINY, write_demo_model
from experiments.workloads.gguf_file import LAYER, write_gguf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("gguf")
    write_demo_model(made, config=TINY)
    return made


@pytest.fixture(scope="module")
def file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "model.gguf"
    write_gguf(folder, path)
    return path


def test_the_file_holds_every_weight_and_every_token(folder: Path, file: Path) -> None:
    from gguf import GGUFReader, TokenType

    reader, tensors = GGUFReader(file), load_file(folder / "model.safetensors")
    read = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(read) == len(tensors) == 2 + TINY.layers * len(LAYER)
    assert np.array_equal(read["token_embd.weight"], tensors["model.embed_tokens.weight"])
    assert np.array_equal(read["blk.1.attn_q_norm.weight"], tensors["model.layers.1.self_attn.q_norm.weight"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    assert tokens == tokenizer.convert_ids_to_tokens(range(len(tokens)))
    kinds = dict(zip(tokens, reader.get_field("tokenizer.ggml.token_type").contents(), strict=True))
    assert {kinds[token] for token in CONTROLS} == {TokenType.CONTROL}
    assert {kinds[token] for token in MARKS} == {TokenType.USER_DEFINED}


def test_another_kind_of_model_is_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(ValueError, match="expected a qwen3 with tied embeddings, got a llama"):
        write_gguf(tmp_path, tmp_path / "model.gguf")
