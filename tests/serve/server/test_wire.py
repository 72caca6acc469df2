"""A real server over HTTP: how a path, an encoding and a text may be written, and what is refused by name."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import brotli
import httpx
import pytest
import zstandard

from tests.helpers.http import BODY_LIMIT, ask, encoded, error_of, post, prompt_tokens

CHAT = {"model": "m", "max_tokens": 2, "messages": [{"role": "user", "content": "hi"}]}
RESPONSES = {"model": "m", "max_output_tokens": 2, "input": "hi"}


class TestPaths:
    @pytest.mark.parametrize(
        ("path", "body"),
        [
            ("/v1/v1/messages", ask("hi")),
            ("/messages?beta=true", ask("hi")),
            ("//v1/messages", ask("hi")),
            ("/v1/messages/", ask("hi")),
            ("/anthropic/v1/messages", ask("hi")),
            ("/messages/count_tokens", {"model": "m", "messages": [{"role": "user", "content": "hi"}]}),
            ("/chat/completions", CHAT),
            ("/v1/v1/chat/completions", CHAT),
            ("/v1/chat/completions/", CHAT),
            ("/responses", RESPONSES),
            ("/v1/responses/", RESPONSES),
        ],
    )
    def test_a_route_is_answered_however_its_path_is_written(
        self, client: httpx.Client, path: str, body: dict[str, Any]
    ) -> None:
        response = client.post(path, json=body)
        assert response.status_code == 200, response.text

    def test_models_are_listed_without_the_version_too(self, client: httpx.Client) -> None:
        listed = client.get("/v1/models").json()
        assert client.get("/models").json() == client.get("/v1/models/").json() == listed

    def test_such_paths_share_the_metrics_label_of_their_route(self, client: httpx.Client) -> None:
        client.post("/v1/v1/messages/", json=ask("hi"))
        assert 'path="/v1/v1/messages' not in client.get("/metrics").text

    def test_a_route_of_another_server_is_refused_in_its_form_with_what_to_use(self, client: httpx.Client) -> None:
        response = client.post("/v1/completions", json={"model": "m", "prompt": "hi", "max_tokens": 2})
        assert response.status_code == 404
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert "/v1/chat/completions" in error["message"]
        assert client.post("/completions", json={}).json() == response.json()
        assert "/v1/messages" in error_of(client.post("/v1/other", json={}), 404, "not_found_error")


class TestEncodings:
    @pytest.mark.parametrize(
        ("name", "compress"),
        [("gzip", gzip.compress), ("deflate", zlib.compress), ("zstd", zstandard.compress), ("br", brotli.compress)],
    )
    def test_a_compressed_body_is_read(self, client: httpx.Client, name: str, compress: Any) -> None:
        plain = post(client, ask("compressed"))["usage"]
        headers = {"content-encoding": name}
        response = client.post("/v1/messages", content=compress(encoded(ask("compressed"))), headers=headers)
        assert response.status_code == 200, response.text
        assert prompt_tokens(response.json()["usage"]) == prompt_tokens(plain)
        for path, body in (("/v1/chat/completions", CHAT), ("/v1/responses", RESPONSES)):
            assert client.post(path, content=compress(encoded(body)), headers=headers).status_code == 200

    def test_an_unknown_encoding_is_refused_with_those_that_are_known(self, client: httpx.Client) -> None:
        response = client.post("/v1/messages", content=b"x", headers={"content-encoding": "lzma"})
        assert "got 'lzma'" in error_of(response, 415, "invalid_request_error")
        assert response.headers["accept-encoding"] == "gzip, deflate, zstd, br"

    def test_a_body_that_is_too_large_when_decoded_is_refused(self, client: httpx.Client) -> None:
        bomb = gzip.compress(encoded(ask("a" * BODY_LIMIT)))
        response = client.post("/v1/messages", content=bomb, headers={"content-encoding": "gzip"})
        assert f"at most {BODY_LIMIT} bytes" in error_of(response, 413, "request_too_large")

    def test_a_body_that_is_not_compressed_as_its_header_says_is_refused(self, client: httpx.Client) -> None:
        for encoding, compress in (("gzip", gzip.compress), ("zstd", zstandard.compress)):
            response = client.post("/v1/messages", content=compress(encoded(ask("hi"))))
            assert f"got {encoding} data: say content-encoding" in error_of(response, 400, "invalid_request_error")
        response = client.post("/v1/messages", json=ask("hi"), headers={"content-encoding": "gzip"})
        assert "expected gzip data" in error_of(response, 400, "invalid_request_error")


class TestHalvesOfSurrogatePairs:
    @pytest.mark.parametrize("half", [r"\ud83d", r"\uDE00"])
    @pytest.mark.parametrize("text", ["{}", "a {}", "{} b", "a {} b {}"])
    def test_half_a_pair_is_read_as_one_replacement_character(self, client: httpx.Client, half: str, text: str) -> None:
        headers = {"content-type": "application/json"}
        for path, body in (
            ("/v1/messages", ask("TEXT", 1)),
            ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": "TEXT"}]}),
            ("/v1/responses", RESPONSES | {"input": "TEXT"}),
        ):
            counts = []
            for written in (text.replace("{}", half), text.replace("{}", "\ufffd")):
                content = json.dumps(body).replace("TEXT", written).encode()
                response = client.post(path, content=content, headers=headers)
                assert response.status_code == 200, response.text
                usage = response.json()["usage"]
                counts.append(prompt_tokens(usage) if path == "/v1/messages" else usage["total_tokens"])
            assert counts[0] == counts[1]
