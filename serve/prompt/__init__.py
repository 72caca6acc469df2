"""A request to token ids, and to the grammar of its answer."""
