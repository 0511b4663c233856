"""Freezes and wakes an instance: lock, checkpoint, cgroup freeze, and the rollback of every failure."""
