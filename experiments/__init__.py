"""Benchmarks, sweeps and replay, with the generators of the models and sessions that they run on."""
