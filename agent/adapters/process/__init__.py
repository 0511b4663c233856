"""Runs instances as host processes."""
