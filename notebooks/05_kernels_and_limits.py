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
# # Kernels and limits
#
# How long must a prompt take? A floor counts the arithmetic and the bytes that nobody can avoid and divides them by
# what
# the device does at best. `experiments/roofline.py` has the formulas and the sources of the figures.

# %%
import json
from pathlib import Path

import numpy as np
from IPython.display import Image, display

from experiments.harness.figures import COLOURS, subplots, time_label, tokens_label
from experiments.roofline import DEVICES, MODELS, prefill, table
from experiments.sweep.notebook import console, show

console.print(table(52_000, 128), width=130)

# %% [markdown]
# ## The floor over the mismatch position
#
# For two models on one H200: the larger of both times, for a 52K-token prompt that stops matching at $p$. The
# arithmetic falls as $n^2 - p^2$; under a few hundred new tokens the weights and the cached keys that have to be read
# are what is left.

# %%
prompt = 52_000
positions = np.linspace(0, prompt - 1, 400).astype(int)
figure, axes = subplots()
for colour, name in zip(COLOURS, ("Llama-3.1-8B", "Qwen3-0.6B"), strict=False):
    floors = [prefill(MODELS[name], DEVICES["H200"], prompt, int(p)).ms for p in positions]
    axes.plot(positions, floors, color=colour)
    axes.annotate(name, (0, floors[0]), xytext=(4, 5), textcoords="offset points", color=colour)
axes.set_yscale("log")
axes.yaxis.set_major_formatter(time_label)
axes.set_xticks(range(0, prompt, 8192))
axes.xaxis.set_major_formatter(tokens_label)
axes.set_xlabel("mismatch position in a prompt of 52,000 tokens")
axes.set_ylabel("least time to first token on an H200 (log scale)")
show(figure)

# %% [markdown]
# ## What the kernels reach
#
# `make gpu-bench` measures the kernels of `model/kernels/` on a Hopper GPU, beside torch and JAX's own, and writes
# `experiments/results/gpu/`.

# %%
results = sorted(Path("experiments/results/gpu").glob("*.json"))
for path in results:
    console.print(path, json.loads(path.read_text()).get("device", ""))
for picture in sorted(Path("experiments/results/gpu").glob("*.png")):
    display(Image(picture, width=900))
if not results:
    console.print("Nothing has been measured on a GPU yet: there are no figures of the kernels to compare.")
