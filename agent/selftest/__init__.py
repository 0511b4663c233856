"""The selftest of a GPU host: freezes and wakes a small CUDA program and compares every byte of its memory."""
