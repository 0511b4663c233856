"""Pages of a list in memory. The page token is the offset, opaque to callers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from agent.core.errors import InvalidArgumentError
from agent.event_log import LoggedEvent

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
MAX_TOKEN_DIGITS = 12

_Item = TypeVar("_Item")


def page_bounds(page_size: int, page_token: str) -> tuple[int, int]:
    """Offset and size of the requested page. Raises InvalidArgumentError for a foreign token."""
    if page_size < 0:
        raise InvalidArgumentError("PAGE_SIZE_INVALID", "page_size must not be negative; 0 is the default")
    if page_token and not (page_token.isdecimal() and len(page_token) <= MAX_TOKEN_DIGITS):
        raise InvalidArgumentError("PAGE_TOKEN_INVALID", "page_token must come from the previous answer")
    return int(page_token or 0), min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)


def page(items: Sequence[_Item], page_size: int, page_token: str) -> tuple[Sequence[_Item], str]:
    """The page, and the token of the next one ("" at the end)."""
    offset, size = page_bounds(page_size, page_token)
    end = offset + size
    return items[offset:end], str(end) if end < len(items) else ""


def page_of_events(found: Sequence[LoggedEvent], size: int) -> tuple[Sequence[LoggedEvent], str]:
    """As `page`, of events after the token. The token is the last event's number, because old events are dropped."""
    return found[:size], str(found[size - 1].sequence) if len(found) > size else ""
