"""The cost of usage windows one by one, the oracle for the scheduler's sums."""

from __future__ import annotations

from collections.abc import Iterable

from agent.core.billing.price_book import PriceBook
from agent.core.billing.pricing import Cost, always_on_cost, cost
from agent.core.billing.window import UsageWindow


def cost_of_windows(windows: Iterable[UsageWindow], book: PriceBook) -> tuple[Cost, Cost, int]:
    """(cost, always-on cost, number of windows without a price because they began before the first one)."""
    spent, always_on, unpriced = Cost(), Cost(), 0
    for window in windows:
        price = book.price_at(window.start_wall_ns)
        if price is None:
            unpriced += 1
            continue
        spent += cost(window, price)
        always_on += always_on_cost(window, price)
    return spent, always_on, unpriced
