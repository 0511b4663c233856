"""Shared by all runtimes: routing, bundles, exits, log files, and the environment of an instance."""
