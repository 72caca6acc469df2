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
# # What a prompt pays for the position at which it stops matching
#
# A prefix cache holds the first $p$ of a prompt's $n$ tokens; the others are computed again. This notebook measures the
# time to first token over $n$ and $p$, fits a cost model to it, and derives the cost of one volatile token by its
# position.
#
# The measurement is `python -m experiments.sweep experiments/configs/position.toml`: the demo model (5.8M parameters,
# random weights: speed does not depend on them) in float32 through the real engine, in this process. Points come in a
# random order, each right after a request that leaves its shared prefix in the cache; medians with 95% bootstrap
# intervals.

# %% tags=["results"]
import json
from pathlib import Path

from IPython.display import Image, display

from experiments.foreign import table as ways_table
from experiments.plot import draw
from experiments.sweep.fit import constants_of, constants_table, crossover_table, fit_run, model_config, prices_table
from experiments.sweep.notebook import console, sweep
from experiments.sweep.run_folder import table
from model.kv import bytes_per_token

run = sweep("position")
fitted, cells = fit_run(run)
console.print(table(cells))

# %% [markdown]
# ## The curve
#
# Each line is one prompt length. On the left the first token differs and all is computed; on the right only the
# question is. Points are medians, bars their intervals, lines the fitted model:
#
# $$\mathrm{TTFT}(n, p) = \underbrace{a}_{\text{fixed}} + \underbrace{b\,(n - p)}_{\text{matrices}}
#   + \underbrace{c\,\tfrac{n^2 - p^2}{2}}_{\text{causal attention}} + \underbrace{d\,p}_{\text{matching}}$$
#
# The attention term is why the price does not fall in proportion: a later token costs more, because it attends to all
# earlier ones.

# %% tags=["results"]
position, predicted = (path for path in draw(run, console) if path.name != "arms.png")
display(Image(position, width=900))

# %% [markdown]
# ## Does the model hold?
#
# Each point below is predicted by a fit that has not seen it (five folds).

# %% tags=["results"]
console.print(constants_table(fitted))
display(Image(predicted, width=620))

# %% [markdown]
# ## The price of one volatile token
#
# A header, a date, a counter: a change at position $p$ makes the request pay for everything after it.

# %% tags=["results"]
console.print(prices_table(fitted))

# %% [markdown]
# ## When is a page worth reading back?
#
# The tiers below the device answer at their own speed. By the fitted model a token at position $p$ costs $b + c\,p$
# seconds to compute; a tier that reads $r$ bytes a second delivers it in `bytes per token` $/ r$ seconds. The later a
# page is in the prompt, the slower a tier may be and still win. The engine decides this page by page
# (`serve/cost/model.py`).

# %% tags=["results"]
config = model_config(cells[0].point.model)
if config:
    console.print(crossover_table(constants_of(fitted), bytes_per_token(config, "float32")))

# %% [markdown]
# ## Another engine
#
# The same prompts over HTTP to llama.cpp's server with its defaults, on the same weights as a GGUF file:
# `python -m experiments.sweep experiments/configs/foreign.toml`. Positions are the cached tokens that it reports
# itself. It was measured on two cores that other programs used as well, so the intervals are wide; 15 repeats in
# random order.

# %% tags=["results"]
foreign = sweep("foreign")
position, _ = draw(foreign, console)
display(Image(position, width=900))

# %% [markdown]
# The curve has the same form: a mismatch at token zero costs the whole prompt, and one halfway through 8,192 tokens
# still costs almost two thirds of it.
#
# Does a client's header put it at zero? `python -m experiments.foreign` sends an agent's prompt twice in a row, with a
# fresh header and a fresh question each time. On its Messages route this release of llama.cpp overwrites the hash
# `cch` itself ([#21793](https://github.com/ggml-org/llama.cpp/pull/21793)). A fresh version suffix, which each session
# of the client has, still costs the whole prompt, and so does the hash on its chat route. Through the proxy only the
# question is computed.

# %% tags=["results"]
measured = json.loads(Path("experiments/results/foreign/summary.json").read_text())
console.print(ways_table(measured["rows"]))
display(Image("experiments/results/foreign/cached.png", width=900))
