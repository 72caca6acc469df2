"""The dashboard's files, read once: plain HTML, CSS and JavaScript modules, served as they are."""

from __future__ import annotations

from importlib.resources import files
from typing import NamedTuple

MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
PAGE = "/dashboard/index.html"
ASSET_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Asset(NamedTuple):
    """A file's content and its media type."""

    content: bytes
    media_type: str


ASSETS = {
    f"/dashboard/{file.name}": Asset(file.read_bytes(), MEDIA_TYPES[file.name.rpartition(".")[2]])
    for file in sorted(files("serve.web").joinpath("dashboard").iterdir(), key=lambda file: file.name)
}
