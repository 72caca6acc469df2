"""The server: a request from its body to its answer."""
