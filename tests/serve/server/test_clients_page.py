"""The Python blocks of serve/CLIENTS.md, run as they are printed there, but for the port."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

import serve
from experiments.harness.server import Server

PAGE = (Path(serve.__file__).parent / "CLIENTS.md").read_text(encoding="utf-8")
BLOCKS = {block.split()[1]: block for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)}
ADDRESS = "http://127.0.0.1:8000"


def run(package: str, server: Server) -> dict[str, Any]:
    """Run the block that imports the package first; return the names that it has bound."""
    assert ADDRESS in BLOCKS[package]
    names: dict[str, Any] = {}
    exec(compile(BLOCKS[package].replace(ADDRESS, server.url), f"CLIENTS.md, {package}", "exec"), names)
    return names


def test_the_page_has_a_python_block_for_each_sdk() -> None:
    assert BLOCKS.keys() == {"anthropic", "openai"}


def test_the_anthropic_block_reads_its_first_turn_from_the_cache(
    server: Server, client: httpx.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run("anthropic", server)
    first, second = names["first"].usage, names["second"].usage
    assert first.output_tokens > 0
    assert second.cache_read_input_tokens >= first.cache_creation_input_tokens + first.cache_read_input_tokens
    assert f"{second.cache_read_input_tokens} tokens read" in capsys.readouterr().out


def test_the_openai_block_asks_both_apis(
    server: Server, client: httpx.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run("openai", server)
    assert names["chat"].usage.completion_tokens > 0
    assert names["response"].status in ("completed", "incomplete")
    # The prompts are the same, so the second reads all that it may of the first.
    assert names["response"].usage.input_tokens_details.cached_tokens == names["chat"].usage.prompt_tokens - 1
    assert capsys.readouterr().out.count("\n") >= 2
