"""Why a prompt missed the cache.

`sections` finds the part of a request that a token comes from, `divergence` reports where a prompt stops matching,
`causes` names why, `volatility` finds lines that change in every request, and `savings` counts what each rule saved.
`python -m serve explain` is `cli`, which prints what `compare` finds.
"""
