"""Limits in bytes on what a server accepts and remembers; the lowest wing, which imports no other."""
