"""Which heads keys share with `--share-prefix tools-system`, and never a token past them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from experiments.harness.client import scrape
from experiments.harness.server import Server, running_server
from serve.api.messages import InvalidRequest, decode_count_tokens
from serve.limits.recent import SCOPE
from serve.prompt.heads import head_tokens
from serve.prompt.render import render
from serve.prompt.tokenizer import Tokenizer
from serve.server import shared_heads
from serve.server.config import parse_config
from serve.server.shared_heads import SharedHeads, open_heads
from tests.helpers.http import FLAGS, Json, ask, eventually, post, prompt_tokens, text_of

PAGE = 16  # of FLAGS
NAMES = ("alice", "bob", "carol", "dave", "erin", "ops")
TOOL = {"name": "look", "description": "Look around the house.", "input_schema": {"type": "object"}}


def with_head(text: str, head: str, max_tokens: int = 1, **more: object) -> Json:
    return ask(text, max_tokens, **({"system": f"You are {head}. " * 12, "tools": [TOOL]} | more))


def read(answer: Json) -> int:
    """The tokens that an answer read from the cache."""
    return answer["usage"]["cache_read_input_tokens"]


@contextmanager
def serving(model_folder: Path, folder: Path, *flags: str) -> Iterator[Server]:
    """A server whose keys share heads that three have sent, with a store."""
    keys = folder / "keys"
    lines = (f"{name} sha256:{hashlib.sha256(name.encode()).hexdigest()}" for name in NAMES)
    keys.write_text("\n".join(lines) + " admin\n")
    stored = ("--store", str(folder / "store"), "--flush-seconds", "0.05", "--audit-share", "1")
    shared = ("--api-key-file", str(keys), "--share-prefix", "tools-system")
    log = folder / "server.log"
    with running_server(model_folder, *FLAGS, *shared, *stored, *flags, log=log) as server:
        yield server
    assert "Traceback" not in log.read_text()


@contextmanager
def clients(server: Server) -> Iterator[dict[str, httpx.Client]]:
    opened = {name: httpx.Client(base_url=server.url, headers={"x-api-key": name}, timeout=60) for name in NAMES}
    yield opened
    for client in opened.values():
        client.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heads")


@pytest.fixture(scope="module")
def of(model_folder: Path, folder: Path) -> Iterator[dict[str, httpx.Client]]:
    """A client with the key of each name, of a server where the operator has named a head."""
    (folder / "named.json").write_text(json.dumps(with_head("whatever", "named by the operator")))
    named = ("--share-heads", str(folder / "named.json"))
    with serving(model_folder, folder, *named) as server, clients(server) as opened:
        yield opened


class TestServed:
    def test_a_head_is_shared_once_three_keys_have_sent_it(self, of: dict[str, httpx.Client]) -> None:
        body = with_head("I am nobody", "a guide")
        for name in ("alice", "bob", "carol"):
            assert read(post(of[name], body)) == 0, "the first three find nothing"
            assert read(post(of[name], body)) > 0, "but their own"
        found = post(of["dave"], with_head("Something else", "a guide"))
        assert read(found) > 100
        assert read(found) % PAGE == 0, "whole pages"

    def test_never_a_token_past_the_head_and_reports_tell_no_more(self, of: dict[str, httpx.Client]) -> None:
        secret = "The PIN of the safe is 4711 and stays secret. " * 6
        for name in ("alice", "bob", "carol"):
            post(of[name], with_head(f"{secret}{name}", "a keeper"))
        answers = []
        for name, text in (("dave", f"{secret}dave"), ("erin", "9 Nothing of the sort")):
            answer = post(of[name], with_head(text, "a keeper"))
            path = f"/v1/requests/{answer['id']}"
            eventually(lambda path=path, name=name: of[name].get(path).status_code == 200, "a report")
            report = of[name].get(path).json()
            assert (report["reused_tokens"], report["cause"]) == (read(answer), "new_content")
            assert (report.get("lost_tokens", 0), report["key"]) == (0, name)
            said = next(each["start"] for each in report["sections"] if each["section"].startswith("messages[0]"))
            assert read(answer) <= said, "the user's text begins after what was read"
            answers.append(answer)
        assert 100 < read(answers[0]) == read(answers[1]), "a right guess is answered as a wrong one"
        again = read(post(of["erin"], with_head("9 Nothing of the sort", "a keeper")))
        assert again == prompt_tokens(answers[1]["usage"]) - 1, "its own are reused in full"

    def test_one_that_was_named_is_shared_at_once(self, of: dict[str, httpx.Client]) -> None:
        body = with_head("Hello", "named by the operator")
        assert read(post(of["alice"], body)) < 20, "no more than the start of other shared heads"
        assert read(post(of["bob"], with_head("Good day", "named by the operator"))) > 100

    def test_a_salt_asks_to_share_nothing(self, of: dict[str, httpx.Client]) -> None:
        body, salt = with_head("Salted", "named by the operator"), {"x-tokenzero-cache-salt": "s"}
        post(of["alice"], body)
        assert read(post(of["bob"], body, **salt)) == 0
        for name in NAMES[:4]:
            post(of[name], with_head("Salted", "counted nowhere"), **salt)
        assert read(post(of["erin"], with_head("Plain", "counted nowhere"))) == 0

    def test_answers_after_a_shared_head_are_those_without_one(self, of: dict[str, httpx.Client]) -> None:
        texts = [f"Tell me of {thing}" for thing in ("rivers", "mountains", "the sea")]
        bodies = [with_head(text, "named by the operator", 12) for text in texts]
        alone = [
            text_of(post(of["alice"], body, **{"x-tokenzero-cache-salt": f"{n}"})) for n, body in enumerate(bodies)
        ]
        assert [text_of(post(of["bob"], body)) for body in bodies] == alone

    def test_audits_of_shared_heads_find_them_right(self, of: dict[str, httpx.Client]) -> None:
        post(of["erin"], with_head("Audit me", "named by the operator"))
        before = scrape(of["ops"])["tokenzero_audited_requests_total"]
        post(of["dave"], with_head("Audit me, too", "named by the operator"))
        eventually(lambda: scrape(of["ops"])["tokenzero_audited_requests_total"] > before, "one is audited")
        figures = scrape(of["ops"])
        assert (figures["tokenzero_audit_mismatches_total"], figures["tokenzero_audit_failures_total"]) == (0, 0)

    def test_a_restarted_server_shares_it_still_and_finds_its_pages(self, model_folder: Path, tmp_path: Path) -> None:
        body = with_head("Before the end", "a survivor")
        with serving(model_folder, tmp_path) as server, clients(server) as of:
            for name in ("alice", "bob", "carol", "alice"):
                post(of[name], body)
            eventually(lambda: scrape(of["ops"])["tokenzero_write_queue_bytes"] == 0, "the pages are written")
        file = tmp_path / "store" / shared_heads.FILE
        assert len(file.read_text().splitlines()) == 1, "one was shared"
        assert file.stat().st_mode & 0o777 == 0o600
        with serving(model_folder, tmp_path) as server, clients(server) as of:
            found = post(of["erin"], with_head("After the start", "a survivor"))
            assert read(found) > 100
            assert found["usage"]["cache_read_by_tier"]["disk"] == read(found)
            assert read(post(of["alice"], body)) >= prompt_tokens(found["usage"]) - 2 * PAGE, "its own after the head"


def counting(after: int = 3, file: Path | None = None) -> SharedHeads:
    return SharedHeads(b"model", PAGE, after, file)


class TestCounting:
    def test_one_key_counts_once_however_often_it_sends(self) -> None:
        heads = counting()
        assert [heads.is_shared(b"h", key) for key in "aaaabbbac"] == [False] * 8 + [True]
        assert heads.is_shared(b"h", "d")
        assert not heads.is_shared(b"other", "d")

    def test_what_one_key_floods_is_its_own(self) -> None:
        heads = counting(2)
        assert not heads.is_shared(b"h", "victim")
        for number in range(3 * shared_heads.MOST_COUNTED):
            assert not heads.is_shared(b"%d" % number, "flood")
        assert len(heads.counted["flood"]) == shared_heads.MOST_COUNTED
        assert heads.is_shared(b"h", "flood"), "the other key's is not forgotten"
        assert heads.remembered_bytes <= heads.most_bytes

    def test_shared_ones_are_bounded_and_the_operators_stay(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shared_heads, "MOST_SHARED", 4)
        heads = counting(2)
        heads.named.add(b"named")
        for number in range(9):
            assert [heads.is_shared(b"%d" % number, key) for key in "ab"] == [False, True]
        assert len(heads.shared) == 4
        assert heads.is_shared(b"named", "c")

    def test_the_file_is_read_as_far_as_it_is_one(self, tmp_path: Path) -> None:
        file, name = tmp_path / "new" / "heads", bytes(range(32))
        heads = counting(2, file)
        assert [heads.is_shared(name, key) for key in "ab"] == [False, True]
        assert heads.writing
        heads.writing.join(60)
        with file.open("a") as opened:
            opened.write("nonsense\n" + "Z" * 64 + "\n" + name.hex()[:20])
        assert list(counting(2, file).shared) == [name]
        file.unlink()
        file.mkdir()
        heads = counting(2, file)
        assert [heads.is_shared(name, key) for key in "ab"] == [False, True], "what cannot be written is not kept"


class TestHead:
    def decoded(self, text: str = "Hi", **more: object) -> object:
        return decode_count_tokens(json.dumps(with_head(text, "a guide", **more)).encode())

    def test_it_does_not_depend_on_what_was_said(self, tokenizer: Tokenizer) -> None:
        said = [{"role": "user", "content": "What"}, {"role": "assistant", "content": "That"}, *ask("Why")["messages"]]
        requests = [self.decoded(), self.decoded("\n\n Hello"), self.decoded(messages=said)]
        heads = [head_tokens(request, tokenizer) for request in requests]  # type: ignore[arg-type]
        assert all(np.array_equal(head, heads[0]) for head in heads)
        assert len(heads[0]) > 100
        for request in requests:
            tokens = render(request, tokenizer)  # type: ignore[arg-type]
            assert np.array_equal(tokens[: len(heads[0])], heads[0])
        assert "Hello" not in tokenizer.hf.decode(heads[1])

    def test_another_tool_or_system_text_is_another_head(self, tokenizer: Tokenizer) -> None:
        heads, rendered = counting(), {}
        for name, more in {"one": {}, "tools": {"tools": []}, "system": {"system": "You are a guide. " * 13}}.items():
            request = self.decoded(**more)
            rendered[name] = heads.head(request, tokenizer, False)  # type: ignore[arg-type]
        assert len({name for _, name in rendered.values()}) == 3

    def test_a_template_that_refuses_a_question_alone_costs_the_request_nothing(
        self, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise InvalidRequest("refused")

        monkeypatch.setattr(shared_heads, "head_tokens", refuse)
        request = self.decoded()
        tokens = render(request, tokenizer)  # type: ignore[arg-type]
        assert counting().length(request, tokens, tokenizer, False, "a") == 0  # type: ignore[arg-type]

    def test_its_length_is_whole_pages_and_less_than_the_prompt(self, tokenizer: Tokenizer) -> None:
        heads, request = counting(), self.decoded()
        tokens = render(request, tokenizer)  # type: ignore[arg-type]
        lengths = [heads.length(request, tokens, tokenizer, False, key) for key in "abcd"]  # type: ignore[arg-type]
        assert lengths[:2] == [0, 0]
        assert lengths[2] == lengths[3] > 100
        assert lengths[3] % PAGE == 0
        other = tokens.copy()
        other[3] += 1
        assert heads.length(request, other, tokenizer, False, "d") == 0  # type: ignore[arg-type]

    def test_what_is_known_of_a_head_is_known_for_its_key_alone(self, tokenizer: Tokenizer) -> None:
        heads = counting()
        for key in ("a", "b"):
            scope = SCOPE.set(key)
            heads.head(self.decoded(), tokenizer, False)  # type: ignore[arg-type]
            SCOPE.reset(scope)
        assert len(heads.known) == 2


class TestNamed:
    def test_a_folder_of_captures_names_their_heads(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        for number in range(2):
            (tmp_path / f"{number}.json").write_text(json.dumps({"body": with_head("Hi", f"guide {number}")}))
        assert len(open_heads(counting(), tmp_path, tokenizer, ()).named) == 2

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ("{", "expected the body of a POST"),
            (json.dumps(ask("Hi", system="Short.")), "expected a page of 16 tokens"),
        ],
    )
    def test_one_that_has_no_head_is_refused_by_its_name(
        self, tokenizer: Tokenizer, tmp_path: Path, content: str, says: str
    ) -> None:
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(ValueError, match=f"--share-heads: .*a.json: .*{says}"):
            open_heads(counting(), tmp_path, tokenizer, ())

    @pytest.mark.parametrize(
        ("flags", "says"),
        [
            (
                ("--share-heads", "/nowhere"),
                "--share-heads: expected --share-prefix tools-system beside it, found none",
            ),
            (("--share-prefix", "tools-system", "--share-heads", "/nowhere"), "--share-heads: /nowhere: expected a "),
            (("--share-after", "1"), "--share-after"),
        ],
    )
    def test_flags_that_do_not_fit_are_refused(
        self, flags: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            parse_config(["--model", "m", *flags])
        assert says in capsys.readouterr().err
