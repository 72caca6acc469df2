"""Kernels and models on a GPU."""
