"""The prefix-keyed KV store, over token ids and page numbers: no text, no HTTP, no model maths, no device arrays."""
