"""Why a prompt missed the cache: `divergence` reports it, and `cli` is the command `python -m serve explain`."""
