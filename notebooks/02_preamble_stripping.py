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
# # Stripping the preamble
#
# Claude Code starts every prompt with a line that in some releases changes with every request:
#
# ```
# x-anthropic-billing-header: cc_version=2.1.179.471; cc_entrypoint=sdk-cli; cch=5d157;
# ```
#
# NVIDIA measured what that costs: 52K tokens on one B200, 3 rounds of 15 requests for each arm (condition), 168 ms to
# first token with a stable prefix, 912 with a varying line, 169 with it stripped (the [README](../README.md) has the
# source). Here are the same arms on our server, over HTTP, with a prompt of 16K tokens
# (`experiments/configs/preamble.toml`; `make demo` has 52K with fewer repeats, since each costs a CPU 17 seconds).

# %% tags=["results"]
import json

import numpy as np
from IPython.display import Image, display
from rich.table import Table

from cache.radix_tree import common_prefix
from experiments.plot import draw
from experiments.stability import Case, cases
from experiments.sweep.notebook import MODEL, console, sweep
from experiments.sweep.run_folder import cells as medians
from experiments.sweep.run_folder import load, table
from experiments.workloads.sessions import RELEASES
from serve.api.messages import decode_request
from serve.prompt.render import render
from serve.prompt.tokenizer import load_tokenizer
from serve.rules.normalize import normalize

run = sweep("preamble")
found = medians(load(run))
console.print(table(found))

# %% tags=["results"]
PUBLISHED = {"stable": 168, "varying": 912, "stripped": 169}
longest = max(cell.point.prompt_tokens for cell in found)
ours = {cell.point.arm: cell.ttft_ms for cell in found if cell.point.prompt_tokens == longest}
compared = Table("arm", "ours, ms", "over stable", "NVIDIA's, ms", "over stable")
for arm, published in PUBLISHED.items():
    compared.add_row(
        arm,
        f"{ours[arm]:,.0f}",
        f"{ours[arm] / ours['stable']:.2f}",
        str(published),
        f"{published / PUBLISHED['stable']:.2f}",
    )
console.print(compared)
display(Image(next(path for path in draw(run, console) if path.name == "arms.png"), width=900))

# %% [markdown]
# The direction is the same, the size is not: the ratio of a cold to a warm prompt depends on model and machine, and on
# two CPU cores arithmetic outweighs everything else.
#
# ## The control: a short prompt
#
# NVIDIA's first try, with 400 tokens, showed nothing (146, 158 and 139 ms). An effect that grows with the prompt must
# vanish with it; the ratio below says how far it does here.

# %% tags=["results"]
short = {cell.point.arm: cell for cell in found if cell.point.prompt_tokens < longest}
control = Table("arm", "tokens", "ms", "95% interval", "over stable")
for arm, cell in short.items():
    interval = f"{cell.low_ms:.1f} - {cell.high_ms:.1f}"
    ratio = f"{cell.ttft_ms / short['stable'].ttft_ms:.2f}"
    control.add_row(arm, f"{cell.prompt_tokens:,}", f"{cell.ttft_ms:.1f}", interval, ratio)
console.print(control)

# %% [markdown]
# ## Reasoning that comes back changed
#
# The same mismatch later in the prompt: an earlier answer's thinking, about 500 tokens, replayed exactly or mutated.
# NVIDIA: 167 against 322 ms (1.9x) after a 52K system prompt. Everything before it is still cached, so the price is
# that of the thinking and what follows it.

# %% tags=["results"]
console.print(table(medians(load(sweep("thinking")))))

# %% [markdown]
# ## What is left after the strip, by client release
#
# No timing here, only tokens: for pairs of requests of each release, how much of the second prompt does the first one
# cover, with the preamble kept and stripped? The requests are synthetic and have the sizes and the order of what each
# release sends (`experiments/stability.py`). The new content of a next turn is never covered.

# %%
tokenizer = load_tokenizer(str(MODEL))


def tokens(body: dict, rules: frozenset[str]) -> np.ndarray:
    """The prompt's ids, [tokens] int32."""
    return render(normalize(decode_request(json.dumps(body).encode()), rules).request, tokenizer)


def covered(case: Case, rules: frozenset[str]) -> float:
    """The share of the second prompt that the first one is a prefix of."""
    a, b = tokens(case.old, rules), tokens(case.new, rules)
    return common_prefix(a, b) / len(b)


left = Table("release", "case", "kept", "stripped")
for release in RELEASES:
    for name, case in cases(release).items():
        if case.rule is None:  # notebook 04 has the others
            kept, stripped = (covered(case, frozenset(rules)) for rules in ([], ["strip-preamble"]))
            left.add_row(release, name, f"{kept:.1%}", f"{stripped:.1%}")
console.print(left)

# %% [markdown]
# The strip repairs the turns of a session, and new sessions in one folder. What is left is another agent's prompt, and
# tools that come and go; notebook 04 deals with another folder's name, which is early in the system text.
