"""Who holds which GPU, what a host can do, how healthy its GPUs are, and the ledger of frozen images in host memory."""
