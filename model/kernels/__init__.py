"""Pallas kernels for Hopper GPUs (Mosaic GPU, sm90), one file each, and one in C++ for CPUs: `dispatch` picks."""
