"""The CPU kernels: attention over the paged pool and matrix products of few tokens, in C++, built where they run."""
