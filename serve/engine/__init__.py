"""Token ids in, token ids out: the step loop over one device. No text, no HTTP."""
