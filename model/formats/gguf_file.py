"""A GGUF file as it lies on disk: its metadata, and its tensors mapped into memory. No model, and no JAX.

The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package has a reader as well, which
makes an array of each string: a vocabulary of 49,152 tokens takes it two seconds, and torn files raise what numpy does.
"""

from __future__ import annotations

import math
import struct
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from gguf.constants import GGMLQuantizationType

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT = 32  # of tensors, in bytes, where `general.alignment` says nothing
MOST_DIMENSIONS = 4
SETTLED = 10**9  # nanoseconds after which another version of a file has another time of its own
FLOAT32, STRING, ARRAY = 6, 8, 9
# Types of metadata by number, as struct writes them.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class StoredTensor(NamedTuple):
    """A tensor as a file has it."""

    shape: tuple[int, ...]  # outputs before inputs, as everywhere here; the file has the axes in the other order
    kind: GGMLQuantizationType
    data: np.ndarray  # [bytes] uint8; read from the disk when it is used


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file holds."""

    path: Path
    metadata: dict[str, Any]  # strings, numbers, booleans, lists of strings, arrays of numbers
    tensors: dict[str, StoredTensor]

    def value(self, field: str, kind: type, default: Any = None) -> Any:
        """A field of the metadata. Raises ValueError if it is missing and has no default, or is of another type."""
        found = self.metadata.get(field, default)
        if found is None:
            raise ValueError(f"{self.path}: the metadata has no {field}: convert the checkpoint again")
        if kind is float and isinstance(found, int) and not isinstance(found, bool):
            found = float(found)
        if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
            raise ValueError(
                f"{self.path}: {field} is a {type(found).__name__}, expected {kind.__name__}: convert it again"
            )
        return found


def is_gguf(source: str | Path) -> bool:
    """Whether a checkpoint's source is a GGUF file, by its name."""
    return str(source).endswith(".gguf")


def read_gguf(path: str | Path) -> GgufFile:
    """Read the header of a file, and map its tensors; of the last file, what was read is kept.

    Raises FileNotFoundError, and ValueError in a line that names file and field for a file that is no GGUF file, is
    torn, or has a type of metadata or of tensors that GGUF has not.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file, expected a GGUF file: check the path")
    about = path.stat()
    if about.st_size < len(MAGIC):
        raise ValueError(f"{path} has {about.st_size} bytes, expected a GGUF file: download it again")
    read = _read if time.time_ns() - about.st_mtime_ns > SETTLED else _read.__wrapped__
    return read(path, (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns))


@lru_cache(maxsize=1)
def _read(path: Path, version_on_disk: tuple[int, ...]) -> GgufFile:
    """The same of one version of a file, which readers of config, weights and tokenizer ask for one after the other."""
    header = _Header(path, np.memmap(path, np.uint8, "r"))
    magic = header.take(len(MAGIC), "the magic")
    if magic != MAGIC:
        raise ValueError(f"{path} begins with {magic!r}, expected {MAGIC!r}: it is no GGUF file")
    version = header.number("I", "the version")
    if version not in VERSIONS:
        raise ValueError(f"{path} has GGUF version {version}, supported are {VERSIONS}: convert it again")
    tensors, fields = header.number("Q", "the number of tensors"), header.number("Q", "the number of fields")
    metadata: dict[str, Any] = {}
    for number in range(fields):
        name = header.text(f"the name of field {number}")
        metadata[name] = header.value(header.number("I", f"the type of {name}"), name)
    infos = [header.tensor_info(number) for number in range(tensors)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment % 8:
        raise ValueError(f"{path}: general.alignment is {alignment!r}, expected a multiple of 8: convert it again")
    begin = -(-header.at // alignment) * alignment
    found = {info.name: _map(header, begin, info) for info in infos}
    if len(found) < tensors:
        raise ValueError(f"{path} has {tensors} tensors of {len(found)} names, expected as many: convert it again")
    return GgufFile(path, metadata, found)


class _Info(NamedTuple):
    """What the header says of a tensor."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int  # bytes from the start of the first tensor


class _Header:
    """A file's bytes, and how far they are read."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path, self.data, self.bytes, self.at = path, data, data.data, 0

    def take(self, count: int, what: str) -> bytes:
        """The next bytes. Raises ValueError where the file ends before."""
        if count > len(self.bytes) - self.at:
            raise ValueError(
                f"{self.path} ends within {what}: it has {len(self.bytes)} bytes, expected at least "
                f"{self.at + count}: download it again"
            )
        taken = self.bytes[self.at : self.at + count].tobytes()
        self.at += count
        return taken

    def number(self, kind: str, what: str) -> Any:
        """A number of one of struct's kinds."""
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}"), what))[0]

    def text(self, what: str) -> str:
        """A string. Raises ValueError for one that is not UTF-8."""
        try:
            return self.take(self.number("Q", what), what).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: {what} is not UTF-8 ({error}): download it again") from error

    def value(self, kind: int, name: str) -> Any:
        """The value of a field. Arrays of numbers are arrays, those of strings lists."""
        if kind == STRING:
            return self.text(name)
        if kind == FLOAT32:
            # The shortest decimal with this float32: 1e-05, as config.json had it, and not 9.999999747378752e-06.
            return float(str(np.float32(self.number("f", name))))
        if kind in SCALARS:
            return self.number(SCALARS[kind], name)
        if kind != ARRAY:
            raise ValueError(f"{self.path}: {name} has type {kind}, expected one of GGUF's 0 to 12: download it again")
        inner, count = self.number("I", name), self.number("Q", name)
        if inner == STRING:
            return self._texts(self._within(count, 8, name), name)
        if inner not in SCALARS:
            raise ValueError(f"{self.path}: {name} is an array of type {inner}, expected strings or numbers")
        item = np.dtype(SCALARS[inner]).newbyteorder("<")
        return np.frombuffer(self.take(self._within(count, item.itemsize, name) * item.itemsize, name), item)

    def _texts(self, count: int, name: str) -> list[str]:
        """Strings that follow each other: a vocabulary has 100,000, so they are read by one loop."""
        at, end, found = self.at, len(self.bytes), []
        length = struct.Struct("<Q").unpack_from
        for number in range(count):
            start = at + 8
            at = start + length(self.bytes, at)[0] if start <= end else end + 1
            if at > end:
                raise ValueError(
                    f"{self.path} ends within item {number} of {name}: it has {end} bytes, expected {count} items: "
                    "download it again"
                )
            try:
                found.append(str(self.bytes[start:at], "utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{self.path}: item {number} of {name} is not UTF-8: download it again") from error
        self.at = at
        return found

    def _within(self, count: int, least: int, name: str) -> int:
        """The count of items of at least so many bytes, if the file can have as many."""
        if count * least > len(self.bytes) - self.at:
            raise ValueError(
                f"{self.path} ends within {name}: it has {len(self.bytes)} bytes, expected {count} items there: "
                "download it again"
            )
        return count

    def tensor_info(self, number: int) -> _Info:
        """What the header says of one tensor."""
        name = self.text(f"the name of tensor {number}")
        dimensions = self.number("I", f"the shape of {name}")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"{self.path}: {name} has {dimensions} axes, expected 1 to 4: download it again")
        shape = tuple(self.number("Q", f"the shape of {name}") for _ in range(dimensions))
        if not all(shape):
            raise ValueError(f"{self.path}: {name} has shape {shape[::-1]}, expected no zeros: download it again")
        kind = self.number("I", f"the type of {name}")
        return _Info(name, shape[::-1], kind, self.number("Q", f"the offset of {name}"))


def _map(header: _Header, begin: int, info: _Info) -> StoredTensor:
    """The bytes of a tensor. Raises ValueError for an unknown type, a row of broken blocks, and a torn file."""
    # Imported late: it takes 0.15 s, and whoever asks `is_gguf` may have no use for it.
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    path, name = header.path, info.name
    try:
        kind = GGMLQuantizationType(info.kind)
    except ValueError as error:
        known = f"0 to {max(GGMLQuantizationType):d}"
        raise ValueError(f"{path}: {name} has tensor type {info.kind}, known are {known}: convert it again") from error
    block, size = GGML_QUANT_SIZES[kind]
    if info.shape[-1] % block:
        raise ValueError(
            f"{path}: {name} has rows of {info.shape[-1]} values, expected a multiple of {block} for {kind.name}"
        )
    start, length = begin + info.offset, math.prod(info.shape) // block * size
    if start + length > len(header.data):
        raise ValueError(
            f"{path} ends within {name}: it has {len(header.data)} bytes, expected at least {start + length}: "
            "download it again"
        )
    return StoredTensor(info.shape, kind, header.data[start : start + length])
