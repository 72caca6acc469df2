"""The prefix-keyed KV store: token ids and page numbers, no text, no HTTP, no model maths, no device arrays.

`serve/` uses `cache.prefix_cache.PrefixStore`; the other files are its rooms.
"""
