"""Pallas kernels for Hopper GPUs (Mosaic GPU, sm90), one file each; `model.attention` decides when they run."""
