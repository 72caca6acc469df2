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
# How long must a prompt take? A lower bound divides the arithmetic and the bytes that cannot be avoided by the device's
# peak rates. `experiments/roofline.py` has the formulas and the sources of the figures.

# %%
import json
from pathlib import Path

import numpy as np
from IPython.display import Image, display

from experiments.gpu.tables import attention_table, heading, model_table
from experiments.harness.figures import COLOURS, subplots, time_label, tokens_label
from experiments.roofline import DEVICES, MODELS, prefill, table
from experiments.sweep.notebook import console, show

console.print(table(52_000, 128), width=130)

# %% [markdown]
# ## The lower bound over the mismatch position
#
# For two models on one H200: the larger of both times, for a 52K-token prompt that stops matching at $p$. The
# arithmetic falls as $n^2 - p^2$; below a few hundred new tokens, reading the weights and the cached keys dominates.

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
# `make gpu-bench` measures the kernels of `model/kernels/hopper/`, an 8B-shaped model with random weights and the
# engine on a Hopper GPU, together with torch's attention and JAX's own, and writes
# `experiments/results/gpu/gpu_bench.json`. Ceilings are one large matrix product and one large copy of the same run.
# Our keys and values lie in pages in shuffled order, those of the others contiguously.

# %% tags=["results"]
result = json.loads(Path("experiments/results/gpu/gpu_bench.json").read_text())
console.print(heading(result))
console.print(attention_table(result))

# %% [markdown]
# A cold prompt runs at the speed of torch's best backend (cuDNN). With a cached prefix torch has only its flash
# backend, which is slower. Decode reads keys and values at the speed of a copy.
#
# ## The whole model and the engine
#
# The three arms are those of the demo: the same line before each prompt (*stable*), a changing one (*varying*), or none
# (*stripped*).

# %% tags=["results"]
console.print(model_table(result))
display(Image("experiments/results/gpu/gpu_bench.png", width=900))

# %% [markdown]
# Compared with the lower bounds above, of the same shape on the same device:

# %% tags=["results"]
for row in result["forward"]:
    floor = prefill(MODELS["Llama-3.1-8B"], DEVICES["H200"], row["prefix"] + row["tokens"], row["prefix"])
    ratio = f"{row['seconds'] * 1e3 / floor.ms:.2f} times its lower bound of {floor.ms:,.1f} ms"
    console.print(f"{row['pass']} pass, {row['layers']} layers: {ratio}")
