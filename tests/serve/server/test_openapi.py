"""`/openapi.json`: every route with the schemas of its bodies, made of the structs that read and write them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from serve.api.answers import Message, Usage
from serve.server.app import ROUTES
from serve.server.openapi import openapi

Json = dict[str, Any]


@pytest.fixture(scope="module")
def document() -> Json:
    return json.loads(openapi(ROUTES))


def references(value: Any) -> Iterator[str]:
    for name, each in value.items() if isinstance(value, dict) else enumerate(value):
        if name == "$ref":
            yield each
        elif isinstance(each, dict | list):
            yield from references(each)


def test_every_route_is_there_with_its_methods_name_and_text(document: Json) -> None:
    for route in ROUTES:
        path, method = route.path.replace(":path", ""), min(route.methods - {"HEAD"}).lower()
        about = document["paths"][path][method]
        assert about["operationId"] == route.endpoint.__name__
        assert about["summary"]
        assert not about["summary"].startswith("`")
        assert {"200", "401", "500"} <= about["responses"].keys()
        assert [p["name"] for p in about.get("parameters", ()) if p["in"] == "path"] == re.findall(r"{(\w+)}", path)
        assert ("requestBody" in about) is (method == "post")


def test_a_schema_that_is_named_is_there_and_each_is_named(document: Json) -> None:
    named = {reference.removeprefix("#/components/schemas/") for reference in references(document)}
    assert named <= document["components"]["schemas"].keys()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in document["components"]["schemas"])


def test_what_only_the_server_sets_is_no_part_of_a_request(document: Json) -> None:
    schemas = document["components"]["schemas"]
    fields = schemas["MessagesRequest.request"]["properties"]
    assert {"model", "messages", "max_tokens", "tools", "system"} <= fields.keys()
    assert not {"left_out_tools", "places"} & fields.keys()
    assert "source" in schemas["ImageBlock.request"]["properties"]


def test_an_answer_always_has_the_fields_that_the_server_always_sends(document: Json) -> None:
    schema = document["components"]["schemas"]["Message"]
    sent = json.loads(msgspec.json.encode(Message(id="msg_1", model="m", usage=Usage(1))))
    assert set(schema["required"]) == sent.keys()
    assert "diagnostics" in schema["properties"].keys() - set(schema["required"])


def test_errors_have_the_form_and_the_statuses_of_their_api(document: Json) -> None:
    def schema(path: str, status: str) -> str:
        content = document["paths"][path]["post"]["responses"][status]["content"]
        return content["application/json"]["schema"]["$ref"].rpartition("/")[2]

    assert schema("/v1/messages", "529") == "Error"
    assert schema("/v1/responses", "503") == "ErrorBody"
    assert "529" not in document["paths"]["/v1/responses"]["post"]["responses"]


def test_the_document_is_one_of_openapi(document: Json) -> None:
    validator = pytest.importorskip("openapi_spec_validator", reason="the extra fuzz brings it")
    validator.validate(document)
