"""Limits that both ends of a gRPC call share."""

from __future__ import annotations

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
"""Either end refuses a larger message with RESOURCE_EXHAUSTED."""

DEFAULT_DEADLINE_S = 60.0
"""For calls without a deadline of their own; bidirectional streams have none."""
