"""The hits of a cache of given size in a trace of calls."""
