"""Attention over the paged pool and small matrix products; `dispatch` picks the path of a batch.

- `dispatch`: which kernel computes a batch, or None for XLA
- `limits`: what the GPU kernels support
- `hopper`: Pallas kernels for Hopper GPUs (Mosaic GPU, sm90)
- `cpu`: kernels in C++ for CPUs
- `xla`: blockwise attention in XLA, which runs everywhere
- `reference`: attention as simple as can be, what all others must compute
"""
