"""Token ids in, token ids out: the step loop over one device, without text or HTTP.

- `engine`: the thread: inbox, cancel, recover; `Engine` and `generate` are what other wings call
- `core`: one turn of the loop: admit, restore, plan, dispatch, collect, sample
- `scheduler`: who is admitted, who runs, who gives way; pure functions
- `sequence`: one sequence, its named state, and the only writer of what it holds
- `request`: what is asked for, and the events that answer it
- `memory`: the device's pages: pool and prefix cache; leases for sequences
- `restore`: what comes up from the tiers
- `saving`: what goes down to the tiers
- `page_names`: the keys of a sequence's pages, for both
- `page_copies`: compiled copies of pages, for both
- `runner`: a step on the device: packing, forward pass, sampling, reading
- `buckets`: the shapes of steps, and the packing of sequences into one
- `steps`: the programs of a step of each shape
- `programs`: what is compiled, what is next, and the thread that compiles in the background
- `executables`: compiled programs on disk
- `prompt_lookup`: draft tokens for speculative decoding
- `settings`: sizes and limits
- `counters`: what the metrics page shows
- `inbox`: what other threads leave for the engine's
- `runtime`: how JAX is set up
"""
