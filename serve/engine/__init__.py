"""Token ids in, token ids out: the step loop over one device, without text or HTTP."""
