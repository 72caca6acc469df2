"""Thousands of random requests to a real server and a proxy before it: no 5xx, and no answer outside the API's schema.

Requests by the schema, and against it, are made by schemathesis: https://schemathesis.readthedocs.io.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from experiments.harness.server import Server, running_server
from serve.server.app import ROUTES
from tests.helpers.fuzz import broken
from tests.helpers.http import ask, eventually, is_idle

pytestmark = [pytest.mark.fuzz, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
CASES = int(os.environ.get("FUZZ_CASES", "2000"))
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 3}}, "required": ["a"]}
TOOL = {"name": "Read", "input_schema": SCHEMA, "description": "Reads é"}
FUNCTION = {"name": "Read", "parameters": SCHEMA}
USER = {"role": "user", "content": "Hi \ud83e\udd80"}
VALID: dict[str, list[dict[str, Any]]] = {
    "/v1/messages": [
        ask("Hi", 3, tools=[TOOL], tool_choice={"type": "any"}, stop_sequences=["x"], stream=True),
        ask("Hi", 2, system=[{"type": "text", "text": "S"}], thinking={"type": "adaptive"}, top_k=3),
        ask("Hi", 3, output_config={"format": {"type": "json_schema", "schema": SCHEMA}}),
    ],
    "/v1/chat/completions": [
        {"messages": [USER], "max_tokens": 2, "tools": [{"type": "function", "function": FUNCTION}], "stream": True},
        {"messages": [USER], "max_tokens": 2, "stop": ["x"], "response_format": {"type": "json_object"}, "seed": 3},
    ],
    "/v1/responses": [
        {"input": [USER], "max_output_tokens": 2, "tools": [{"type": "function", **FUNCTION}], "stream": True},
        {"input": "Hi", "max_output_tokens": 2, "reasoning": {"effort": "low"}, "text": {"format": {"type": "text"}}},
    ],
}
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
OPERATIONS = [
    (min(route.methods - {"HEAD"}), route.path.replace(":path", "")) for route in ROUTES if isinstance(route.path, str)
]


@pytest.fixture(scope="module")
def proxy(server: Server, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A proxy before the server, with every rule that it has."""
    log = tmp_path_factory.mktemp("proxy") / "log"
    flags = ("--upstream", server.url, "--normalize", "strip-preamble,sort-tools,volatile-last")
    with running_server(model_folder, *flags, log=log, program=("-m", "serve", "proxy")) as running:
        yield running
        assert "Traceback" not in log.read_text()


def short(body: object, path: str) -> object:
    """A body that asks for a short answer, so that thousands of them take minutes."""
    if isinstance(body, dict):
        own = "max_output_tokens" if path.startswith("/v1/responses") else "max_tokens"
        limits = {name: 3 for name in LIMITS if isinstance(body.get(name), int) and body[name] > 3}
        unlimited = path != "/v1/messages" and path in VALID and not any(body.get(name) for name in LIMITS)
        body = body | limits | ({own: 3} if unlimited else {})
    return body


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_any_request_is_answered_by_the_schema(method: str, path: str, server: Server, client: httpx.Client) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="the extra fuzz brings it: `make fuzz`")
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    kept = [checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance]
    operation = schemathesis.openapi.from_url(f"{server.url}/openapi.json")[path][method]
    statuses: Counter[int] = Counter()
    bodies = path in {path for method, path in OPERATIONS if method == "POST"}
    modes = schemathesis.GenerationMode
    for mode, count in ((modes.POSITIVE, CASES // 2), (modes.NEGATIVE, CASES // 2)):
        if not bodies and mode is modes.NEGATIVE:
            continue  # there is nothing to violate but the path

        @settings(
            max_examples=count if bodies else min(count, 100),
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=[*HealthCheck],
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def send(case: Any) -> None:
            case.body = short(case.body, path)
            response = case.call(base_url=server.url)
            statuses[response.status_code] += 1
            case.validate_response(response, checks=[not_a_server_error, *kept])

        send()
    assert statuses[200] or "{id}" in path, statuses
    eventually(lambda: is_idle(client), "nothing is left behind")
    print(method, path, dict(statuses))


@pytest.mark.parametrize("path", VALID)
@pytest.mark.parametrize("through", ["server", "proxy"])
def test_any_bytes_are_answered_or_refused_as_the_clients_fault(
    path: str, through: str, request: pytest.FixtureRequest, client: httpx.Client
) -> None:
    source, statuses = random.Random(3), Counter()
    url = request.getfixturevalue(through).url
    with httpx.Client(base_url=url, timeout=120) as own:
        for _ in range(CASES):
            body = broken(source, json.dumps(source.choice(VALID[path])).encode())
            response = own.post(path, content=body, headers={"content-type": "application/json"})
            statuses[response.status_code] += 1
            assert response.status_code < 500, (body, response.text)
            if response.status_code != 200:
                assert response.json()["error"]["message"], body
            elif response.headers["content-type"].startswith("text/event-stream"):
                assert response.text.endswith("\n\n"), body
                assert '"type":"error"' not in response.text, (body, response.text[-500:])
            else:
                assert response.json(), body
    assert statuses[200] > CASES // 50, statuses
    assert statuses[400] > CASES // 4, statuses
    print(through, path, dict(statuses))
