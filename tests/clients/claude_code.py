"""Sessions of Claude Code, headless: one prompt after another, and what the client printed."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.table import Table

Json = dict[str, Any]


@dataclass(frozen=True)
class Session:
    """What the client printed, prompt by prompt, and the folder that it worked in."""

    folder: Path
    runs: list[list[Json]]

    @property
    def usages(self) -> list[Json]:
        """The server's usage of each request of the main agent, in order."""
        printed = [e for run in self.runs for e in run if e["type"] == "stream_event" and not e["parent_tool_use_id"]]
        return [e["event"]["usage"] for e in printed if e["event"]["type"] == "message_delta"]

    @property
    def results(self) -> list[str]:
        """The last answer to each prompt."""
        return [run[-1]["result"] for run in self.runs]

    @property
    def failed(self) -> bool:
        """Whether the client gave up on a prompt."""
        return any(run[-1]["is_error"] for run in self.runs)

    def blocks(self, kind: str) -> list[Json]:
        """The blocks of a kind that the client printed: what the model said, and what its tools returned."""
        printed = [e["message"]["content"] for run in self.runs for e in run if e["type"] in ("assistant", "user")]
        return [block for content in printed if isinstance(content, list) for block in content if block["type"] == kind]


def hold(
    program: Path,
    url: str,
    folder: Path,
    prompts: Iterable[str],
    headers: str = "",
    tools: str = "Bash,Read",
    flags: Sequence[Sequence[str]] = (),
) -> Session:
    """Type the prompts one after another, in a session isolated from this machine's user.

    `tools` may run unasked. `flags` has more flags for each prompt, in order; prompts beyond it get none.
    """
    home, work, session = folder / "home", folder / "work", str(uuid.uuid4())
    home.mkdir()
    work.mkdir(exist_ok=True)
    environment = {
        "HOME": str(home),
        "PATH": os.defpath,
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_API_KEY": "any",
        "ANTHROPIC_CUSTOM_HEADERS": headers,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_MAX_RETRIES": "0",
        "DISABLE_AUTOUPDATER": "1",
        "DISABLE_ERROR_REPORTING": "1",
        "DISABLE_TELEMETRY": "1",
    }
    how = ["--output-format", "stream-json", "--include-partial-messages", "--verbose", "--allowed-tools", tools]
    runs: list[list[Json]] = []
    for prompt in prompts:
        more = flags[len(runs)] if len(runs) < len(flags) else ()
        resumed = "--resume" if runs else "--session-id"
        command = [str(program), "-p", prompt, "--model", "any-model", resumed, session, *how, *more]
        done = subprocess.run(
            command, cwd=work, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        runs.append([json.loads(line) for line in done.stdout.splitlines()])
    return Session(work, runs)


def prompt_tokens(usage: Json) -> int:
    """The sum of the three input counts of a usage."""
    return usage["input_tokens"] + usage["cache_creation_input_tokens"] + usage["cache_read_input_tokens"]


def shares(usages: list[Json]) -> list[float]:
    """From the second request on: tokens read, as a share of the prompt before."""
    return [after["cache_read_input_tokens"] / prompt_tokens(before) for before, after in pairwise(usages)]


def table(title: str, usages: list[Json]) -> Table:
    """The requests of a session."""
    shown = Table("request", "prompt tokens", "read", "of the prompt before", title=title)
    for i, (usage, share) in enumerate(zip(usages, [None, *shares(usages)], strict=True), 1):
        counts = (prompt_tokens(usage), usage["cache_read_input_tokens"])
        shown.add_row(str(i), *(f"{count:,}" for count in counts), "" if share is None else f"{share:.2%}")
    return shown
