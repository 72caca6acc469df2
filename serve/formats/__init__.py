"""How model families write thinking and tool calls, and how that is parsed back."""
