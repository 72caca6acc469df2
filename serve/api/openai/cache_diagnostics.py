"""Why the cache missed the prefix of an earlier response, in OpenAI's words.

Format: https://developers.openai.com/api/docs/guides/prompt-caching/diagnostics.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from serve.api.answers import (
    Diagnostics,
    MessagesChanged,
    ModelChanged,
    PreviousMessageNotFound,
    SystemChanged,
    ToolsChanged,
    Unavailable,
)


class CacheMiss(Struct, frozen=True, tag="cache_miss"):
    """The cache missed the prompt of the response that was compared with, and what had changed since."""

    cache_missed_tokens: int
    reason: Literal["model_changed", "tools_changed", "input_changed"]


class CacheHit(Struct, frozen=True, tag="cache_hit"):
    """The whole prompt of the response that was compared with was reused."""


class ComparisonResponseNotFound(Struct, frozen=True, tag="comparison_response_not_found"):
    """The server does not remember the response that was to be compared with (any more)."""


class DiagnosticsUnavailable(Struct, frozen=True, tag="unavailable"):
    """No part of the request explains the miss."""


CacheDiagnostics = CacheMiss | CacheHit | ComparisonResponseNotFound | DiagnosticsUnavailable


def cache_diagnostics(found: Diagnostics | None) -> CacheDiagnostics:
    """Why the cache missed the prefix of an earlier response; None: it missed nothing."""
    if found is None:
        return CacheHit()
    match found.cache_miss_reason:
        case PreviousMessageNotFound():
            return ComparisonResponseNotFound()
        case Unavailable():
            return DiagnosticsUnavailable()
        case ModelChanged(missed):
            return CacheMiss(missed, "model_changed")
        case ToolsChanged(missed):
            return CacheMiss(missed, "tools_changed")
        case SystemChanged(missed) | MessagesChanged(missed):
            return CacheMiss(missed, "input_changed")
