"""What a page in a browser may do to a server that has no key."""

from __future__ import annotations

from dataclasses import dataclass

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from serve.proxy.app import AccessMiddleware
from serve.server.config import ServerConfig, parser, problem_of
from serve.web.browsers import BrowserRules, browser_rules, cors
from serve.web.settings import read_config
from tests.helpers.http import ask, error_of

EVIL, PAGE = "https://evil.example", "https://app.example"


@dataclass(frozen=True)
class At:
    """An address, as the command line gives it."""

    host: str = "127.0.0.1"
    api_key: str | None = None
    allow_host: str = ""
    allow_origin: str = ""


RULES = browser_rules(At(allow_host="tokens.lan, gpu-box:8000", allow_origin=PAGE), keyed=False)


def status(rules: BrowserRules | None, method: str = "POST", path: str = "/v1/messages", **headers: str) -> int:
    """The status of a refusal; 200 if there is none."""
    assert rules is not None
    sent = {"host": "127.0.0.1:8000"} | {name.replace("_", "-"): value for name, value in headers.items()}
    raw = [(name.encode(), value.encode("latin-1")) for name, value in sent.items()]
    refusal = rules.refusal({"method": method, "headers": raw}, path)
    return refusal.status if refusal else 200


class TestHost:
    @pytest.mark.parametrize(
        "host",
        [
            "127.0.0.1:8000",
            "127.8.9.10",
            "localhost:8000",
            "LOCALHOST",
            "localhost.",
            "[::1]:8000",
            "tokens.lan:1",
            "gpu-box",
        ],
    )
    def test_loopback_and_the_names_of_allow_host_are_served(self, host: str) -> None:
        assert status(RULES, host=host) == 200

    @pytest.mark.parametrize(
        "host",
        [
            "evil.example",
            "evil.example:8000",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "10.0.0.1",
            "[::2]",
            "x@127.0.0.1",
        ],
    )
    @pytest.mark.parametrize("path", ["/", "/v1/requests", "/health"])
    def test_a_name_that_a_page_made_up_is_refused_on_every_route(self, host: str, path: str) -> None:
        assert status(RULES, "GET", path, host=host) == 403

    def test_the_second_of_two_hosts_counts_as_well(self) -> None:
        headers = [(b"host", b"localhost"), (b"host", b"evil.example")]
        assert RULES
        assert RULES.refusal({"method": "GET", "headers": headers}, "/v1/models")

    def test_a_server_with_a_key_has_any_name(self) -> None:
        assert browser_rules(At(host="0.0.0.0", api_key="k"), keyed=True) is None


class TestPages:
    @pytest.mark.parametrize(
        "origin", [EVIL, "null", "http://localhost:3000", "file://", "chrome-extension://abc", "http://[::1"]
    )
    @pytest.mark.parametrize("method", ["POST", "GET", "OPTIONS"])
    def test_a_page_of_another_origin_is_refused(self, origin: str, method: str) -> None:
        assert status(RULES, method, origin=origin) == 403

    @pytest.mark.parametrize("site", ["cross-site", "same-site"])
    def test_so_is_a_request_that_a_browser_marks_and_sends_without_an_origin(self, site: str) -> None:
        assert status(RULES, "GET", "/v1/requests", sec_fetch_site=site) == 403

    def test_the_dashboard_may_be_opened_by_a_link_and_reads_its_own_server(self) -> None:
        assert status(RULES, "GET", "/", sec_fetch_site="cross-site") == 200
        own = {"origin": "http://127.0.0.1:8000", "sec_fetch_site": "same-origin"}
        assert status(RULES, "GET", "/v1/requests", **own) == 200
        assert status(RULES, "GET", "/v1/requests", sec_fetch_site="none") == 200

    def test_a_page_of_allow_origin_is_served(self) -> None:
        assert status(RULES, origin=PAGE, sec_fetch_site="cross-site") == 200
        assert status(RULES, origin=PAGE + ".evil.example") == 403


class TestBodies:
    @pytest.mark.parametrize(
        "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", "a"]
    )
    def test_a_body_that_says_it_is_not_json_is_refused(self, kind: str) -> None:
        assert status(RULES, content_type=kind) == 415

    @pytest.mark.parametrize(
        "kind", ["application/json", "Application/JSON; charset=utf-8", "application/merge-patch+json", ""]
    )
    def test_json_and_a_body_without_a_type_are_read(self, kind: str) -> None:
        assert status(RULES, content_type=kind) == 200


class TestCors:
    def page_sees(self, allowed: str, origin: str) -> dict[str, str]:
        config = At(api_key="k", allow_origin=allowed)

        async def answer(request: object) -> JSONResponse:
            return JSONResponse({})

        app = Starlette(routes=[Route("/v1/messages", answer, methods=["POST"])], middleware=cors(config))
        asked = {
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "x-api-key",
        }
        with TestClient(app) as client:
            answers = (
                client.options("/v1/messages", headers=asked),
                client.post("/v1/messages", headers={"origin": origin}),
            )
            return {n: v for a in answers for n, v in a.headers.items() if n.startswith("access-control-allow")}

    def test_by_default_no_page_may_read_an_answer(self) -> None:
        assert self.page_sees("", PAGE) == {}

    def test_pages_of_allow_origin_may(self) -> None:
        seen = self.page_sees(f"http://localhost:3000,{PAGE}", PAGE)
        assert seen["access-control-allow-origin"] == PAGE
        assert "x-api-key" in seen["access-control-allow-headers"]
        assert "access-control-allow-origin" not in self.page_sees(PAGE, EVIL)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--allow-origin", "*"], "--allow-origin *: any page could use this server: give an --api-key"),
        (["--allow-origin", "app.example"], "--allow-origin: expected scheme://host or scheme://host:port, found 'app"),
        (["--allow-origin", f"{PAGE}/"], "found 'https://app.example/'"),
    ],
)
def test_an_origin_that_cannot_be_meant_is_refused_at_the_start(flags: list[str], problem: str) -> None:
    config = read_config(ServerConfig, parser().parse_args(["--model", "m", *flags]))
    assert problem in (problem_of(config) or "")


class TestServer:
    """The same over HTTP, and before the other checks of a route."""

    @pytest.mark.parametrize(
        ("headers", "code"),
        [
            ({"host": "evil.example"}, 403),
            ({"origin": EVIL}, 403),
            ({"origin": "null", "content-type": "text/plain"}, 403),
            ({"sec-fetch-site": "cross-site"}, 403),
        ],
    )
    def test_what_a_page_can_send_is_refused_in_the_form_of_the_api(
        self, client: httpx.Client, headers: dict[str, str], code: int
    ) -> None:
        error_of(client.post("/v1/messages", json=ask("Hi", 1), headers=headers), code, "permission_error")

    def test_a_form_is_refused_with_what_was_expected(self, client: httpx.Client) -> None:
        form = {"content-type": "text/plain"}
        answer = client.post("/v1/messages", content=b'{"x":"="}', headers=form)
        assert "expected application/json, found 'text/plain'" in error_of(answer, 415, "invalid_request_error")

    def test_no_answer_can_be_taken_for_a_script_or_embedded(self, client: httpx.Client) -> None:
        for path in ("/v1/requests", "/v1/models", "/nowhere", "/"):
            headers = client.get(path).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["cross-origin-resource-policy"] == "same-origin"
            assert headers.get_list("x-content-type-options") == ["nosniff"]


class TestProxy:
    def test_the_proxy_refuses_the_same_but_forwards_files(self) -> None:
        async def forwarded(request: object) -> JSONResponse:
            return JSONResponse({})

        routes = [Route(path, forwarded, methods=["POST", "GET"]) for path in ("/v1/messages", "/v1/files", "/")]
        app = AccessMiddleware(Starlette(routes=routes), None, RULES)
        form, foreign = {"content-type": "text/plain"}, {"origin": EVIL}
        with TestClient(app, base_url="http://localhost") as client:
            assert client.post("/v1/files", headers={"content-type": "multipart/form-data"}).status_code == 200
            assert client.post("/v1/messages", headers=form).status_code == 415
            assert client.post("/", headers=form).status_code == 415
            assert client.post("/v1/files", headers=foreign).status_code == 403
            assert client.get("/v1/messages", headers={"host": "evil.example"}).status_code == 403
            assert client.post("/v1/messages", json={}).status_code == 200
