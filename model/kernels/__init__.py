"""Pallas kernels for Hopper GPUs (Mosaic GPU, sm90), one file each, and two in C++ for CPUs: `dispatch` picks."""
