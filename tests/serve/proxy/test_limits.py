"""The proxy has the server's limits of connections, and counts what goes beyond them."""

from __future__ import annotations

import socket
from typing import Any

import httpx

from serve.proxy.app import create_proxy
from serve.proxy.cli import ProxyConfig
from serve.proxy.reports import Reports
from serve.proxy.upstream import parse_upstream
from serve.rules.normalize import DEFAULT_RULES
from serve.web.connection import limited
from serve.web.connections import Connections
from tests.helpers.scripted_server import answering

NOBODY = ("http://127.0.0.1:9", "http://127.0.0.1:10")


def test_headers_that_are_too_long_are_refused_and_counted_by_the_proxy() -> None:
    reports = Reports()
    config = ProxyConfig(upstream=NOBODY, max_header_bytes=1000)
    connections: Connections[Any] = Connections(config, reports.count_refused)
    engines = [parse_upstream(url, DEFAULT_RULES, 5.0, None) for url in NOBODY]
    app = create_proxy(engines, DEFAULT_RULES, reports)
    with answering(app, http=limited(connections)) as url:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as connection:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nX-Big: " + b"a" * 2000)
            answer = connection.recv(2**12)
        assert answer.startswith(b"HTTP/1.1 431")
        assert b'"param"' in answer
        with httpx.Client(base_url=url) as client:
            assert client.get("/v1/requests").json()["refused"] == {"max_header_bytes": 1}
            page = client.get("/metrics").text
    assert 'tokenzero_proxy_beyond_limit_total{limit="max_header_bytes"} 1' in page
