"""The chat: what it sends, streams and reports, against a real server."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import httpx
import pytest
from rich.console import Console

from experiments.chat import Answer, Chat, talk, turn
from experiments.harness.server import running_server
from experiments.workloads.demo_model import TINY, write_demo_model


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("chat") / "demo"
    write_demo_model(folder, config=TINY)
    with running_server(folder, "--kv-pool-bytes", "16MiB", "--max-model-len", "600") as server:
        yield server.url


def test_a_conversation_goes_on_from_its_cache_and_can_start_over(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(
        ["Tell me about the sea, and take your time over it.", "", "And about the sky?", "/new", "Hi.", "/quit"]
    )
    shown = io.StringIO()
    console = Console(file=shown, width=200)
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))
    chat = Chat(max_tokens=24, temperature=0.0)
    talk(url, chat, console)
    figures = re.findall(
        r"(\d+) of (\d+) prompt tokens from the cache .* first token after \d+ ms, (\d+)", shown.getvalue()
    )
    assert len(figures) == 3
    (_, first, wrote), (cached, second, _), (_, third, _) = (tuple(map(int, each)) for each in figures)
    assert int(wrote) > 0
    assert cached >= first  # the first prompt, and most of its answer
    assert second > first > third
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    words = re.findall(r"[A-Za-z]{3,}", chat.messages[1]["content"])
    assert words
    assert all(word in shown.getvalue() for word in words)


def test_a_question_that_fails_is_taken_back(url: str) -> None:
    shown = io.StringIO()
    chat = Chat(max_tokens=8, temperature=0.0)
    with httpx.Client(timeout=60) as client:
        turn(client, url, chat, "word " * 2000, Console(file=shown, width=200))
        assert "400" in shown.getvalue()
        assert not chat.messages
        turn(client, url, chat, "word", Console(file=shown, width=200))
    assert len(chat.messages) == 2


def test_reasoning_is_shown_and_is_no_part_of_the_answer_that_is_sent_back() -> None:
    answer = Answer()
    for kind, said in (("thinking", "Hm. "), ("signature", ""), ("text", "Yes.")):
        answer.take(1.0, {"type": "content_block_delta", "delta": {"type": f"{kind}_delta", kind: said}})
    assert (answer.text, answer.shown) == ("Yes.", "Hm. Yes.")


def test_figures_are_those_of_the_stream() -> None:
    answer = Answer()
    usage = {"input_tokens": 1, "cache_creation_input_tokens": 19, "cache_read_input_tokens": 80}
    answer.take(5.0, {"type": "message_start", "message": {"usage": usage}})
    answer.take(100.0, {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "a"}})
    answer.take(1100.0, {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "b"}})
    answer.take(1100.0, {"type": "message_delta", "usage": {"output_tokens": 11}})
    assert answer.text == "ab"
    assert answer.figures() == (
        "80 of 100 prompt tokens from the cache (80%), first token after 100 ms, 11 tokens at 10.0 a second"
    )
    with pytest.raises(RuntimeError, match="no room"):
        answer.take(1200.0, {"type": "error", "error": {"message": "no room"}})
