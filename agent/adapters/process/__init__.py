"""Instances as processes of the host."""
