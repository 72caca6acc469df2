"""Reading recorded sessions: every field, folders and archives, and files that are broken in each way."""

from __future__ import annotations

import io
import json
import logging
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest

from experiments.workloads.agentx import Trace, read_traces, trace_names


def asked(t: float, ids: list[int], **more: Any) -> dict[str, Any]:
    """A request as a file has it."""
    told = {"type": "n", "model": "m", "out": 9, "stop": "tool_use", "input_types": ["text"], "api_time": 2.5}
    return told | {"t": t, "in": 64 * len(ids) + 10, "hash_ids": ids, "think_time": 4.0} | more


def session(requests: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A file's contents."""
    about = {"models": ["m"], "block_size": 64, "hash_id_scope": "local", "tool_tokens": 100, "system_tokens": 30}
    return {"id": "one"} | about | {"requests": requests} | more


GOOD = session([asked(0, [1, 2]), asked(5, [1, 2, 3])])


def folder(path: Path, **files: Any) -> Path:
    """A folder of files, given as their text or their value."""
    path.mkdir(exist_ok=True)
    for name, value in files.items():
        (path / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def archive(path: Path, files: dict[str, bytes]) -> Path:
    """An archive, packed as its name says."""
    mode = "w:xz" if path.suffix == ".xz" else "w"
    with tarfile.open(path, mode) as file:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    return path


def read(path: Path) -> tuple[list[Trace], list[str]]:
    """The traces of a path and what was said of the others."""
    skipped: list[str] = []
    return list(read_traces(path, skipped.append)), skipped


def test_a_trace_has_every_field_of_its_file(tmp_path: Path) -> None:
    streamed = asked(7, [1, 2, 4], type="s", ttft=1.5, stop="", api_time=None)
    first = asked(0, [1, 2])
    del first["think_time"]
    ((trace,), skipped) = read(folder(tmp_path, a=session([first, streamed])))
    assert not skipped
    assert (trace.file, trace.id, trace.block_size, trace.tool_tokens, trace.system_tokens) == (
        "a.json",
        "one",
        64,
        100,
        30,
    )
    one, two = trace.requests
    assert (one.model, one.t_s, one.input_tokens, one.output_tokens, one.stop) == ("m", 0, 138, 9, "tool_use")
    assert (one.api_time_s, one.ttft_s, one.think_time_s) == (2.5, None, None)
    assert (two.api_time_s, two.ttft_s, two.think_time_s, two.stop) == (None, 1.5, 4.0, "")
    assert two.hash_ids.tolist() == [1, 2, 4]
    assert two.hash_ids.dtype == "int32"
    assert one.agent.head_tokens == 130


def test_sub_agents_are_agents_of_their_own_with_times_since_the_sessions_start(tmp_path: Path) -> None:
    deeper = {"type": "subagent", "agent_id": "x", "t": 2.0, "requests": [asked(1, [9])]}
    sub = {"type": "subagent", "agent_id": "x", "t": 100.0, "tool_tokens": 7, "requests": [asked(0, [7]), deeper]}
    ((trace,), _) = read(folder(tmp_path, a=session([asked(0, [1, 2]), sub, asked(101, [1, 2, 3])])))
    assert [r.t_s for r in trace.requests] == [0, 100, 103, 101]
    main, child, grandchild, again = (r.agent for r in trace.requests)
    assert main == again
    assert (main.id, main.parent, child.id, child.parent, child.tool_tokens) == ("", None, "x", "", 7)
    assert grandchild.parent == "x"
    assert grandchild.id not in ("", "x")


@pytest.mark.parametrize("packed", ["a.tar", "a.tar.xz"])
def test_folders_archives_and_single_files_are_read_alike(tmp_path: Path, packed: str) -> None:
    data = {f"traces/{name}.json": json.dumps(GOOD | {"id": name}).encode() for name in "bac"}
    path = archive(tmp_path / packed, {"LICENSE": b"text", **data})
    found, skipped = read(path)
    assert [trace.id for trace in found] == ["b", "a", "c"]  # as they come: an archive is read once
    assert not skipped
    assert trace_names(path) == ["traces/a.json", "traces/b.json", "traces/c.json"]
    assert [t.id for t in read_traces(path, only={"traces/c.json"})] == ["c"]
    apart = folder(tmp_path / "apart", **{name: GOOD | {"id": name} for name in "bac"})
    assert [trace.id for trace in read(apart)[0]] == ["a", "b", "c"]
    assert [trace.id for trace in read(apart / "b.json")[0]] == ["b"]


LINES = '{"id": "x",\n "requests": [\n%s\n]}'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps(GOOD, indent=1)[:-60], "bad.json, line 39: Input data was truncated"),
        ('{"id": "x",\n"requests": nothing}', "bad.json, line 2: JSON is malformed"),
        ("", "bad.json, line 1: Input data was truncated"),
        ("[1, 2]", "bad.json, line 1: Expected `object`, got `array`"),
        ('{"timestamp": 0, "input_length": 10, "hash_ids": []}', "line 1: Object missing required field `id`"),
        (LINES % f"{json.dumps(asked(0, [1]))},\n{json.dumps(asked(0, [1], out=-1))}", "line 4: request 1: Expected"),
        (LINES % json.dumps(asked(0, [1], type="q")), "line 3: request 0: Invalid value 'q'"),
        (LINES % json.dumps(asked(0, [1], hash_ids=["1"])), "line 3: request 0: Expected `int`, got `str`"),
        (LINES % f"{json.dumps(asked(9, [1]))},\n{json.dumps(asked(8, [1]))}", "line 4: request 1: t is 8.0, expected"),
        (LINES % json.dumps(asked(0, [1], **{"in": 640})), "line 3: request 0: 1 hash_ids, expected 10 for 640 tokens"),
        (
            LINES % f"{json.dumps(asked(0, [1, 2, 3]))},\n{json.dumps(asked(1, [1, 3, 2]))}",
            "line 4: request 1: the hash_ids are out of order: 3 comes behind 1",
        ),
        (LINES % json.dumps(asked(0, [1, 2, 1])), "line 3: request 0: the hash_ids are out of order"),
        (LINES % json.dumps(asked(0, [2**31 - 1])), "an id of 2147483647 among 1"),
        (LINES % json.dumps(asked(0, [2**31])), "line 3: request 0: Expected `int` <= 2147483647"),
        (
            LINES % ('{"type": "subagent", "requests": [\n' + json.dumps(asked(-1, [1])) + "]}"),
            "line 4: request 0.0: Expected `float` >= 0",
        ),
        (LINES % ('{"type": "subagent", "requests": [' * 20_000), "bad.json, line 1: "),
    ],
)
def test_a_broken_file_is_named_with_its_line_and_costs_the_others_nothing(
    tmp_path: Path, text: str, said: str
) -> None:
    found, skipped = read(folder(tmp_path, a=GOOD, bad=text, c=GOOD))
    assert [trace.file for trace in found] == ["a.json", "c.json"]
    assert len(skipped) == 1
    assert said in skipped[0]
    assert skipped[0].endswith("this trace is left out")


@pytest.mark.parametrize("packed", ["a.tar", "a.tar.xz"])
def test_a_cut_archive_gives_what_came_before_the_cut(tmp_path: Path, packed: str) -> None:
    long = GOOD | {"filler": random.Random(0).randbytes(200_000).hex()}
    path = archive(tmp_path / packed, {f"{n}.json": json.dumps(v).encode() for n, v in enumerate([GOOD, long, GOOD])})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    found, skipped = read(path)
    assert [trace.file for trace in found] == ["0.json"]
    assert skipped
    assert all(str(path) in line for line in skipped)


def test_what_is_left_out_is_logged_where_nobody_asks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tokenzero.traces"):
        assert len(list(read_traces(folder(tmp_path, a=GOOD, bad="{")))) == 1
    assert "bad.json, line 1" in caplog.text


def test_a_path_without_a_trace_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no trace could be read, 1 were left out; expected \.json files"):
        read(folder(tmp_path / "b", bad="{"))
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.json")
    (tmp_path / "text.tar").write_text("no archive")
    with pytest.raises(ValueError, match="no trace could be read"):
        read(tmp_path / "text.tar")
