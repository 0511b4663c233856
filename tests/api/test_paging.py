"""Pages: every item once, in order; foreign tokens are refused."""

from __future__ import annotations

import pytest

from agent.api.paging import DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE, page
from agent.core.errors import InvalidArgumentError


def test_pages_hold_every_item_once() -> None:
    items, token = list(range(25)), ""
    seen: list[int] = []
    while True:
        shown, token = page(items, 10, token)
        seen += shown
        if not token:
            break
    assert seen == items


def test_sizes_are_bounded() -> None:
    items = range(5000)
    assert len(page(items, 0, "")[0]) == DEFAULT_PAGE_SIZE
    assert len(page(items, 10**9, "")[0]) == MAX_PAGE_SIZE


@pytest.mark.parametrize("token", ["-1", "x", "1.5", "9" * 13])
def test_foreign_page_token_is_refused(token: str) -> None:
    with pytest.raises(InvalidArgumentError, match="PAGE_TOKEN_INVALID"):
        page([1], 1, token)


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="PAGE_SIZE_INVALID"):
        page([1], -1, "")
