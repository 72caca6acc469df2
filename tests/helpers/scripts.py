"""What the model says in each scripted session of a client, prompt by prompt, in Qwen3's format.

Each prompt has its answers: to the prompt itself, and then to the results of its calls. Clients send calls back as
parsed JSON: without the second space, the escapes and the `.0`.
"""

from __future__ import annotations

import json
from typing import Any

Script = dict[str, tuple[str, ...]]


def call(name: str, **arguments: Any) -> str:
    """A tool call."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


CLAUDE_CODE: Script = {
    "Write the answer into answer.txt.": (
        "<think>\nThe answer is known, the file is missing.\n</think>\n\nI write it.\n"
        '<tool_call>\n{"name": "Bash", "arguments": {"command":  "echo \\u0034\\u0032 > answer.txt", '
        '"timeout": 10000.0, "description": "Write the answer"}}\n</tool_call>',
        "<think>\nNo news is good news.\n</think>\n\nThe answer is in answer.txt.",
    ),
    "Read it back and count its lines.": (
        '<tool_call>\n{"name": "Read", "arguments": {"file_path": "answer.txt"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "Bash", "arguments": {"command": "wc -l answer.txt"}}\n</tool_call>',
        "It says «42», on a line of its own – naïve, but so it is.",
    ),
    "Thank you.": ("<think>\nShort and polite.\n</think>\n\nYou are welcome.",),
}
# A picture and a PDF enter the history, and stay in it.
CLAUDE_CODE_MEDIA: Script = {
    "Look at the picture.": (call("Read", file_path="dot.png"), "I cannot see it."),
    "Read the paper.": (call("Read", file_path="paper.pdf"), "It is about caches."),
    "Go on without them.": ("Gladly.",),
}
# Tools that the client offers only once they were searched for: one of its own, one of an MCP server.
CLAUDE_CODE_DEFERRED: Script = {
    "Find the tool for notebooks.": (call("ToolSearch", query="select:NotebookEdit", max_results=1), "It is there."),
    "Find the tool that adds.": (
        call("ToolSearch", query="select:mcp__demo__add", max_results=1),
        call("mcp__demo__add", a=2, b=40),
        "The sum is 42.",
    ),
    "Thank you for the sum.": ("You are welcome.",),
}
CLAUDE_CODE_SUBAGENT: Script = {
    "Ask a helper.": (
        call("Agent", description="Count", prompt="Count the files here.", subagent_type="general-purpose"),
        "The helper is at work.",
        "The helper has counted.",
    ),
    "Count the files here.": (call("Bash", command="ls | wc -l", description="Count"), "There are none."),
    "And now without a helper.": (call("Bash", command="ls | wc -l", description="Count"), "Still none."),
}
CLAUDE_CODE_PLAN: Script = {
    "Make a plan.": ("The plan is short.",),
    "Carry it out.": (call("Bash", command="echo 42 > plan.txt", description="Write"), "It is done."),
}
CODEX: Script = {
    "Write the number into number.txt.": (
        "<think>\nThe number is known, the file is missing.\n</think>\n\nI write it.\n"
        '<tool_call>\n{"name": "exec_command", "arguments": {"cmd":  "echo \\u0034\\u0032 > number.txt", '
        '"tty": false}}\n</tool_call>',
        "<think>\nNo news is good news.\n</think>\n\nThe number is in number.txt.",
    ),
    "Read it back, and count its lines as well.": (
        '<tool_call>\n{"name": "exec_command", "arguments": {"cmd": "cat number.txt"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "exec_command", "arguments": {"cmd": "wc -l number.txt"}}\n</tool_call>',
        "It says «42», on a line of its own – naïve, but so it is.",
    ),
    "Thanks.": ("<think>\nShort and polite.\n</think>\n\nYou are welcome.",),
}
CODEX_IMAGE: Script = {
    "Look at dot.png.": (call("view_image", path="dot.png"), "I cannot see it."),
    "Count the lines of dot.png.": (call("exec_command", cmd="wc -l dot.png"), "There is one."),
    "Thanks a lot.": ("You are welcome.",),
}
CODEX_MCP: Script = {
    "Add two and forty.": (call("mcp__demo__add", a=2, b=40), "The sum of Codex is 42."),
}
# The other agents: one tool loop each, then a second prompt in the same session.
OPENCODE: Script = {
    "Write a number for opencode.": (
        call("bash", command="echo 42 > number.txt", description="Write"),
        "It is written for opencode.",
    ),
    "Say it again, opencode.": ("It is 42, said opencode.",),
}
PI: Script = {
    "Write a number for pi.": (call("bash", command="echo 42 > number.txt"), "It is written for pi."),
    "Say it again, pi.": ("It is 42, said pi.",),
}
QWEN_CODE: Script = {
    "Write a number for Qwen.": (
        call("run_shell_command", command="echo 42 > number.txt", is_background=False),
        "It is written for Qwen.",
    ),
    "Say it again, Qwen.": ("It is 42, said Qwen.",),
}
# Cline is resumed by the id of a session only.
CLINE: Script = {
    "Write a number for Cline.": (
        call("run_commands", commands=["echo 42 > number.txt"]),
        call("run_commands", commands=["cat number.txt"]),
        "It is written for Cline.",
    )
}
# Agent frameworks: `Add two and forty with NAME.`
FRAMEWORK: Script = {"Add two and forty with": (call("add", a=2, b=40), "The sum of two and forty is 42.")}
ALL: Script = {
    **CLAUDE_CODE,
    **CLAUDE_CODE_MEDIA,
    **CLAUDE_CODE_DEFERRED,
    **CLAUDE_CODE_SUBAGENT,
    **CLAUDE_CODE_PLAN,
    **CODEX,
    **CODEX_IMAGE,
    **CODEX_MCP,
    **OPENCODE,
    **PI,
    **QWEN_CODE,
    **CLINE,
    **FRAMEWORK,
}
