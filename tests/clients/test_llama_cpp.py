"""llama.cpp's own server: the demo model is the same there, and what it reads of prompts with and without the proxy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from experiments.harness import llama_server
from experiments.harness.server import Server, running_server
from experiments.sweep.__main__ import main as sweep
from experiments.sweep.run_folder import cells, load
from experiments.workloads.demo_model import TINY, write_demo_model
from experiments.workloads.gguf_file import write_gguf
from tests.helpers.http import BILLING, Json, ask, text_block

ABSENT = llama_server.missing()
pytestmark = [pytest.mark.clients, pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))]
FLAGS = ("--kv-pool-bytes", "16MiB", "--max-num-seqs", "1", "--max-model-len", "2048")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model") / "tiny"
    write_demo_model(made, config=TINY)
    return made


@pytest.fixture(scope="module")
def engine(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """llama.cpp's server."""
    file = tmp_path_factory.mktemp("file") / "model.gguf"
    write_gguf(folder, file)
    with running_server(file, program=llama_server.PROGRAM) as server:
        yield server


@pytest.fixture(scope="module")
def proxied(engine: Server, folder: Path) -> Iterator[Server]:
    """The proxy before it."""
    with running_server(folder, "--upstream", engine.url, program=("-m", "serve", "proxy")) as server:
        yield server


def post(server: Server, body: Json) -> Json:
    answer = httpx.post(f"{server.url}/v1/messages", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def tokens(answer: Json) -> int:
    """The prompt's tokens."""
    return sum(value for key, value in answer["usage"].items() if key.endswith("input_tokens"))


def test_its_answers_are_those_of_the_checkpoint(folder: Path, engine: Server) -> None:
    text = "Which words? It's 1234 of them, isn't it: \u00e9 \U0001f600\t\n\n  def f(): return 'x'"
    # Its templates think by default, ours where the request does.
    request = ask(text, system="You help.") | {"thinking": {"type": "adaptive"}}
    with running_server(folder, *FLAGS) as ours:
        theirs, own = post(engine, request), post(ours, request)
    assert (tokens(theirs), theirs["content"]) == (tokens(own), own["content"])


@pytest.mark.parametrize("varies", ["cc_version", "cch"])
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/chat/completions"])
def test_through_the_proxy_a_fresh_header_costs_it_nothing(
    path: str, varies: str, engine: Server, proxied: Server
) -> None:
    def cached(server: Server, number: int, text: str) -> float:
        """The share of a prompt with a header of its own that was cached."""
        line = BILLING.format(number) if varies == "cch" else BILLING.format(0).replace("471", f"{number:03x}")
        said = [{"role": "user", "content": text * 40}]
        if path == "/v1/messages":
            system: Json = {"system": [text_block(line), text_block("You help.")]}
        else:
            said, system = [{"role": "system", "content": f"{line}\nYou help."}, *said], {}
        body = {"model": "any", "max_tokens": 1, "messages": said} | system
        answer = httpx.post(f"{server.url}{path}", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]
        if path == "/v1/messages":
            return usage["cache_read_input_tokens"] / tokens(answer.json())
        return usage["prompt_tokens_details"]["cached_tokens"] / usage["prompt_tokens"]

    direct = [cached(engine, number, f"Read it all, {path} {varies}. ") for number in (1, 0xFFF)]
    stripped = [cached(proxied, number, f"Read all of it, {path} {varies}. ") for number in (1, 0xFFF)]
    if (path, varies) != ("/v1/messages", "cch"):  # there it has a remedy of its own
        assert direct[1] < 0.2
    assert stripped[0] < 0.2
    assert stripped[1] > 0.99


def test_a_sweep_starts_it_and_reads_its_own_counts(folder: Path, tmp_path: Path) -> None:
    config, out = tmp_path / "sweep.toml", tmp_path / "out"
    axes = f'[axes]\nmodel = ["{folder}"]\nprompt_tokens = [1024]\nposition = ["0%", "50%", "100%"]\n'
    config.write_text(f'warmups = 0\nrepeats = 1\n[target]\nkind = "llama.cpp"\n{axes}')
    assert sweep([str(config), "--out", str(out)]) == 0
    first, half, last = cells(load(out))
    assert first.cached_tokens < 16
    assert 0.35 < half.cached_tokens / half.prompt_tokens < 0.6
    assert last.cached_tokens > 0.8 * last.prompt_tokens
