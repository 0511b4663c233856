"""The GPUs of the node: who gets them, their health, and who uses one without holding it."""
