"""The process that extracts the text layer of one PDF: bytes on standard input, JSON on standard output.

It runs as a file of its own, so that it imports nothing of this project, and ends at its limits whatever the PDF does.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
from io import BytesIO

CPU_SECONDS = 20
MEMORY_BYTES = 2**30
MAX_PAGES = 500
MAX_CHARS = 2**21


def main() -> None:
    """Write {"text": ...} for a PDF that can be read, or {"reason": ...} for another."""
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable()
    try:
        answer = extract(sys.stdin.buffer.read())
    except MemoryError:
        answer = {"reason": "it takes too much memory to read"}
    except Exception:  # whatever a damaged file does to its reader
        answer = {"reason": "it is damaged"}
    print(json.dumps(answer))


def extract(data: bytes) -> dict[str, str]:
    """The text of all pages, separated by blank lines, or the reason why there is none."""
    from pypdf import PdfReader
    from pypdf.errors import DependencyError

    reader = PdfReader(BytesIO(data))
    try:
        if reader.is_encrypted and not reader.decrypt(""):
            return {"reason": "it is encrypted"}
    except (DependencyError, NotImplementedError):  # a cipher that needs another package
        return {"reason": "it is encrypted"}
    if len(reader.pages) > MAX_PAGES:
        return {"reason": f"it has {len(reader.pages)} pages, at most {MAX_PAGES} are read"}
    pages, chars = [], 0
    for page in reader.pages:
        text = page.extract_text().strip()
        chars += len(text)
        if chars > MAX_CHARS:
            return {"reason": f"its text has over {MAX_CHARS:,} characters"}
        pages.append(text)
    text = "\n\n".join(filter(None, pages))
    # Half a surrogate pair is no text.
    return {"text": text.encode("utf-8", "replace").decode()} if text else {"reason": "it has no text layer"}


if __name__ == "__main__":
    main()
