# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Beyond the header
#
# Stripping the preamble repairs a session's turns. What breaks prompts beside it, and what does each remedy buy? Pairs
# of requests in Claude Code's shape, under each rule of `serve/normalize.py`: how much of the second prompt does the
# first one cover, in tokens?

# %%
import json
import re
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
from rich.table import Table

from experiments.plot import subplots
from experiments.reading import MODEL, console, sweep
from experiments.runs import cells, load
from experiments.sessions import Session, request
from experiments.sweep import table
from serve.diagnose import compare, rule_sets
from serve.messages import decode_request
from serve.normalize import RULES
from serve.render import load_tokenizer, prompt
from serve.sections import vocabulary_of

tokenizer = load_tokenizer(str(MODEL))
vocabulary = vocabulary_of(tokenizer.hf)


def session(release: str, seed: int = 1, folder: str = "/home/dev/project") -> Session:
    """One of a user's sessions."""
    return Session(seed=seed, release=release, kin="one user", folder=folder)


def reordered(body: dict) -> dict:
    """The same request with its last tool first, as if a tool server had come up late."""
    *others, last = body["tools"]
    return body | {"tools": [last, *others]}


def reshuffled(body: dict) -> dict:
    """The same request with the keys of its tools' schemas in another order."""
    tools = [tool | {"input_schema": dict(reversed(tool["input_schema"].items()))} for tool in body["tools"]]
    return body | {"tools": tools}


def dated(body: dict) -> dict:
    """The same request on another day."""
    return json.loads(re.sub(r"Date: [^\\\"]+", "Date: 2027-01-01", json.dumps(body)))


def counted(body: dict, left: int) -> dict:
    """The same request with a countdown of tokens in its system text, as some clients keep one."""
    first, *rest = body["system"]
    return body | {"system": [first, {"type": "text", "text": f"<total_tokens>{left} left</total_tokens>"}, *rest]}


CASES: dict[str, Callable[[str], tuple[dict, dict]]] = {
    "next turn": lambda r: (request(session(r), 0), request(session(r), 1)),
    "other prompt": lambda r: (request(session(r), 0), request(session(r, seed=2), 0)),
    "other folder": lambda r: (request(session(r), 0), request(session(r, folder="/srv/other"), 0)),
    "another day": lambda r: (request(session(r), 0), dated(request(session(r), 0))),
    "token countdown": lambda r: (counted(request(session(r), 0), 9000), counted(request(session(r), 0), 8000)),
    "tools reordered": lambda r: (request(session(r), 0), reordered(request(session(r), 0))),
    "schema keys reordered": lambda r: (request(session(r), 0), reshuffled(request(session(r), 0))),
}

# %% [markdown]
# ## What each rule does, and what the model then reads
#
# Only the first is on by default: it removes what nobody meant the model to read. The others change what it reads, and
# say so.

# %%
explained = Table("rule", "what it does", "what the model reads differently")
for name, rule in RULES.items():
    explained.add_row(name, rule.description, rule.reads)
console.print(explained)

# %% [markdown]
# ## What each buys
#
# The share of the second prompt that is covered by the first, with one rule more than the default at a time, and with
# all of them.

# %%


def outcomes(release: str) -> dict[str, dict[str, float]]:
    """The covered share, by case and rule set."""
    shares: dict[str, dict[str, float]] = {}
    for case, pair in CASES.items():
        old, new = (decode_request(json.dumps(body).encode()) for body in pair(release))
        found = {
            name: compare(
                old,
                new,
                rules,
                lambda asked, tools_first: prompt(asked, tokenizer, tools_first=tools_first),
                vocabulary,
            )
            for name, rules in rule_sets().items()
        }
        shares[case] = {name: outcome.position / max(1, outcome.length) for name, outcome in found.items()}
    return shares


def heat(release: str) -> None:
    """The shares as a picture."""
    shares = outcomes(release)
    names = list(next(iter(shares.values())))
    values = np.array([[100 * shares[case][name] for name in names] for case in shares])
    _, axes = subplots(4.4, 9)
    axes.grid(False)
    axes.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=9)
    axes.set_yticks(range(len(shares)), list(shares))
    for (i, j), value in np.ndenumerate(values):
        axes.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value < 60 else "black", fontsize=9)
    axes.set_title(f"Tokens covered by the request before, %: Claude Code {release}", loc="left", fontsize=10)
    plt.show()


heat("2.1.179")

# %%
heat("2.1.331")

# %%
heat("2.1.80")

# %% [markdown]
# Across folders, the folder's name early in the system text is in front of all tools: `tools-first` puts the tools, the
# larger part, ahead of it. A tool that comes late, or keys in another order, cost all that follows them until they are
# sorted.
#
# ## In milliseconds
#
# The same remedies as arms of a sweep (`experiments/configs/arms.toml`): a volatile line in front (*varying*), behind
# the tools (*tools-first*), at the end (*relocated*), or gone (*stripped*).

# %%
arms = cells(load(sweep("arms")))
chosen = ("stable", "varying", "stripped", "tools-first", "relocated", "mutated-thinking")
console.print(table([cell for cell in arms if cell.point.arm in chosen]))
