"""Token ids in, token ids out: the step loop over one device, without text or HTTP."""

# engine.py         the thread: inbox, cancel, recover; `Engine` and `generate` are what other wings call
# core.py           one turn of the loop: admit, restore, plan, dispatch, collect, sample
# scheduler.py      who is admitted, who runs, who gives way; pure functions
# sequence.py       one sequence, its named state, and the only writer of what it holds
# request.py        what is asked for, and the events that answer it
# memory.py         the device's pages: pool and prefix cache; leases for sequences
# restore.py        what comes up from the tiers
# saving.py         what goes down to the tiers
# page_names.py     the keys of a sequence's pages, for both
# page_copies.py    compiled copies of pages, for both
# runner.py         a step on the device: packing, forward pass, sampling, reading
# steps.py          the compiled steps and their shapes
# prompt_lookup.py  draft tokens for speculative decoding
# cost.py           seconds to compute or to read back; cost_fit.py fits its constants
# settings.py       sizes and limits
# counters.py       what the metrics page shows
# inbox.py          what other threads leave for the engine's
# runtime.py        how JAX is set up
