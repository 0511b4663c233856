"""Freezes and wakes an instance: lock, checkpoint, cgroup, and the way back from every failure."""
