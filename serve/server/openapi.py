"""The server's API as a document of OpenAPI 3.1, made from the structs that read requests and write answers.

Format: https://spec.openapis.org/oas/v3.1.0. The server accepts more than the schemas of requests say: history that
violates them becomes a short text, see `serve.api.mend`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, Struct, inspect
from starlette.routing import Route

from serve.api.answers import CacheWarmed, Error, Message, ModelInfo, ModelPage, TokenCount
from serve.api.messages import CountTokensRequest, MessagesRequest
from serve.api.openai import InputTokens
from serve.api.openai.chat_answer import Completion
from serve.api.openai.chat_request import ChatRequest
from serve.api.openai.errors import ErrorBody, status_of
from serve.api.openai.models import Model, ModelList
from serve.api.openai.responses_answer import Response
from serve.api.openai.responses_request import ResponsesRequest
from serve.api.pins import Pin, PinList, PinRequest
from serve.api.sessions import SessionList
from serve.diagnosis.divergence import Report
from serve.diagnosis.volatility import Volatile
from serve.web.headers import REQUEST_HEADERS, RULES_HEADER, SALT_HEADER
from serve.web.request_status import RequestStatus
from serve.web.version import installed

Json = dict[str, Any]

REFERENCE = "#/components/schemas/{name}"
JSON, STREAM, PLAIN, PAGE = "application/json", "text/event-stream", "text/plain", "text/html"
TEXT: Json = {"type": "string"}
# An event; schemas of streams are those of their events, as OpenAPI 3.2 has them.
EVENT: Json = {"type": "object", "properties": {"event": TEXT, "data": TEXT}, "required": ["data"]}
STATUS: Json = {"type": "object", "properties": {"status": {"type": "string"}}, "required": ["status"]}
# What `mend` sets, and clients do not send.
INTERNAL = ("left_out_tools", "places")
REFUSED = {
    400: "The request is invalid; the message names the field, what was expected and what was found",
    401: "The key is missing or wrong",
    403: "A web page of another site sent it, or it is for another host",
    413: "The body is too large",
    415: "Its encoding is not supported, or a web page sent what is no JSON",
    429: "A limit of the key is reached",
    500: "A fault of the server",
    503: "The server is starting or stopping",
    529: "The queue is full",
}


class Operation(NamedTuple):
    """What a route reads and writes."""

    answers: Mapping[str, Any]  # by media type: a struct, several, or a schema
    request: type[Struct] | None = None
    openai: tuple[bool, ...] = (False,)  # the forms of its errors
    more: Mapping[int, str] = {}  # other statuses that it answers with, in the same form


OPENAI, BOTH = (True,), (False, True)
OPERATIONS: dict[str, Operation] = {
    "/v1/messages": Operation({JSON: Message, STREAM: EVENT}, MessagesRequest),
    "/v1/messages/count_tokens": Operation({JSON: TokenCount}, CountTokensRequest),
    "/v1/chat/completions": Operation({JSON: Completion, STREAM: EVENT}, ChatRequest, OPENAI),
    "/v1/responses": Operation({JSON: Response, STREAM: EVENT}, ResponsesRequest, OPENAI),
    "/v1/responses/input_tokens": Operation({JSON: InputTokens}, ResponsesRequest, OPENAI),
    "/v1/cache/warm": Operation({JSON: CacheWarmed}, CountTokensRequest),
    "/v1/cache/pin": Operation({JSON: Pin}, PinRequest),
    "/v1/cache/pins": Operation({JSON: PinList}),
    "/v1/cache/pins/{name}": Operation({JSON: Pin}, more={404: "No pin has this name"}),
    "/v1/requests": Operation({JSON: "requests"}),
    "/v1/requests/{id}": Operation({JSON: "request"}, more={404: "The request is not known, or not any more"}),
    "/v1/sessions": Operation({JSON: SessionList}),
    "/v1/models": Operation({JSON: (ModelPage, ModelList)}, openai=BOTH),
    "/v1/models/{id}": Operation({JSON: (ModelInfo, Model)}, openai=BOTH, more={404: "The id is empty"}),
    "/health": Operation({JSON: STATUS}),
    "/ready": Operation({JSON: STATUS}),
    "/metrics": Operation({PLAIN: TEXT}),
    "/": Operation({JSON: {"type": "object"}, PAGE: TEXT}),
    "/api/hello": Operation({JSON: {"type": "object"}}),
    "/openapi.json": Operation({JSON: {"type": "object"}}),
}
READ = (MessagesRequest, CountTokensRequest, ChatRequest, ResponsesRequest, PinRequest)
WRITTEN = (
    *(Message, TokenCount, CacheWarmed, ModelInfo, ModelPage, Error),
    *(Completion, Response, InputTokens, Model, ModelList, ErrorBody),
    *(Report, RequestStatus, Volatile, Pin, PinList, SessionList),
)
OPEN_OBJECT: Json = {"type": "object", "properties": {"type": {"type": "string"}}, "required": ["type"]}
# The structs that `mend` makes, as clients send them.
MENDED = {
    "ImageBlock": {
        "description": "An image, of which a text model reads a placeholder.",
        "type": "object",
        "properties": {"type": {"const": "image"}, "source": {"type": "object"}},
        "required": ["type", "source"],
    },
    "UnreadBlock": OPEN_OBJECT | {"description": "A block of another type, which becomes a short text."},
    "UnreadSource": OPEN_OBJECT | {"description": "A source without text, which becomes a short text."},
}
VENDOR_TOOL = OPEN_OBJECT | {"description": "A tool of the vendor's: offered if clients run it, else left out."}


def openapi(routes: Sequence[Route]) -> bytes:
    """The document about some routes, as JSON. Raises KeyError for one that OPERATIONS lacks."""
    about = {
        "openapi": "3.1.0",
        "info": {"title": "tokenzero", "version": installed("tokenzero")},
        "security": [{"key": []}, {"bearer": []}, {}],
        "paths": {(path := route.path.replace(":path", "")): path_item(path, route) for route in routes},
        "components": {
            "schemas": schemas()[1],
            "securitySchemes": {
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                "bearer": {"type": "http", "scheme": "bearer"},
            },
        },
    }
    return msgspec.json.encode(about)


def path_item(path: str, route: Route) -> Json:
    """A route: its method, parameters, body and answers."""
    about = OPERATIONS[path]
    method = min((route.methods or set()) - {"HEAD"})
    text = (route.endpoint.__doc__ or "").splitlines()[0].removeprefix(f"`{method} {path}`: ")
    item: Json = {"operationId": route.endpoint.__name__, "summary": text, "responses": responses(about)}
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": TEXT} for name in sorted(route.param_convertors)
    ]
    if about.request:
        parameters += [
            {"name": header.name, "in": "header", "description": header.text, "schema": TEXT}
            for header in REQUEST_HEADERS
            if header.name in (RULES_HEADER, SALT_HEADER)
        ]
        item["requestBody"] = {"required": True, "content": {JSON: {"schema": schema_of(about.request)}}}
    return {method.lower(): item | ({"parameters": parameters} if parameters else {})}


def responses(about: Operation) -> Json:
    """What a route answers, by status."""
    answers: Json = {
        "200": {
            "description": "The answer",
            "content": {media: {"schema": answer_schema(answer)} for media, answer in about.answers.items()},
        }
    }
    for status, text in sorted((REFUSED | dict(about.more)).items()):
        for openai in about.openai:
            shown = str(status_of(status) if openai else status)
            form = schema_of(ErrorBody if openai else Error)
            if shown not in answers:
                answers[shown] = {"description": text, "content": {JSON: {"schema": form}}}
            elif len(about.openai) > 1:
                content = answers[shown]["content"][JSON]
                content["schema"] = {"anyOf": [content["schema"], form]}
    return answers


def answer_schema(answer: Any) -> Json:
    """The schema of an answer in OPERATIONS."""
    record = {"allOf": [schema_of(Report), schema_of(RequestStatus)]}
    match answer:
        case dict():
            return answer
        case tuple():
            return {"anyOf": [schema_of(each) for each in answer]}
        case "request":
            return record
        case "requests":
            parts = {
                "data": {"type": "array", "items": record},
                "volatile": {"type": "array", "items": schema_of(Volatile)},
                "causes": {"type": "object", "additionalProperties": TEXT},
            }
            return {"type": "object", "properties": parts, "required": [*parts]}
    return schema_of(answer)


def schema_of(struct: type[Struct]) -> Json:
    """A reference to the schema of a struct of READ or WRITTEN."""
    return schemas()[0][struct]


@cache
def schemas() -> tuple[dict[Any, Json], Json]:
    """References to the schemas of READ and WRITTEN, and all schemas by name.

    Structs that are read and written have two: an answer always has the fields that a request may leave out.
    """
    structs: dict[Any, None] = {}
    for form in WRITTEN:
        find_structs(inspect.type_info(form), structs)
    written, answers = msgspec.json.schema_components(structs, ref_template=REFERENCE)
    for struct, reference in zip(structs, written, strict=True):
        if not struct.__struct_config__.omit_defaults:
            schema = answers[reference["$ref"].rpartition("/")[2]]
            there = [field.encode_name for field in msgspec.structs.fields(struct) if field.default is not UNSET]
            schema["required"] = list(dict.fromkeys([*schema.get("required", ()), *there]))
    read, requests = msgspec.json.schema_components(READ, ref_template=REFERENCE.format(name="{name}.request"))
    for name, schema in requests.items():
        requests[name] = without_discriminators(MENDED.get(name, schema))
    for struct in (MessagesRequest, CountTokensRequest):
        fields = requests[struct.__name__]["properties"]
        requests[struct.__name__]["properties"] = {
            name: schema for name, schema in fields.items() if name not in INTERNAL
        }
        (tools,) = (each for each in fields["tools"]["anyOf"] if each["type"] == "array")
        tools["items"] = {"anyOf": [tools["items"], VENDOR_TOOL]}
    every = answers | {f"{name}.request": schema for name, schema in requests.items()}
    references: dict[Any, Json] = dict(zip((*READ, *structs), (*read, *written), strict=True))
    return references, dict(sorted(every.items()))


def find_structs(type: Any, found: dict[Any, None]) -> None:
    """Add the structs within a type, itself included, as `msgspec.inspect` describes it."""
    parts: tuple[Any, ...] = ()
    match type:
        case inspect.StructType() if type.cls not in found:
            found[type.cls] = None
            parts = tuple(field.type for field in type.fields)
        case inspect.UnionType() | inspect.TupleType():
            parts = tuple(type.types if isinstance(type, inspect.UnionType) else type.item_types)
        case inspect.Metadata():
            parts = (type.type,)
        case inspect.DictType():
            parts = (type.value_type,)
        case inspect.CollectionType():
            parts = (type.item_type,)
    for part in parts:
        find_structs(part, found)


def without_discriminators(schema: Any) -> Any:
    """A schema without the fields that choose one of several: any object may stand beside the known ones."""
    if isinstance(schema, list):
        return [without_discriminators(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {name: without_discriminators(each) for name, each in schema.items() if name != "discriminator"}
