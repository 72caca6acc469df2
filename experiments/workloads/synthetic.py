"""Parts of synthetic sessions: sentences, tool definitions, and tool calls on the standard library's files.

Every function draws only from the generator that it is given; `experiments.workloads.sessions` arranges the parts.
"""

import base64
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from experiments.workloads.demo_model import source_files, source_text

Json = dict[str, Any]

# Name: properties, with `!` where required and the type where it is not a string. Order is the order of sending.
TOOLS = {
    "Bash": "command! description timeout:number run_in_background:boolean",
    "Read": "file_path! offset:integer limit:integer",
    "Grep": "pattern! path glob output_mode -n:boolean -C:integer head_limit:integer multiline:boolean",
    "Glob": "pattern! path",
    "Edit": "file_path! old_string! new_string! replace_all:boolean",
    "Write": "file_path! content!",
    "TodoWrite": "todos!:array",
    "Task": "description! prompt! subagent_type! model run_in_background:boolean",
    "WebFetch": "url! prompt!",
    "WebSearch": "query! allowed_domains:array blocked_domains:array",
    "NotebookEdit": "notebook_path! new_source! cell_id cell_type edit_mode",
    "Skill": "skill! args",
    "TaskOutput": "task_id! block:boolean timeout:number",
    "TaskStop": "task_id!",
    "AskUserQuestion": "questions!:array answers:object",
    "EnterPlanMode": "",
    "ExitPlanMode": "plan! allowed_prompts:array",
    "ToolSearch": "query! max_results:integer",
    "EnterWorktree": "name",
    "ExitWorktree": "action! discard_changes:boolean",
    "CronCreate": "cron! prompt! recurring:boolean",
    "CronDelete": "id!",
    "CronList": "",
    "LSP": "operation! file_path! line!:integer character!:integer",
    "Monitor": "command! until timeout:number",
}
ITEMS = {"items": {"type": "object", "properties": {"text": {"type": "string"}}}}

SENTENCES = (
    "Always {v} {n} {r}.",
    "Do not {v} {n} {r}.",
    "If you {v} {n}, also {w} {m} {r}.",
    "{R}, {v} {n} and {w} {m}.",
    "Prefer to {v} {n} {r}; otherwise {w} {m}.",
    "It is better to {v} {n} than to {w} {m} {r}.",
)
VERBS: tuple[str, ...] = ("avoid", "cache", "check", "close", "explain", "inline", "keep", "measure")
VERBS += ("quote", "read", "rename", "replace", "restore", "sort", "split", "trace")
NOUNS: tuple[str, ...] = (
    "the failing test",
    "a public function",
    "the import order",
    "every open file",
    "the type annotation",
)
NOUNS += ("the call site", "the error message", "one small commit", "the parser state", "an unused branch")
NOUNS += ("the return value", "the lock file", "a long docstring", "the event loop", "a shared helper")
NOUNS += ("the default argument", "a cached result", "the working tree", "each changed line", "the public names")
REASONS: tuple[str, ...] = (
    "before anything is written",
    "so that the reader can follow",
    "unless the user asked otherwise",
)
REASONS += ("because callers rely on it", "when two answers are possible", "after the tests have run")
REASONS += ("even if the change looks small", "as long as nothing else moves", "where the file says so")
REASONS += ("instead of guessing", "without touching its neighbours", "once the cause is known")


def prose(rng: random.Random, chars: int) -> str:
    """Plain sentences of close to `chars` characters; the last one is cut between two words."""
    text = ""
    while len(text) <= chars:
        (v, w), (n, m), r = rng.sample(VERBS, 2), rng.sample(NOUNS, 2), rng.choice(REASONS)
        text += rng.choice(SENTENCES).format(v=v, w=w, n=n, m=m, r=r, R=r.capitalize()) + " "
    return text[:chars].rpartition(" ")[0].rstrip(".,;") + "."


def text_block(text: str) -> Json:
    """A text block without a marker."""
    return {"type": "text", "text": text}


def thinking_block(rng: random.Random) -> Json:
    """A thinking block with a signature that looks like one."""
    signature = base64.b64encode(rng.randbytes(180)).decode()
    return {"type": "thinking", "thinking": prose(rng, rng.randint(100, 900)), "signature": signature}


def tool(rng: random.Random, name: str, chars: int) -> Json:
    """One tool of about `chars` characters of JSON; its description fills what the schema leaves."""
    words = [word.partition(":") for word in TOOLS[name].split()]
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            key.rstrip("!"): {"description": prose(rng, 40), "type": kind or "string"}
            | (ITEMS if kind == "array" else {})
            for key, _, kind in words
        },
        "required": [key.rstrip("!") for key, _, _ in words if key.endswith("!")],
        "additionalProperties": False,
    }
    rest = len(json.dumps({"name": name, "description": "", "input_schema": schema}))
    return {"name": name, "description": prose(rng, max(60, chars - rest)), "input_schema": schema}


def tool_call(rng: random.Random, folder: str) -> tuple[Json, Json]:
    """A tool_use block and its tool_result: a stretch of a library file, read, searched or printed by a shell."""
    path = rng.choice(_long_files())
    lines = _lines(path)
    # The library plays the project: its files appear under the session's folder.
    shown = f"{folder}/{path.parent.name}/{path.name}"
    offset, limit = rng.randint(1, max(1, len(lines) - 60)), rng.randint(60, 220)
    window = list(enumerate(lines, 1))[offset - 1 : offset - 1 + limit]
    name = rng.choices(("Read", "Grep", "Bash"), (6, 2, 2))[0]
    if name == "Read":
        arguments: Json = {"file_path": shown, "offset": offset, "limit": limit}
        output = [f"{number:>6}\t{line}" for number, line in window]
    elif name == "Grep":
        word = rng.choice(("def ", "return ", "import ", "raise ", "self"))
        arguments = {"pattern": word, "path": shown, "output_mode": "content", "-n": True, "head_limit": limit}
        output = [f"{number}:{line}" for number, line in enumerate(lines, 1) if word in line][:limit]
    else:
        arguments = {"command": f"sed -n '{offset},{offset + limit - 1}p' {shown}", "description": "Print some lines"}
        output = [line for _, line in window]
    use = {"type": "tool_use", "id": f"toolu_{rng.getrandbits(96):024x}", "name": name, "input": arguments}
    content = "\n".join(output) or "No matches found"
    return use, {"type": "tool_result", "tool_use_id": use["id"], "content": content}


@cache
def _long_files() -> tuple[Path, ...]:
    return tuple(path for path in source_files() if path.stat().st_size > 8_000)


@cache
def _lines(path: Path) -> tuple[str, ...]:
    return tuple(source_text(path).splitlines())
