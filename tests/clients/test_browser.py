"""The dashboard in a headless Chromium, on a real server: what it shows of requests, and how it behaves in trouble."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from experiments.harness.server import Server, running_server
from experiments.screenshot import chromium
from experiments.workloads.demo_model import TINY, write_demo_model

playwright = pytest.importorskip("playwright.sync_api", reason="the extra `clients` is not installed")
expect = playwright.expect
Browser, Page = playwright.Browser, playwright.Page

pytestmark = pytest.mark.clients

Json = dict[str, Any]

FLAGS = ("--kv-pool-bytes", "16MiB", "--max-model-len", "4096", "--page-size", "16", "--host-cache-bytes", "16MB")
KEY = "a key, not a secret"
HEADER = "x-anthropic-billing-header: cc_version=2.1.179.471; cc_entrypoint=sdk-cli; cch={:05x};"
KEEP = {"x-tokenzero-normalize": "none"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dashboard") / "model"
    write_demo_model(folder, config=TINY)
    return folder


@pytest.fixture(scope="module")
def browser(chromium_program: Path) -> Iterator[Browser]:
    with chromium(chromium_program) as browser:
        yield browser


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(model, *FLAGS, log=tmp_path_factory.mktemp("dashboard") / "server.log") as server:
        yield server


@pytest.fixture
def serve(model: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """`serve(*flags)`: a server for this test."""
    with ExitStack() as stack:
        yield lambda *flags: stack.enter_context(running_server(model, *FLAGS, *flags, log=tmp_path / "server.log"))


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that must not log an error, nor request anything from another server."""
    page = browser.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: "//127.0.0.1:" in request.url or problems.append(request.url))
    yield page
    page.close()
    assert problems == []


def send(server: Server, number: int, said: str, **headers: str) -> str:
    """Send a request with a header of its own; returns its message's id."""
    texts = [HEADER.format(number), f"You answer {said} in one line. " * 20]
    body = {
        "model": "any",
        "max_tokens": 4,
        "temperature": 0,
        "system": [{"type": "text", "text": text} for text in texts],
        "messages": [{"role": "user", "content": f"{said}?"}],
    }
    response = httpx.post(f"{server.url}/v1/messages", json=body, headers=headers, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()["id"]


def row(page: Page, id: str) -> Any:
    return page.locator(f".row[data-id={id}]")


def share_of_strip(page: Page, id: str, part: str) -> float:
    """Where in its strip a part begins, from 0 to 1."""
    strip, found = (row(page, id).locator(name).bounding_box() for name in (".strip", part))
    return (found["x"] + found["width"] / 2 - strip["x"]) / strip["width"]


def test_requests_become_strips_with_the_mismatch_at_its_token(server: Server, page: Page) -> None:
    page.goto(server.url)
    expect(page.locator("#status")).to_have_text("live")
    page.locator("#stretch").check()

    send(server, 0x11111, "kept", **KEEP)
    broken = send(server, 0x22222, "kept", **KEEP)
    send(server, 0x11111, "stripped")
    whole = send(server, 0x22222, "stripped")
    # The page is open all the while.
    expect(row(page, whole)).to_be_visible()
    report = httpx.get(f"{server.url}/v1/requests/{broken}").json()

    assert report["cause"] == "preamble"
    length = report["prompt_tokens"] + report["generated_tokens"]
    mark = row(page, broken).locator(".mark")
    expect(mark).to_have_attribute("data-position", str(report["position"]))
    assert share_of_strip(page, broken, ".mark") == pytest.approx(report["position"] / length, abs=0.005)
    lost = row(page, broken).locator(".run.lost").bounding_box()["width"]
    strip = row(page, broken).locator(".strip").bounding_box()["width"]
    assert lost / strip == pytest.approx(report["lost_tokens"] / length, abs=0.005)

    expect(page.locator(".tile", has_text="audited")).to_contain_text("none mismatched")

    row(page, broken).hover()
    tip = page.locator("#tip")
    expect(tip).to_contain_text("preamble a billing header before the system text differs", ignore_case=True)
    for text in ("system[0]", "22222", "11111", f"up to {report['lost_tokens']} tokens"):
        expect(tip).to_contain_text(text)
    assert re.search(r"tokens, [\d.]+ ms", tip.inner_text())

    row(page, whole).hover()
    expect(tip).to_contain_text("no mismatch", ignore_case=True)
    expect(row(page, whole).locator(".mark")).to_have_count(0)
    expect(page.locator("#rules")).to_contain_text("strip-preamble")
    expect(page.locator("#rules .run")).to_have_count(1)


def test_each_request_is_a_point_of_the_charts_that_tells_of_it(server: Server, page: Page) -> None:
    ids = [send(server, number, "drawn", **KEEP) for number in range(1, 4)]
    page.goto(server.url)
    for chart in ("#ttft", "#hits"):
        for id in ids:
            expect(page.locator(f"{chart} .point[data-id={id}]")).to_have_count(1)
    box = page.locator("#hits svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 24, box["y"] + box["height"] - 38)  # where the latest request is
    expect(page.locator("#tip")).to_contain_text(ids[2])
    reports = httpx.get(f"{server.url}/v1/requests").json()["data"][:20]
    share = sum(r["reused_tokens"] for r in reports) / sum(r["prompt_tokens"] for r in reports)
    expect(page.locator("#hits svg")).to_have_attribute("aria-label", re.compile(f"{100 * share:.1f}%$"))


def test_the_keyboard_goes_where_the_mouse_does(server: Server, page: Page) -> None:
    ids = [send(server, number, "typed", **KEEP) for number in range(0xA1, 0xA4)]
    page.goto(server.url)
    row(page, ids[2]).focus()
    page.keyboard.press("ArrowDown")
    expect(row(page, ids[1])).to_be_focused()
    expect(page.locator("#tip")).to_contain_text(ids[1])
    page.wait_for_timeout(1500)  # the page has asked again, and moved nothing
    expect(row(page, ids[1])).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#tip")).to_be_hidden()
    page.keyboard.press("End")
    expect(page.locator(".row").last).to_be_focused()
    expect(page.locator(".row[tabindex='0']")).to_have_count(1)
    assert re.search(r"mismatch at token \d+ in system\[0\]: preamble", row(page, ids[1]).get_attribute("aria-label"))


def test_words_of_a_prompt_are_text_and_never_markup(server: Server, page: Page) -> None:
    send(server, 1, "<img src=x onerror=alert(1)>", **KEEP)
    id = send(server, 1, "<b>bold</b>", **KEEP)
    page.goto(server.url)
    row(page, id).hover()
    expect(page.locator("#tip")).to_contain_text("bold</b>")
    expect(page.locator("#tip q b, #tip img")).to_have_count(0)


def test_a_key_is_asked_for_and_forgotten_with_the_page_and_hidden_text_stays_hidden(
    serve: Callable[..., Server], page: Page
) -> None:
    server = serve("--api-key", KEY, "--no-prompt-text-in-reports")
    page.goto(server.url)
    expect(page.locator("#ask")).to_be_visible()
    for key in ("wrong", KEY):
        page.locator("#key").fill(key)
        page.keyboard.press("Enter")
        if key == "wrong":
            expect(page.locator("#ask-text")).to_have_text("The server did not take that key.")
    expect(page.locator("#empty")).to_contain_text("Waiting for the first request")
    send(server, 1, "locked", **{"x-api-key": KEY})
    page.locator(".row").hover()
    expect(page.locator("#tip")).to_contain_text("texts are hidden: --no-prompt-text-in-reports")
    kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])")
    assert KEY not in kept
    page.reload()
    expect(page.locator("#ask")).to_be_visible()


def test_a_server_that_goes_away_is_told_of(serve: Callable[..., Server], page: Page) -> None:
    server = serve()
    send(server, 1, "gone")
    page.goto(server.url)
    expect(page.locator(".row")).to_have_count(1)
    server.process.kill()
    expect(page.locator("#status")).to_contain_text("no answer from the server since", timeout=15_000)
    expect(page.locator(".row")).to_have_count(1)  # what was known stays


def test_a_thousand_requests_are_drawn_and_no_more_kept(server: Server, page: Page) -> None:
    """The server lists only its latest requests, so a busy hour is played to the page."""
    send(server, 1, "many", **KEEP)
    send(server, 2, "many", **KEEP)
    answer = httpx.get(f"{server.url}/v1/requests").json()
    one = answer["data"][0]
    many = [one | {"id": f"msg_{n}", "time": one["time"] + n, "position": n % 90} for n in range(1200)][::-1]
    page.route("**/v1/requests", lambda route: route.fulfill(json=answer | {"data": many}))
    page.goto(server.url)
    expect(page.locator(".row")).to_have_count(1000)
    expect(page.locator("#ttft .point")).to_have_count(1000)
    expect(row(page, "msg_1199")).to_be_visible()
    busy = page.evaluate("""async () => {
        const started = performance.now();
        document.getElementById("only-lost").click();
        document.getElementById("only-lost").click();
        return (performance.now() - started) / 2;
    }""")
    assert busy < 1000, f"a redraw takes {busy:.0f} ms"


def test_each_session_is_a_lane_with_its_agents(server: Server, page: Page) -> None:
    page.goto(server.url)
    names = {"x-claude-code-session-id": "5e551011-aaaa"}
    send(server, 1, "laned", **names)
    send(server, 1, "laned", **names, **{"x-claude-code-agent-id": "explorer"})
    lane = page.locator(".lane", has_text="5e551011")
    expect(lane.locator(".agent")).to_have_count(2)
    main, other = lane.locator(".agent").nth(0), lane.locator(".agent").nth(1)
    expect(main.locator(".name")).to_have_text("main")
    expect(other.locator(".name")).to_have_text("explorer")
    expect(main.locator(".does")).to_contain_text("answered")
    expect(main.locator(".run.device")).to_have_count(1)
    listed = httpx.get(f"{server.url}/v1/sessions").json()["data"]
    (agents,) = [each["agents"] for each in listed if each["session"] == names["x-claude-code-session-id"]]
    about = {each["agent"]: each for each in agents}["explorer"]
    expect(other).to_have_attribute("title", re.compile(f"of its latest prompt of {about['prompt_tokens']:,} tokens"))


def test_a_page_without_sessions_is_whole(server: Server, page: Page) -> None:
    page.route("**/v1/sessions", lambda route: route.fulfill(status=404))
    page.goto(server.url)
    id = send(server, 1, "alone")
    expect(row(page, id)).to_be_visible()
    expect(page.locator("#sessions-card")).to_be_hidden()
