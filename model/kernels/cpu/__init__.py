"""The CPU kernel: attention over the paged pool in C++, called by XLA, built where it runs."""
