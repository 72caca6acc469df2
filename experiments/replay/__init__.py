"""What a cache of some size finds in a trace of calls."""
