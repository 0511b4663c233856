"""The price book: unit prices by validity, parsed strictly from YAML data.

Amounts are Fractions of the number's text (0.15 is 3/20, not the nearest double), so that sums are exact. Factors and
units follow Function Compute's CU list; 1 GB is 2**30 bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from fractions import Fraction

from agent.core.errors import ConfigError

_WORDS = re.compile(r"[a-z0-9]+")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Rate:
    """Units of money (CU) per unit of resource and second, while active and while idle. Never negative."""

    active: Fraction
    idle: Fraction


@dataclass(frozen=True, slots=True)
class GpuFamily:
    """One line of GPU factors. A pattern matches a model name that contains its words in a row, in any case: `A10`
    matches "NVIDIA A10" but not "NVIDIA A100"; `*` matches all."""

    name: str
    models: tuple[str, ...]
    rate: Rate

    def matches(self, model: str) -> bool:
        words = f" {' '.join(_WORDS.findall(model.lower()))} "
        return any(
            pattern == "*" or f" {' '.join(_WORDS.findall(pattern.lower()))} " in words for pattern in self.models
        )


@dataclass(frozen=True, slots=True)
class Price:
    """Prices from `valid_from_wall_ns` until the next `Price`. GPU, memory and disk are per GiB x s, vCPU per vCPU x s;
    `unit_price` turns CU into `currency`."""

    valid_from_wall_ns: int
    unit_price: Fraction
    gpu: tuple[GpuFamily, ...]
    vcpu: Rate
    memory: Fraction
    disk: Fraction
    invocation: Fraction

    def gpu_rate(self, model: str) -> Rate | None:
        """The factors of the first family that matches; None = the model has no price."""
        return next((family.rate for family in self.gpu if family.matches(model)), None)


@dataclass(frozen=True, slots=True)
class PriceBook:
    """Prices in the order of their validity. Windows before the first one have no price."""

    currency: str
    prices: tuple[Price, ...]

    def price_at(self, wall_ns: int) -> Price | None:
        """The price of a window that starts at `wall_ns`; None before the first price."""
        return next((price for price in reversed(self.prices) if price.valid_from_wall_ns <= wall_ns), None)

    def periods(self) -> tuple[tuple[Price, int, int | None], ...]:
        """Each price with its span [from, until) in wall ns; the last has no end (None)."""
        ends = [price.valid_from_wall_ns for price in self.prices[1:]]
        return tuple(
            (price, price.valid_from_wall_ns, end) for price, end in zip(self.prices, [*ends, None], strict=True)
        )


def parse_price_book(data: object, where: str = "price book") -> PriceBook:
    """Build a price book from the result of a YAML safe load (shape: systemd/price-book.example.yaml).

    Raises ConfigError PRICE_BOOK_INVALID, which names `where` and the key path; unknown keys are refused.
    """
    top = _table(data, where, required=("prices",), optional=("currency",))
    currency = top.get("currency", "CU")
    if not isinstance(currency, str) or not currency:
        raise _invalid(f"{where}: currency", "must be a name such as CU or CNY")
    entries = _list(top["prices"], f"{where}: prices")
    prices = tuple(_price(entry, f"{where}: prices[{index}]") for index, entry in enumerate(entries))
    starts = [price.valid_from_wall_ns for price in prices]
    if sorted(set(starts)) != starts:
        raise _invalid(f"{where}: prices", "must be in the order of valid_from, each instant once")
    return PriceBook(currency, prices)


def _price(data: object, where: str) -> Price:
    table = _table(
        data,
        where,
        required=("valid_from", "gpu", "vcpu", "memory", "disk", "invocations_per_10000"),
        optional=("unit_price",),
    )
    families = _list(table["gpu"], f"{where}.gpu")
    return Price(
        valid_from_wall_ns=_instant(table["valid_from"], f"{where}.valid_from"),
        unit_price=_amount(table.get("unit_price", 1), f"{where}.unit_price"),
        gpu=tuple(_family(entry, f"{where}.gpu[{index}]") for index, entry in enumerate(families)),
        vcpu=_rate(table["vcpu"], f"{where}.vcpu"),
        memory=_amount(table["memory"], f"{where}.memory"),
        disk=_amount(table["disk"], f"{where}.disk"),
        invocation=_amount(table["invocations_per_10000"], f"{where}.invocations_per_10000") / 10_000,
    )


def _family(data: object, where: str) -> GpuFamily:
    table = _table(data, where, required=("family", "models", "active", "idle"), optional=())
    models = [str(model) for model in _list(table["models"], f"{where}.models")]
    if not all(model == "*" or _WORDS.search(model.lower()) for model in models):
        raise _invalid(f"{where}.models", "each pattern needs a letter or a digit, or is *")
    return GpuFamily(
        name=str(table["family"]),
        models=tuple(models),
        rate=Rate(_amount(table["active"], f"{where}.active"), _amount(table["idle"], f"{where}.idle")),
    )


def _rate(data: object, where: str) -> Rate:
    table = _table(data, where, required=("active", "idle"), optional=())
    return Rate(_amount(table["active"], f"{where}.active"), _amount(table["idle"], f"{where}.idle"))


def _amount(data: object, where: str) -> Fraction:
    if isinstance(data, bool) or not isinstance(data, (int, float, str)):
        raise _invalid(where, "must be a number")
    try:
        amount = Fraction(str(data))
    except (ValueError, ZeroDivisionError):
        raise _invalid(where, f"must be a finite number, not {data!r}") from None
    if amount < 0:
        raise _invalid(where, "must not be negative")
    return amount


def _instant(data: object, where: str) -> int:
    """Wall ns of an ISO 8601 instant; without a zone it is UTC, a date is its first instant."""
    if isinstance(data, str):
        try:
            data = datetime.fromisoformat(data)
        except ValueError:
            raise _invalid(where, f"must be an instant such as 2026-01-01T00:00:00Z, not {data!r}") from None
    if isinstance(data, date) and not isinstance(data, datetime):
        data = datetime(data.year, data.month, data.day, tzinfo=UTC)
    if not isinstance(data, datetime):
        raise _invalid(where, "must be an instant such as 2026-01-01T00:00:00Z")
    since = (data if data.tzinfo else data.replace(tzinfo=UTC)) - _EPOCH
    return ((since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds) * 1_000


def _table(data: object, where: str, *, required: Sequence[str], optional: Sequence[str]) -> Mapping[str, object]:
    if not isinstance(data, Mapping):
        raise _invalid(where, f"must be a table with the keys {', '.join(required)}")
    for key in data:
        if key not in required and key not in optional:
            known = ", ".join([*required, *optional])
            raise _invalid(f"{where}.{key}", f"is not a known key; known are {known}")
    for key in required:
        if key not in data:
            raise _invalid(f"{where}.{key}", "is missing")
    return data


def _list(data: object, where: str) -> Sequence[object]:
    if not isinstance(data, list) or not data:
        raise _invalid(where, "must be a list with at least one entry")
    return data


def _invalid(where: str, problem: str) -> ConfigError:
    return ConfigError("PRICE_BOOK_INVALID", f"{where} {problem}", key=where)
