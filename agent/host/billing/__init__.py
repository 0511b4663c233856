"""The node's ledger of usage windows: written each second, pruned once acknowledged."""
