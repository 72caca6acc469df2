"""What recorded coding agents ask of a prefix cache: reuse, breaks by cause, granularity and lifetimes."""
