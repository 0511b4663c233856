"""Instances as containers of Docker or Podman."""
