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
# # In the wild: what recorded agents ask of a prefix cache
#
# The other notebooks measure synthetic sessions. Here are 710 recorded sessions of Claude Code against the vendor's
# API, with 49,334 requests: lengths, times and hashes of blocks of 64 tokens, no text. They are those of
# [kv-cache-tester](https://github.com/callanjfox/kv-cache-tester) at commit 94f6046 (Apache-2.0), without the 29
# largest files. To count them anew, clone that repository and name its folder of traces, or an archive of it:
#
# ```sh
# python -m experiments.wild kv-cache-tester/traces     # 35 s of one core, 110 MB
# ```
#
# This notebook reads what the command wrote (`experiments/results/wild/`), and needs no traces.

# %%
import json
from pathlib import Path

from IPython.display import Image, display
from rich.table import Table

from experiments.sweep.notebook import console

RESULTS = Path("experiments/results/wild")


def columns(*names: str) -> Table:
    """A plain table whose first column is text."""
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left")
    return table


def picture(name: str) -> None:
    """Show a figure of the results."""
    display(Image(RESULTS / name, width=900))


# %% [markdown]
# ## What can be reused
#
# An unlimited cache for each session and model. Tools and system text that two sessions share cannot be seen, as ids
# mean something within one session only.

# %% tags=["results"]
found = json.loads(Path("experiments/results/wild/summary.json").read_text())
overall = found["overall"]
table = columns("all requests", "")
low, middle, high = overall["hit_rate_by_call"]
for name, value in (
    ("sessions", f"{overall['sessions']:,}"),
    ("requests", f"{overall['requests']:,}"),
    ("of these, of sub-agents", f"{overall['requests_of_subagents']:,}"),
    ("prompt tokens", f"{overall['tokens'] / 1e9:.2f}G"),
    ("prompt tokens, median and 90%", "{1:,.0f}, {2:,.0f}".format(*overall["prompt_tokens_q10_50_90_99"])),
    ("reused", f"{overall['reused']:.1%}"),
    ("reads per write", f"{overall['reads_per_write']:.1f}"),
    ("hit rate by call, from a session's second on: 5, 50, 95%", f"{low:.1%}, {middle:.1%}, {high:.1%}"),
    ("pause after tool_use, median and 90%", "{:,.0f} s, {:,.0f} s".format(*overall["idle_s_after_tool_use_q50_90"])),
    ("pause after end_turn, median and 90%", "{:,.0f} s, {:,.0f} s".format(*overall["idle_s_after_end_turn_q50_90"])),
):
    table.add_row(name, value)
console.print(table)

# %% [markdown]
# ## Why a request computes tokens
#
# Each request is compared with the agent's prompt before it to the same model. It *appends* if it extends that one; it
# is a *branch* if it extends an older one; after a *compaction* it has under 60% of that one's length. Anything else is
# a *break*: *in the head*, where tools or system text changed; *behind the head*, within 1,500 tokens of their end; or
# *later*. A *model switch* is a first request to a model whose text another model has seen.
#
# Time is by two cost models: an 8B llama in bfloat16 on an H200 (constants and their source:
# `experiments/configs/routing.toml`), and the demo model on two cores (notebook 01), far beyond the 24,576 tokens that
# it was fitted to.

# %% tags=["results"]
table = columns(
    "cause", "requests", "of all", "of computed tokens", "of the H200's time", "of the demo's", "ms, H200: 50, 90%"
)
for each in found["causes"]:
    shares = ("share_of_requests", "share_of_new_tokens", "share_of_h200_s", "share_of_demo_s")
    ms = "{:,.0f}, {:,.0f}".format(*each["h200_ms_q50_90"])
    table.add_row(each["cause"], f"{each['requests']:,}", *(f"{each[name]:.2%}" for name in shares), ms)
console.print(table)
picture("causes.png")

# %% [markdown]
# Nineteen requests in twenty append, and cost little more than a third. One in a hundred breaks at the head or behind
# it, and costs a quarter. That is the thesis of this project, with its place corrected: a version line at token zero is
# the worst case, while what breaks prompts in the wild mostly sits behind tools and system text, where the first user
# message begins. Over half of a first request's cost is in sessions that began with a long history, as resumed ones do.
#
# ## Where prompts break

# %% tags=["results"]
large = found["breaks"]["large"]
console.print(f"breaks: {found['breaks']['requests']:,}")
console.print(
    f"lose over 8,000 tokens of the old prompt: {large['requests']}, {large['share_of_requests']:.2%} of requests, "
    f"{large['share_of_new_tokens']:.1%} of computed tokens"
)
console.print(f"of these within 1,500 tokens of the end of tools and system text: {large['near_end_of_head']}")
console.print(
    "change of length at them, quartiles: {:+,.0f}, {:+,.0f}, {:+,.0f} tokens".format(*large["change_tokens_q25_50_75"])
)
console.print("pause before them, 50, 75, 90%: {:,.0f}, {:,.0f}, {:,.0f} s".format(*large["idle_s_q50_75_90"]))
picture("breaks.png")

# %% [markdown]
# The length hardly changes at a large break, so nearly the same text comes again behind the place where it broke. An
# engine that could go on from there would save most of it; a prefix cache has to compute it.
#
# ## What comes before a break
#
# The longer the pause, the likelier a break: one in 200 within a minute, two in five after an hour. The data does not
# say what changed; a client that starts anew may send other text about the day, the folder or the repository. Length
# makes little difference.

# %%
picture("before_a_break.png")

# %% [markdown]
# ## The price of granularity
#
# Engines reuse whole blocks: 16 tokens in vLLM's default, hundreds to thousands in its hybrid models, where a block of
# attention is as large as a recurrent layer's state. (Ours matches token by token, in pages of 64.) The data has blocks
# of 64, so that *token-exact* is what could be reused at most: of a prompt that begins with all blocks of the one
# before, that one's rest as well.

# %% tags=["results"]
table = columns("tokens of a block", "reused", "computed, over token-exact", "s, H200")
for each in found["granularity"]:
    row = (f"{each['reused']:.2%}", f"{each['computed_over_exact']:.3f}", f"{each['h200_s']:,.0f}")
    table.add_row(each["tokens"], *row)
console.print(table)
table = columns("states of recurrent layers are kept at", "reused", "computed, over exact", "states a session")
for each in found["states"]:
    row = (f"{each['reused']:.2%}", f"{each['computed_over_exact']:.3f}", f"{each['states_a_session']:,.0f}")
    table.add_row(each["placement"], *row)
console.print(table)
picture("granularity.png")

# %% [markdown]
# A recurrent layer's state cannot be cut, so that a prompt goes on from the last one that was kept. The end of each
# prompt and every 8,192 computed tokens are nearly as good as exact reuse, for a sixth of the states of a grid of 528.
#
# ## Lifetimes
#
# How much of the reuse is kept if an entry lives for a time after its last use. *By recorded pauses* counts a request
# as lost whose recorded think time is longer. That time starts at the last answer whose duration is known: for a tenth
# of the requests an older one than the answer before, so that it is too long and the share too low.

# %% tags=["results"]
table = columns("lifetime", "kept", "by recorded pauses")
for each in found["lifetimes"]:
    table.add_row(f"{each['lifetime_s']:,} s", f"{each['kept']:.1%}", f"{each['kept_by_think_time']:.1%}")
console.print(table)
picture("lifetimes.png")

# %% [markdown]
# ## Synthetic sessions beside them
#
# The agents of notebook 03 (`experiments/workloads/traces.py`) have lengths, pauses and sub-agents that were chosen by
# hand. Those of `experiments/workloads/fitted.py` are drawn from quantiles and rates of the recorded ones
# (`fitted.json`, which `python -m experiments.wild.fit` writes): lengths of tools, first messages and appended text,
# pauses after either end of an answer, breaks of each kind by the pause before them, windows. `python -m
# experiments.wild.synthetic` counts both as recorded sessions are counted.

# %% tags=["results"]
synthetic = json.loads(Path("experiments/results/wild/synthetic.json").read_text())
kinds = {"recorded": found, "fitted": synthetic["fitted"], "by hand": synthetic["by hand"]}
table = columns("", *kinds)
for name, key in (("reused", "reused"), ("reads per write", "reads_per_write")):
    table.add_row(name, *(f"{each['overall'][key]:.3g}" for each in kinds.values()))
for place, name in enumerate(("5%", "50%", "95%")):
    rates = (each["overall"]["hit_rate_by_call"][place] for each in kinds.values())
    table.add_row(f"hit rate by call, {name}", *(f"{rate:.1%}" for rate in rates))
for place, name in ((1, "50%"), (2, "90%")):
    lengths = (each["overall"]["prompt_tokens_q10_50_90_99"][place] for each in kinds.values())
    table.add_row(f"prompt tokens, {name}", *(f"{length:,.0f}" for length in lengths))
for place, cause in enumerate(found["causes"]):
    shares = (each["causes"][place] for each in kinds.values())
    cells = (f"{each['share_of_requests']:.2%}, {each['share_of_new_tokens']:.1%}" for each in shares)
    table.add_row(f"{cause['cause']}: of requests, of computed tokens", *cells)
console.print(table)
picture("synthetic.png")

# %% [markdown]
# The figure is notebook 03's first one for many sessions: the share of each prompt that the cache has, request by
# request. Sessions by hand have no breaks: that is what they leave out.
#
# What the fit does not have: that the sizes of one session go together.
#
# ## On a real server
#
# `python -m experiments.wild.live TRACES --live URL --shrink 10` sends recorded sessions to a server, with lengths
# divided by ten and text made from ids. Here ten of them, side by side, to our server with the demo model: what it
# reports as cached, over what the ids could reuse.

# %% tags=["results"]
live = json.loads(Path("experiments/results/wild/live.json").read_text())
table = columns("requests", "count", "tokens", "cached", "by the ids")
for each in live["groups"]:
    shares = (f"{each['reused']:.1%}", f"{each['trace_reused']:.1%}")
    table.add_row(each["requests"], f"{each['count']:,}", f"{each['tokens']:,}", *shares)
console.print(table)
picture("live.png")

# %% [markdown]
# ## Against an earlier count
#
# The same traces were counted before with other code, against the best of the last 40 prompts of an agent. What differs
# by more than half a point, and why:
#
# - *Lifetimes*: by recorded pauses they agree. By the clock, more is kept.
# - *States at the end of prompts, and with the end of tools*: 0.1 points less, which is 6% of what is computed. The
#   earlier count was of 350 of the sessions and of all models together.
# - *Lost in the first tenth, large breaks near the end of the head*: a break's place is where what one model has seen
#   ends, not what any has; the earlier share near the head is of a sample of 332 of the 622.
# - *Pauses before a large break, and changes of length*: not in the table; the earlier quartiles are of that sample.

# %% tags=["results"]
lifetimes = {each["lifetime_s"]: each for each in found["lifetimes"]}
states = {each["placement"]: each["reused"] for each in found["states"]}
causes = {each["cause"]: each for each in found["causes"]}
lost = found["breaks"]["lost_tokens_by_tenth"]
broken = sum(each["share_of_new_tokens"] for name, each in causes.items() if "break" in name)
begun = sum(causes[name]["share_of_new_tokens"] for name in ("first request", "model switch"))
KEPT = ((30, 72), (60, 80), (300, 93.1), (3600, 99.5))
sizes = {each["tokens"]: each["reused"] for each in found["granularity"]}
table = columns("%", "earlier", "here", "difference, points")
for name, earlier, here in (
    ("prompt tokens that can be reused", 96.3, overall["reused"]),
    ("requests that append", 95.7, causes["append"]["share_of_requests"]),
    ("true breaks, of requests", 2.2, found["breaks"]["requests"] / overall["requests"]),
    ("large breaks, of requests", 1.26, large["share_of_requests"]),
    ("large breaks, of computed tokens", 29.7, large["share_of_new_tokens"]),
    ("computed for appended text", 36.5, causes["append"]["share_of_new_tokens"]),
    ("computed for breaks", 30.2, broken),
    ("computed for first requests, model switches", 30.8, begun),
    ("computed after compactions", 2.3, causes["compaction"]["share_of_new_tokens"]),
    ("lost in the first fifth of the old prompt", 90, sum(lost[:2]) / sum(lost)),
    ("lost in the first tenth", 61, lost[0] / sum(lost)),
    ("large breaks near the end of the head", 100 * 240 / 332, large["near_end_of_head"] / large["requests"]),
    *((f"kept for {s} s, by recorded pauses", was, lifetimes[s]["kept_by_think_time"]) for s, was in KEPT),
    *((f"kept for {s} s, by the clock", was, lifetimes[s]["kept"]) for s, was in KEPT),
    ("states: end of each prompt", 95.84, states["end of each prompt"]),
    ("states: end and every 8,192 computed", 96.11, states["end and every 8,192 computed tokens"]),
    ("states: grid of 528", 96.01, states["grid of 528 tokens"]),
    ("states: grid of 2,048", 95.37, states["grid of 2,048 tokens"]),
    ("states: end, and end of tools and system", 95.97, states["end, and end of tools and system text"]),
    ("states: the same and divergences", 96.03, states["the same and where prompts diverged"]),
    ("lost by blocks of 528", 0.2, sizes["64"] - sizes["528"]),
    ("lost by blocks of 1,600", 0.6, sizes["64"] - sizes["1,600"]),
    ("lost by blocks of 2,048", 0.8, sizes["64"] - sizes["2,048"]),
):  # fmt: skip
    table.add_row(name, f"{earlier:.2f}", f"{100 * here:.2f}", f"{100 * here - earlier:+.2f}")
console.print(table)
