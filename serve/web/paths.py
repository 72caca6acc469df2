"""Which route of the API a path means: base URLs are written with the version, without it, or with another path."""

from __future__ import annotations

API_PATHS = (
    "messages",
    "messages/count_tokens",
    "chat/completions",
    "completions",
    "responses",
    "responses/input_tokens",
    "models",
)
VERSION = "v1"


def api_path(path: str) -> str:
    """The path of the route that is meant, such as `/v1/messages` for `//anthropic/v1/v1/messages/`.

    A route of API_PATHS is recognised without its version, and after its last version whatever comes before it. Any
    other path is returned with single slashes, and without one at its end. `path` is decoded, and has no query.
    """
    parts = [part for part in path.split("/") if part not in ("", ".")]
    plain = "/" + "/".join(parts)
    if parts[:2] == [VERSION, "models"]:  # the id of a model may contain anything
        return plain
    version = max((i + 1 for i, part in enumerate(parts) if part == VERSION), default=0)
    route = "/".join(parts[version:])
    is_route = route in API_PATHS or route.startswith("models/")
    return f"/{VERSION}/{route}" if is_route else plain
