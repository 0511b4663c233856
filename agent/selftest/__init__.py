"""The selftest of a GPU host: a small CUDA program is frozen and woken, and every byte compared."""
