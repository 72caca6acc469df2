"""A soak: the real server under random sessions, restarts and losses; its answers are compared with cold ones."""
