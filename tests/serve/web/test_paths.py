"""A path leads to the route that is meant, however the client's base URL was written."""

from __future__ import annotations

import pytest

from serve.web.paths import API_PATHS, api_path


@pytest.mark.parametrize("route", API_PATHS)
@pytest.mark.parametrize(
    "written",
    ["/v1/{}", "/v1/v1/{}", "/{}", "//v1/{}", "/v1//{}", "/v1/{}/", "/anthropic/v1/{}", "/v1/./{}", "/a/v1/b/v1/{}//"],
)
def test_a_route_is_recognised(route: str, written: str) -> None:
    assert api_path(written.format(route)) == f"/v1/{route}"
    assert api_path(f"/v1/{route}") == f"/v1/{route}"


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/", "/"),
        ("", "/"),
        ("//", "/"),
        ("/health/", "/health"),
        ("//metrics", "/metrics"),
        ("/v1/requests/", "/v1/requests"),
        ("/v1/models/org/name/", "/v1/models/org/name"),
        ("/v1/models/org/v1/messages", "/v1/models/org/v1/messages"),
        ("/models/org/name", "/v1/models/org/name"),
        ("/v1/v1/models/name", "/v1/models/name"),
    ],
)
def test_other_paths_have_single_slashes(path: str, meant: str) -> None:
    assert api_path(path) == meant


@pytest.mark.parametrize(
    "path", ["/v1/messages/batches", "/v1/threads/t/messages", "/anthropic/messages", "/v1/messages/..", "/v2/messages"]
)
def test_what_is_not_a_route_is_not_taken_for_one(path: str) -> None:
    assert api_path(path) == path
