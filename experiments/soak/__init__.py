"""A soak: the real server under random sessions, restarts and losses, and its answers beside those of no cache."""
