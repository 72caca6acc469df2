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
# Stripping the preamble repairs a session's turns. What else breaks prompts, and what does each remedy gain? Pairs of
# requests in Claude Code's shape (`experiments/stability.py`), under each rule of `serve/rules/normalize.py`: how much
# of the second prompt does the first one cover, in tokens?

# %%
import json

import numpy as np
from rich.table import Table

from experiments.harness.figures import subplots
from experiments.stability import cases
from experiments.sweep.notebook import MODEL, console, show, sweep
from experiments.sweep.run_folder import cells as medians
from experiments.sweep.run_folder import load, table
from serve.api.messages import CountTokensRequest, decode_count_tokens
from serve.diagnosis.compare import compare, rule_sets
from serve.diagnosis.sections import vocabulary_of
from serve.prompt.render import Prompt, prompt
from serve.prompt.tokenizer import load_tokenizer
from serve.rules.normalize import RULES

tokenizer = load_tokenizer(str(MODEL))
vocabulary = vocabulary_of(tokenizer.hf)

# %% [markdown]
# ## What each rule does, and what the model then reads
#
# Only the first is on by default: it removes a line that is not meant for the model. The others change what the model
# reads, as the table says.

# %%
explained = Table("rule", "what it does", "what the model reads differently")
for name, rule in RULES.items():
    explained.add_row(name, rule.description, rule.reads)
console.print(explained)

# %% [markdown]
# ## What each gains
#
# The share of the second prompt that is covered by the first, with one rule more than the default at a time, and with
# all of them.

# %%


def render(request: CountTokensRequest, tools_first: bool) -> Prompt:
    """A request's prompt."""
    return prompt(request, tokenizer, tools_first=tools_first)


def outcomes(release: str) -> dict[str, dict[str, float]]:
    """The covered share, by case and rule set."""
    shares: dict[str, dict[str, float]] = {}
    for name, case in cases(release).items():
        old, new = (decode_count_tokens(json.dumps(body).encode()) for body in (case.old, case.new))
        found = {rules: compare(old, new, chosen, render, vocabulary) for rules, chosen in rule_sets().items()}
        shares[name] = {rules: outcome.position / max(1, outcome.length) for rules, outcome in found.items()}
    return shares


def heat(release: str) -> None:
    """The shares as a picture."""
    shares = outcomes(release)
    names = list(next(iter(shares.values())))
    values = np.array([[100 * shares[case][name] for name in names] for case in shares])
    figure, axes = subplots(5.2, 9)
    axes.grid(False)
    axes.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=9)
    axes.set_yticks(range(len(shares)), list(shares))
    for (i, j), value in np.ndenumerate(values):
        axes.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value < 60 else "black", fontsize=9)
    axes.set_title(f"Tokens covered by the request before, %: Claude Code {release}", loc="left", fontsize=10)
    show(figure)


heat("2.1.179")

# %%
heat("2.1.331")

# %% [markdown]
# Across folders, the folder's name, early in the system text, comes before all tools: `tools-first` puts the tools,
# which are longer, before it. A late tool, or keys in another order, cost all that follows them until they are sorted.
#
# ## In milliseconds
#
# The same remedies as arms of a sweep (`experiments/configs/arms.toml`): a volatile line at the start (*varying*),
# after the tools (*tools-first*), at the end (*relocated*), or removed (*stripped*).

# %% tags=["results"]
arms = medians(load(sweep("arms")))
chosen = ("stable", "varying", "stripped", "tools-first", "relocated", "mutated-thinking")
console.print(table([cell for cell in arms if cell.point.arm in chosen]))
