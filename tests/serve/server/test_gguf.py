"""A server on a GGUF file: the answers of the checkpoint that it was made from, in a context that a flag stretches."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import httpx
import jax.numpy as jnp
import pytest

from experiments.harness.server import running_server
from experiments.workloads.gguf_file import write_gguf
from model import checkpoint
from serve.server import loading
from serve.server.cli import check_folder
from serve.server.config import parse_config
from serve.server.progress import StartProgress
from tests.helpers.http import FLAGS, ask, post

SCALING = '{"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 3000}'


@pytest.fixture(scope="module")
def file(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(model_folder, path)
    return path


def test_it_answers_as_the_checkpoint_does(client: httpx.Client, file: Path) -> None:
    body = ask("Say something, naïve 日本 12345.", 24)
    expected = post(client, body)
    with running_server(file, *FLAGS) as server, httpx.Client(base_url=server.url, timeout=60) as other:
        found = post(other, body)
        assert other.get("/v1/models").json()["data"][0]["id"] == "tiny.gguf"
    assert found["content"] == expected["content"]
    assert found["usage"]["output_tokens"] == expected["usage"]["output_tokens"]


def test_the_flag_stretches_the_context_and_names_other_pages(file: Path) -> None:
    plain, scaled = (
        loading.load_model(parse_config(["--model", str(file), *flags]), file, StartProgress())
        for flags in ((), ("--rope-scaling", SCALING))
    )
    assert scaled.config.max_position == 6000
    assert scaled.config.rope.kind == "yarn"
    assert dataclasses.replace(scaled.config, rope=plain.config.rope, max_position=16_384) == plain.config
    assert scaled.fingerprint != plain.fingerprint
    config, params = checkpoint.load(file, jnp.float32)
    assert checkpoint.fingerprint(config, params) == plain.fingerprint


def test_a_file_is_refused_before_anything_is_loaded(file: Path, tmp_path: Path) -> None:
    check_folder(str(file))
    (tmp_path / "torn.gguf").write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"torn\.gguf ends within .*download it again"):
        check_folder(str(tmp_path / "torn.gguf"))
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf is not a file"):
        check_folder(str(tmp_path / "absent.gguf"))


def test_a_scaling_that_is_none_is_refused_with_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--model", "m", "--rope-scaling", '{"rope_type": "ntk"}'])
    assert "--rope-scaling: rope_scaling has rope type 'ntk', supported are" in capsys.readouterr().err
