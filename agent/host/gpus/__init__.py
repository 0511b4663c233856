"""The GPUs of the node: which instance gets them, their health, and processes on GPUs not granted to them."""
