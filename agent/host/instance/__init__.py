"""One instance: its actor, its admission gate and the operations on it."""
