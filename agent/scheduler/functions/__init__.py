"""Functions, and how many instances each has: catalog, provisioner, autoscaler."""
