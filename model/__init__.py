"""The decoder: pure functions on pytrees, which know nothing of cache policy, text or HTTP."""
