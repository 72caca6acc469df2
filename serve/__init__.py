"""Requests in, tokens out: the Messages API, the normaliser, the engine's step loop and the server around them."""
