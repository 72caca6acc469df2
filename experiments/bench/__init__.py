"""Benchmarks: one command a suite, each printing a table and writing JSON with its provenance."""
