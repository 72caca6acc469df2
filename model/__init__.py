"""The decoder: pure functions on pytrees. Nothing here knows of cache policy, text or HTTP."""
