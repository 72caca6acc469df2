"""Attention for Hopper GPUs (sm90), in Pallas for Mosaic GPU."""
