"""The bytes of GGUF files: read as the `gguf` package reads them, and refused in a line that says where they end."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from model.formats.gguf_file import is_gguf, read_gguf


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with fields of every kind and three tensors."""
    path = tmp_path / "some.gguf"
    writer = GGUFWriter(path, "llama")
    for kind, value in (("uint8", 200), ("int8", -3), ("uint16", 60_000), ("int16", -300), ("uint32", 2**31)):
        getattr(writer, f"add_{kind}")(f"a.{kind}", value)
    writer.add_uint64("a.uint64", 2**40)
    writer.add_float32("a.float32", 1e-5)
    writer.add_float64("a.float64", 1 / 3)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "naïve 日本")
    writer.add_array("a.texts", ["x", "", "ß"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_key_value("a.floats", [0.5, -1.5], GGUFValueType.ARRAY, GGUFValueType.FLOAT32)
    writer.add_tensor("one", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("two", np.arange(4, dtype=np.float16))
    writer.add_tensor("three", np.zeros((2, 34), np.uint8), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_fields_and_tensors_are_those_that_the_package_reads(path: Path) -> None:
    found, reader = read_gguf(path), GGUFReader(path)
    for name, field in reader.fields.items():
        if name.startswith("GGUF."):
            continue
        value = found.metadata[name]
        expected = field.contents()
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == pytest.approx(expected), name
    assert found.metadata["a.float32"] == 1e-5  # and not the float64 of its float32
    assert found.metadata["a.texts"] == ["x", "", "ß"]
    for tensor in reader.tensors:
        stored = found.tensors[tensor.name]
        assert stored.shape == tuple(reversed(tensor.shape.tolist()))
        assert stored.kind == tensor.tensor_type
        np.testing.assert_array_equal(stored.data, tensor.data.view(np.uint8).reshape(-1))


def test_a_file_that_is_cut_anywhere_says_so_in_a_line(path: Path) -> None:
    whole = path.read_bytes()
    for length in [0, 3, 4, 8, 23, *range(24, len(whole) - 64, 7), len(whole) - 33]:
        cut = path.with_name("cut.gguf")
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf .*download it again") as error:
            read_gguf(cut)
        assert "\n" not in str(error.value)
        cut.unlink()


@pytest.mark.parametrize(
    ("at", "new", "message"),
    [
        (0, b"GGML", r"begins with b'GGML', expected b'GGUF'"),
        (4, struct.pack("<I", 9), r"has GGUF version 9, supported are \(2, 3\)"),
        (8, struct.pack("<Q", 2**60), "ends within|download it again"),
        (16, struct.pack("<Q", 2**60), "ends within|has type|not UTF-8"),
    ],
)
def test_what_the_first_bytes_must_be(path: Path, at: int, new: bytes, message: str) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(new)] = new
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_gguf(path)


def test_flipped_bytes_of_a_header_raise_nothing_else(path: Path) -> None:
    data, rng = path.read_bytes(), np.random.default_rng(0)
    refusals = []
    for number in range(300):
        spoiled = bytearray(data)
        for at in rng.integers(0, 700, 3):
            spoiled[at] = rng.integers(0, 256)
        other = path.with_name(f"spoiled-{number}.gguf")
        other.write_bytes(spoiled)
        try:
            read_gguf(other)
        except ValueError as error:
            refusals.append((other.name, str(error)))
    assert len(refusals) > 100
    assert all(name in message and "\n" not in message for name, message in refusals)


def test_a_tensor_type_that_ggml_has_not_is_named(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = data.index(b"\x03\x00\x00\x00\x00\x00\x00\x00one") + 8 + 3 + 4 + 16
    data[at : at + 4] = struct.pack("<I", 77)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="one has tensor type 77, known are 0 to"):
        read_gguf(path)


def test_a_source_is_a_file_by_its_name() -> None:
    assert is_gguf("a/b.gguf")
    assert is_gguf(Path("b.gguf"))
    assert not is_gguf("a/gguf")
