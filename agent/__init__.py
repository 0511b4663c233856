"""Hibernode: GPU inference instances that sleep. The map of the house is ARCHITECTURE.md."""

__version__ = "0.1.0"
