"""Prompt-stability rules: on a decoded request (`normalize`), and on the bytes of a body (`body`)."""
