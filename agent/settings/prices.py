"""The price book: a file with the shape of systemd/price-book.example.yaml."""

from __future__ import annotations

from pathlib import Path

from agent.config import read_yaml
from agent.core.billing.price_book import PriceBook, parse_price_book
from agent.core.errors import ConfigError


def read_price_book(path: Path) -> PriceBook:
    """The prices in a file. Raises ConfigError PRICE_BOOK_INVALID, which names the file, the line or the key."""
    try:
        return parse_price_book(read_yaml(path), str(path))
    except ConfigError as error:
        if error.reason == "PRICE_BOOK_INVALID":
            raise
        raise ConfigError("PRICE_BOOK_INVALID", f"the price book {error.message}", file=str(path)) from error
