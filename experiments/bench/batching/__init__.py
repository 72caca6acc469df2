"""What requests cost each other inside the engine: decode in a batch, latency during a prefill, shared prefixes."""
