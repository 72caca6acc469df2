"""The prefix-keyed KV cache, over token ids and page numbers: no text, no HTTP, no model maths, no device arrays.

- `prefix_cache`: match, extend, insert, release: leases on device pages
- `radix_tree`: the longest cached prefix, token by token, and which pages to evict
- `pool`: which device pages are free, and how many holders each other page has
- `keys`: the hash chain that names a page by its content
- `tiers`: what the engine looks up, prefetches, writes and forgets below the device
- `tier`: the protocol of one tier, and reads over several
- `host`, `disk`, `remote`: the tiers: host memory, LMDB, TensorStore
- `lmdb_env`: one LMDB environment that several processes share and that may fail
- `private`: folders and files that only this user may read
- `writeback`: the thread that writes queued pages to the tiers
- `worker`: one daemon thread, and the guard that contains its exceptions
- `sizes`: bytes as people write and read them
- `__main__`: `python -m cache ls|stats|verify|prune`
"""
