"""GPU allocation, the capabilities of a host, GPU health, and the ledger of host memory for frozen images."""
