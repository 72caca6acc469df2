"""One tiny model and one real server on it for all server tests; each test must leave the server idle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import settings

from experiments.harness.server import Server, running_server
from experiments.workloads.demo_model import write_demo_model
from model import checkpoint
from model.config import ModelConfig
from model.kernels.dispatch import arranged
from model.params import Params
from serve.prompt.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.compiled_once import compiled_once
from tests.helpers.http import FLAGS, MODEL, eventually, is_idle
from tests.helpers.tiny_engine import VOCAB

# The machine may be busy: how long an example takes says nothing.
settings.register_profile("serve", deadline=None)
settings.load_profile("serve")


@pytest.fixture(scope="module", autouse=True)
def _compile_once() -> Iterator[None]:
    """The engines of a module share what is compiled for them."""
    with compiled_once():
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint; do not change it."""
    folder = tmp_path_factory.mktemp("serve") / "tiny-model"
    write_demo_model(folder, config=MODEL)
    return folder


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> Tokenizer:
    """The tiny checkpoint's tokenizer."""
    return load_tokenizer(str(model_folder))


@pytest.fixture(scope="session")
def server_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server of `server` writes its log."""
    return tmp_path_factory.mktemp("serve") / "server.log"


@pytest.fixture(scope="session")
def server(model_folder: Path, server_log: Path) -> Iterator[Server]:
    """A real server process with the flags of `tests.helpers.http.FLAGS`."""
    with running_server(model_folder, *FLAGS, log=server_log) as running:
        yield running


@pytest.fixture
def client(server: Server, server_log: Path) -> Iterator[httpx.Client]:
    """A client of the real server, which must be idle and free of tracebacks after the test."""
    before = server_log.stat().st_size
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
        eventually(lambda: is_idle(client), "nothing runs or waits, and no page is held")
    logged = server_log.read_bytes()[before:].decode()
    assert "Traceback" not in logged, logged[-3000:]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[ModelConfig, Params]]:
    """`tiny_model(vocab)`: a tiny qwen3 written by transformers, (config, params)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(vocab: int) -> tuple[ModelConfig, Params]:
        folder = tmp_path_factory.mktemp("qwen3")
        torch.manual_seed(0)
        sizes = {
            "vocab_size": vocab,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "head_dim": 16,
        }
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
        AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **sizes, **heads)).save_pretrained(folder)
        config, params = checkpoint.load(folder, "float32")
        return config, arranged(params, 16)

    return make


@pytest.fixture(scope="session")
def model(tiny_model: Callable[[int], tuple[ModelConfig, Params]]) -> tuple[ModelConfig, Params]:
    """The model of the engine's tests."""
    return tiny_model(VOCAB)
