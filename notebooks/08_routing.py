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
# # Routing: which replica should a request go to?
#
# A fleet of replicas has one prefix cache each. A request is answered soonest where its prefix is cached, unless that
# replica is busy. Routers in use weigh cached blocks against counts of requests by hand-set weights. Ours adds up
# seconds: until the work before it is done, to bring pages, and to compute the rest, by the cost model, and what that
# costs other requests.
#
# `experiments/routing/` simulates the fleet: chunked prefill that shares its steps with sequences that decode, the
# engine's own order of admission, the real prefix cache, and our real router; other routers' choices follow their
# published formulae (`experiments/routing/policies.py`, each with its source). The constants are those of an 8B llama
# on an H200. No model runs.

# %%
import json
from pathlib import Path

import numpy as np
from IPython.display import Image, display

from experiments.harness.figures import COLOURS, subplots, time_label
from experiments.routing.__main__ import make_fleet
from experiments.routing.config import engine_of, read_config
from experiments.routing.figures import medians, table
from experiments.routing.fleet import Change
from experiments.routing.measure import measure
from experiments.routing.workload import Lane, Request, Workload, agents_at_work, synthetic_agents
from experiments.sweep.notebook import SMOKE, console, show
from experiments.workloads.traces import Agents

RESULTS = Path("experiments/results/routing")
config = read_config(Path("experiments/configs/routing.toml"))
engine = engine_of(config.engine, page_size=64)

# %% [markdown]
# ## Traces
#
# `python -m experiments.routing --trace conversation_trace.jsonl` plays Mooncake's trace: users' conversations, of
# which only a third of the tokens were seen before, so that queues matter most. Without `--trace`, agents of four
# projects come from `experiments/workloads/traces.py`: each call extends the one before, so that nearly all of a prompt
# is cached somewhere. `--trace agentx-traces.tar.xz` plays recorded sessions of coding agents. Each policy is played
# with three seeds; pauses over 30 s are cut.

# %% tags=["results"]
for path in sorted(RESULTS.glob("*.json")):
    console.print(path.stem)
    for result in json.loads(path.read_text())["results"]:
        console.print(table(result))

# %%
for path in sorted(RESULTS.glob("*.png")):
    display(Image(path))

# %% [markdown]
# ## Against the best of the others
#
# The 90th percentile of TTFT over that of the best other formula in the same load, and over that of least loaded, and
# hits over those of one cache without a limit; medians over the seeds.

# %% tags=["results"]
console.print(
    f"{'trace':20}{'load':>5}{'best other':>16}{'p90 / best':>12}{'p90 / least loaded':>20}{'hits / infinite':>17}"
)
for path in sorted(RESULTS.glob("*.json")):
    for result in json.loads(path.read_text())["results"]:
        found = medians(result)
        ours, others = found["tokenzero"], {name: f["ttft_p90"] for name, f in found.items() if name != "tokenzero"}
        best = min(others, key=others.get)
        infinite = float(np.median([run["bounds"]["infinite"] for run in result["runs"]]))
        least = ours["ttft_p90"] / others["least loaded"]
        console.print(
            f"{path.stem:20}{result['load']['rate']:>5g}{best:>16}{ours['ttft_p90'] / others[best]:>12.2f}"
            f"{least:>16.2f}{ours['hit_rate'] / infinite:>17.1%}"
        )

# %% [markdown]
# ## More agents, the same fleet
#
# Four replicas, and more and more synthetic agents. Without affinity, every call is computed again; with affinity
# alone, agents queue behind each other.

# %%
counts = (2, 4) if SMOKE else (4, 8, 16)
names = ("least loaded", "sticky", "Dynamo", "SGLang", "tokenzero")
figure, axes = subplots()
for name, colour in zip(names, COLOURS, strict=False):
    points = []
    for agents in counts:
        sessions = synthetic_agents(Agents(agents=agents, calls=3 if SMOKE else 8, subagents=0, sides=0))
        lanes = agents_at_work(sessions, agents, ramp_s=20.0)
        fleet = make_fleet(name, [engine] * 4, seed=0)
        fleet.run(Workload("agents", 64, lanes))
        points.append(1000 * measure(fleet).ttft_p90)
    axes.plot(counts, points, marker="o", markersize=4, color=colour, label=name)
axes.set(xlabel="agents at work on four replicas", ylabel="TTFT, 90th percentile", xscale="log", yscale="log")
axes.set_xticks(counts, [str(count) for count in counts])
axes.yaxis.set_major_formatter(time_label)
axes.yaxis.set_minor_formatter(time_label)
axes.set_xticks([], minor=True)
axes.legend(frameon=False)
show(figure)

# %% [markdown]
# ## A replica dies
#
# At 60 s, one of four replicas dies with its cache. Its agents go on elsewhere, where their prompts are computed once.

# %%
figure, axes = subplots()
for name, colour in (("sticky", COLOURS[1]), ("SGLang", COLOURS[3]), ("tokenzero", COLOURS[0])):
    sessions = synthetic_agents(Agents(agents=12, calls=3 if SMOKE else 16, subagents=0, sides=0, think_s=8.0))
    lanes = agents_at_work(sessions, 12, ramp_s=20.0)
    fleet = make_fleet(name, [engine] * 4, seed=0, changes=[Change(60.0, 1)])
    fleet.run(Workload("agents", 64, lanes))
    sent = np.array([a.sent for a in fleet.answered])
    missed = np.array([a.request.tokens - a.reused for a in fleet.answered])
    bins = np.arange(0, max(sent.max(), 61), 10)
    by_time, _ = np.histogram(sent, bins, weights=missed)
    axes.plot(bins[:-1], by_time / 1000, color=colour, label=name)
axes.axvline(60, color="#666666", linewidth=0.8, linestyle=":")
axes.set(xlabel="seconds; a replica dies at 60", ylabel="thousand prompt tokens computed in 10 s")
axes.legend(frameon=False)
show(figure)

# %% [markdown]
# ## Siblings that come at once
#
# Sixteen sub-agents with a common prefix that nobody has yet, two milliseconds apart. A router that waits for
# summaries sends each to another replica; one that counts what it has just sent as cached keeps them together.

# %%
siblings = []
for number in range(16):
    pages = np.concatenate([np.arange(400), np.arange(5) + 1000 * (number + 1)]).astype(np.int32)
    siblings.append(Lane(0.002 * number, [Request(number, pages, 64 * 405 + 20, 20)]))
for name in ("round robin", "Dynamo", "SGLang", "tokenzero"):
    fleet = make_fleet(name, [engine] * 8, seed=0)
    answered = fleet.run(Workload("siblings", 64, siblings))
    computed = sum(a.request.tokens - a.reused for a in answered)
    print(f"{name:14} {len({a.replica for a in answered})} replicas, {computed:,} tokens computed")
