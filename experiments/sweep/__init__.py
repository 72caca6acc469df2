"""TTFT over the axes of a config, the cost model fitted to it, and its tables."""
