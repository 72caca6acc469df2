"""The auditor: what requests reused is computed again and compared, while the engine has nothing else to do."""

# auditor.py        when: the engine's idle work, within a budget; what happens after a mismatch
# window.py         what: one audit, a window of a reused prefix, step by step
# comparison.py     how: pages and logits are compared, and what difference is too large
# findings.py       records of reused prefixes, and mismatches
# case.py, cli.py   a wrong sequence as a file, and its replay
