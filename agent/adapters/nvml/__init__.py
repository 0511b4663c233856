"""What NVML says about GPUs, and the lock on each of them."""
