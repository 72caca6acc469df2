"""Prompt-stability rules, on decoded requests and on a body's bytes."""
