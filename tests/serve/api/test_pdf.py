"""The text layer of PDFs: what is read, why something is not, and that a hostile file costs a bound and no more."""

import base64
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from serve.api import pdf as pdf_module
from serve.api.messages import decode_request
from serve.api.pdf import PdfText, pdf_text, reading_time
from serve.prompt.conversation import block_text
from tests.helpers.http import encoded
from tests.helpers.pdfs import pdf


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    pdf_module.remembered.clear()


def test_the_text_of_all_pages_is_read() -> None:
    data = pdf("The first page", "", "The last one")
    assert pdf_text(data) == PdfText("The first page\n\nThe last one")
    assert pdf_text(f"data:application/pdf;base64,{data}") == pdf_text(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (pdf("", ""), "it has no text layer"),
        (pdf("secret", password="x"), "it is encrypted"),
        (base64.b64encode(b"%PDF-1.4\n").decode(), "it is damaged"),
        (pdf("text")[:400], "it is damaged"),
        ("JVBERi0", "its data is not Base64"),
        ("", "it is damaged"),
        (pdf(*[""] * 501), "it has 501 pages, at most 500 are read"),
    ],
)
def test_the_reason_is_given_where_there_is_no_text(data: str, reason: str) -> None:
    assert pdf_text(data) == PdfText(reason=reason)


def test_a_file_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pdf("once")
    assert pdf_text(data).text == "once"
    monkeypatch.setattr(pdf_module, "in_process", None)
    assert pdf_text(data).text == "once"


def in_a_document(*files: str) -> dict[str, Any]:
    sources = [{"type": "base64", "media_type": "application/pdf", "data": data} for data in files]
    blocks = [{"type": "document", "title": "T", "source": source} for source in sources]
    result = {"type": "tool_result", "tool_use_id": "a", "content": blocks}
    return {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": [result]}]}


def test_a_pdf_in_a_tool_result_is_a_document_with_its_text() -> None:
    result: Any = decode_request(encoded(in_a_document(pdf("Hello"), pdf("")))).messages[0].content[0]
    size = len(base64.b64decode(pdf("")))
    assert [block_text(block) for block in result.content] == [
        "T\nHello",
        f"T\n[document: it has no text layer (application/pdf, {size:,} bytes)]",
    ]


@pytest.mark.parametrize("program", ["import time; time.sleep(60)", "while True: pass", "print('no JSON')", "1 / 0"])
def test_a_file_that_takes_too_long_or_kills_its_reader_costs_a_bound(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hostile.py").write_text(program)
    monkeypatch.setattr(pdf_module, "PROCESS", tmp_path / "hostile.py")
    monkeypatch.setattr(pdf_module, "FILE_SECONDS", 0.5)
    assert pdf_text(pdf("text")) == PdfText(reason="it takes too long to read")


def test_the_files_of_a_request_share_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(pdf_module, "PROCESS", tmp_path / "slow.py")
    monkeypatch.setattr(pdf_module, "FILE_SECONDS", 0.3)
    start = time.monotonic()
    with reading_time(0.5):
        found = [pdf_text(pdf(str(n))) for n in range(50)]
    assert time.monotonic() - start < 20
    assert found[-1] == PdfText(reason=pdf_module.BUSY)


def test_a_file_that_had_to_wait_is_read_by_the_next_request() -> None:
    data = pdf("late")
    with reading_time(0):
        assert pdf_text(data).reason == pdf_module.BUSY
    assert pdf_text(data).text == "late"


def test_few_requests_wait_for_slow_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(pdf_module, "PROCESS", tmp_path / "slow.py")
    monkeypatch.setattr(pdf_module, "FILE_SECONDS", 1.5)

    with ThreadPoolExecutor(30) as threads:
        found = list(threads.map(lambda n: pdf_text(pdf(str(n))).reason, range(30)))
    held = pdf_module.PROCESSES + pdf_module.MOST_WAITING
    assert found.count(pdf_module.BUSY) >= len(found) - held, "threads are left for other requests"
