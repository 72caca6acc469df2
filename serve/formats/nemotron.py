"""The format of Nemotron models before Nemotron 3, which writes calls as Qwen3-Coder does: a JSON array in a tag.

https://huggingface.co/nvidia/NVIDIA-Nemotron-Nano-9B-v2
"""

from __future__ import annotations

from serve.formats.format import Format, json_call
from serve.formats.json_calls import read_json_calls
from serve.formats.readers import WHITESPACE, Calls, Source, Tools, read_any, read_closing, read_exactly, read_match

BEGIN, END = "<TOOLCALL>", "</TOOLCALL>"


def read_nemotron(source: Source, tools: Tools) -> Calls:
    """Read an array of calls, or calls without the array. Each is complete at the end of its object."""
    yield from read_exactly(source, BEGIN)
    yield from read_match(source, WHITESPACE)
    if not (yield from read_any(source, "[]", "[ ]")):
        yield from read_json_calls(source, tools, END)
    yield from read_closing(source, END)


NEMOTRON = Format(
    "nemotron",
    call=json_call,
    read=read_nemotron,
    call_openers=(BEGIN,),
    extra_delimiters=(END,),
    before=f"{BEGIN}[",
    between=", ",
    after=f"]{END}",
    text_call_separator="\n\n",
    hints=(BEGIN,),
)
