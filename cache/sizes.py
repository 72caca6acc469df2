"""Sizes in bytes as people write and read them, for the command lines."""

import argparse
import re

UNITS = {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str) -> int:
    """`4GB`, `512 MiB` or a plain number of bytes: a `type` for argparse, whose ArgumentTypeError it raises."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(f"expected a size such as 4GB or 512MiB, got {text!r}")
    return int(float(match[1]) * UNITS[match[2].upper()])


def show_bytes(count: int) -> str:
    """A size with one decimal: 1.5 MiB."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
