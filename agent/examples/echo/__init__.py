"""The lightest possible instance: standard library only, with device memory on request."""
