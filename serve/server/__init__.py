"""The server: its command line, and a request from its body to its answer."""
