"""How model families write thinking and tool calls, and how that is read back."""
