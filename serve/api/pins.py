"""Pins on the wire: prefixes that an operator keeps on the device, an extension of the Messages API."""

from msgspec import UNSET, Raw, Struct, UnsetType


class PinRequest(Struct, frozen=True):
    """Body of `POST /v1/cache/pin`: a request, of which tools and system text count; `messages` may be missing."""

    name: str | None = None  # by which the pin is dropped; else one is made
    key: str | None = None  # of --api-key-file, whose requests are to find it
    system: Raw | UnsetType = UNSET
    tools: Raw | UnsetType = UNSET
    messages: Raw | UnsetType = UNSET


class Pin(Struct, frozen=True):
    """A pinned prefix, or why it is none; the answer of `POST /v1/cache/pin`."""

    name: str
    pinned: bool
    tokens: int  # that are on the device, whole pages; 0 for none
    key: str  # whose requests find it; empty for all keys
    tier: str | None  # where it is
    over_restarts: bool  # whether the next server on the same store pins it again
    instead: str | None  # what was done in place of what was asked, and why


class PinList(Struct, frozen=True):
    """The answer of `GET /v1/cache/pins`."""

    data: tuple[Pin, ...]
