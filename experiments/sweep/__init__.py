"""TTFT over the axes of a config, and what follows from it."""
