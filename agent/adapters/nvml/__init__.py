"""GPUs as NVML reports them, XID events, and the lock on each GPU."""
