"""What both ends of a call agree on."""

from __future__ import annotations

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
"""A larger message is refused by whichever end sees it first (RESOURCE_EXHAUSTED)."""

DEFAULT_DEADLINE_S = 60.0
"""For a call that came without a deadline; streams of both directions have none."""
