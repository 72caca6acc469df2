"""The HTTP headers that requests may send and that responses have, besides those of HTTP itself."""

from __future__ import annotations

from typing import NamedTuple


class Header(NamedTuple):
    """What the documentation says of a header."""

    name: str
    text: str
    proxy: bool = False  # the proxy has it as well
    server: bool = True  # the server has it


RULES_HEADER = "x-tokenzero-normalize"
SALT_HEADER = "x-tokenzero-cache-salt"
APPLIED_HEADER = "x-tokenzero-normalized"
FORECAST_HEADER = "x-tokenzero-forecast"
REPORT_HEADER = "x-tokenzero-report"
PRIORITY_HEADER = "x-tokenzero-priority"
UNUSED_HEADER = "x-tokenzero-unused-hints"

REQUEST_HEADERS = (
    Header(
        "x-api-key",
        "The key of `--api-key`, or one of `--api-key-file`; `authorization: Bearer KEY` does as well.",
        proxy=True,
    ),
    Header(RULES_HEADER, "The rules for this request instead of the server's: comma-separated, or `none`."),
    Header(SALT_HEADER, "Requests with different salts share no page, no recorded answer and no tokenised text."),
    Header(
        PRIORITY_HEADER,
        "`background`: requests without it come first, and its pages are evicted first; or `interactive`, the default.",
    ),
    Header("x-request-id", "An id to find the request again by: up to 128 visible ASCII characters."),
    Header("accept", "`text/html` at `GET /` gets the dashboard.", proxy=True),
)
RESPONSE_HEADERS = (
    Header(
        "server-timing", "Where the time went, phase by phase; `proxy` is how long the proxy's rules took.", proxy=True
    ),
    Header(APPLIED_HEADER, "The rules that changed the request and where, at most 32.", proxy=True),
    Header(
        FORECAST_HEADER,
        "What the request was expected to find as it came, such as `device=51136, disk=512, computed=352, "
        "ttft-ms=131.9`: tokens that are read, by where they were, tokens to compute, and the time to the first token.",
    ),
    Header(PRIORITY_HEADER, "The priority that a request had, where header, body or key name one."),
    Header(UNUSED_HEADER, "Hints of the body that nothing here reads."),
    Header("request-id", "A fresh id of each response."),
    Header(
        "x-request-id",
        "The request's own, if it has one, else the same as `request-id`: log, `/v1/requests` and errors have it.",
    ),
    Header(
        "x-content-type-options",
        "`nosniff`, and `cross-origin-resource-policy` is `same-origin`.",
    ),
    Header(
        "retry-after",
        "Seconds, with 529, where too much waits or is in flight, and 429, where a key or an address has too much.",
    ),
    Header(REPORT_HEADER, "The id of the report on this request in `/v1/requests`.", proxy=True, server=False),
)
