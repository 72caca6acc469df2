"""How much a server takes and remembers, in bytes; the lowest wing, which imports nothing of the others."""
