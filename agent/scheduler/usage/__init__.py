"""Usage windows of the whole fleet: collected, reported, reconciled, retained."""
