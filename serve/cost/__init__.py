"""What it costs, in seconds, to compute a prompt's tokens and to read their pages; needs neither JAX nor an engine.

- `model`: the formula with its constants, and rates as they are measured
- `fit`: constants from the measurements of a sweep
- `file`: constants as the file that the server loads
"""
