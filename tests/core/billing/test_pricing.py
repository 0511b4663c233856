"""Costs are exact, recomputable by hand, and rounded once."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from agent.core.billing.price_book import PriceBook, parse_price_book
from agent.core.billing.pricing import (
    Quantities,
    always_on_cost,
    cost,
    exact_text,
    quantities,
    rounded,
)
from agent.core.billing.window import UsageWindow
from agent.core.errors import ConfigError
from agent.core.types import GIB, SECOND_NS
from tests.core.billing.oracle import cost_of_windows

EXAMPLE = Path(__file__).parents[3] / "systemd" / "price-book.example.yaml"
IN_2025 = 1_735_689_600 * SECOND_NS


def book() -> PriceBook:
    return parse_price_book(yaml.safe_load(EXAMPLE.read_text()), EXAMPLE.name)


def window(active_s: int = 10, idle_s: int = 50, unbilled_s: int = 0) -> UsageWindow:
    return UsageWindow(
        instance_uid="i-sd-1",
        seq=0,
        node="gpu-7",
        boot_id="boot-a",
        function="stable-diffusion",
        state="RUNNING",
        gpu_model="NVIDIA L20",
        gpu_uuids=("GPU-0",),
        gpu_count=1,
        gpu_memory_bytes=48 * GIB,
        vcpu_millis=8_000,
        memory_bytes=64 * GIB,
        disk_bytes=10 * GIB,
        start_mono_ns=0,
        end_mono_ns=(active_s + idle_s + unbilled_s) * SECOND_NS,
        start_wall_ns=IN_2025,
        active_ns=active_s * SECOND_NS,
        idle_ns=idle_s * SECOND_NS,
        unbilled_ns=unbilled_s * SECOND_NS,
        invocations=4,
        estimated=False,
        sealed=True,
    )


def test_the_cost_of_a_window_by_hand() -> None:
    (price,) = book().prices
    spent = cost(window(), price)
    assert spent.gpu == Fraction("1.95") * 48 * 10 + Fraction("0.25") * 48 * 50
    assert spent.vcpu == 8 * 10
    assert spent.memory == Fraction("0.15") * 64 * 60
    assert spent.disk == Fraction("0.05") * 10 * 60
    assert spent.invocations == Fraction(4 * 75, 10_000)
    assert rounded(spent.total) == Decimal("2222.030000")


def test_always_on_prices_the_same_windows_as_all_active() -> None:
    (price,) = book().prices
    assert always_on_cost(window(10, 40, 10), price) == cost(window(60, 0, 0), price)


def test_unbilled_time_costs_nothing() -> None:
    (price,) = book().prices
    assert cost(window(10, 50, 3_600), price) == cost(window(10, 50, 0), price)


@given(st.lists(st.tuples(st.integers(0, 10**12), st.integers(0, 10**12)), min_size=1, max_size=20))
def test_a_bill_is_the_same_however_its_time_is_cut_into_windows(parts: list[tuple[int, int]]) -> None:
    windows = [replace(window(), active_ns=a, idle_ns=i, invocations=1) for a, i in parts]
    whole = replace(
        window(), active_ns=sum(a for a, _ in parts), idle_ns=sum(i for _, i in parts), invocations=len(parts)
    )
    assert cost_of_windows(windows, book())[:2] == cost_of_windows([whole], book())[:2]


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("NVIDIA A10", "ampere"),
        ("NVIDIA A100-SXM4-80GB", "ampere"),
        ("Tesla T4", "tesla"),
        ("NVIDIA L20", "ada"),
        ("NVIDIA GeForce RTX 4090", "ada"),
        ("NVIDIA H100 80GB HBM3", "hopper"),
        ("Emulated 16 GiB", "emulated"),
    ],
)
def test_a_model_finds_its_family(model: str, family: str) -> None:
    (price,) = book().prices
    assert next(f.name for f in price.gpu if f.matches(model)) == family


def test_a10_is_not_a100() -> None:
    (price,) = book().prices
    ampere = replace(next(f for f in price.gpu if f.name == "ampere"), models=("A10",))
    assert ampere.matches("NVIDIA A10")
    assert not ampere.matches("NVIDIA A100-SXM4-80GB")


def test_model_without_factors_has_no_gpu_cost() -> None:
    (price,) = book().prices
    spent = cost(replace(window(), gpu_model="Voodoo 2"), price)
    assert spent.gpu_unpriced
    assert spent.gpu == 0
    assert spent.vcpu == 80
    assert not cost(replace(window(), gpu_model="", gpu_count=0), price).gpu_unpriced


def test_a_new_price_holds_from_its_instant_on() -> None:
    document = yaml.safe_load(EXAMPLE.read_text())
    dearer = {**document["prices"][0], "valid_from": "2026-01-01T00:00:00+00:00", "unit_price": "2.5"}
    prices = parse_price_book({"prices": [*document["prices"], dearer]})
    boundary = prices.prices[1].valid_from_wall_ns
    old, new = replace(window(), start_wall_ns=boundary - 1), replace(window(), start_wall_ns=boundary)
    spent_old, _, _ = cost_of_windows([old], prices)
    spent_new, _, _ = cost_of_windows([new], prices)
    assert spent_new.total == spent_old.total * Fraction("2.5")
    assert [(start, end) for _, start, end in prices.periods()] == [(IN_2025, boundary), (boundary, None)]


def test_usage_before_the_first_price_is_counted_as_unpriced() -> None:
    spent, always_on, unpriced = cost_of_windows([replace(window(), start_wall_ns=IN_2025 - 1)], book())
    assert not spent.total
    assert not always_on.total
    assert unpriced == 1


def test_quantities_are_what_the_factors_multiply() -> None:
    amount = quantities(window())
    assert amount == Quantities(
        gpu_active_gib_s=Fraction(480),
        gpu_idle_gib_s=Fraction(2_400),
        vcpu_active_s=Fraction(80),
        vcpu_idle_s=Fraction(400),
        memory_gib_s=Fraction(3_840),
        disk_gib_s=Fraction(600),
        invocations=4,
    )


@pytest.mark.parametrize(
    ("amount", "shown"),
    [
        ("0.0000005", "0.000000"),
        ("0.0000015", "0.000002"),
        ("1", "1.000000"),
        ("123456789012345678901234567890.1", "123456789012345678901234567890.100000"),
    ],
)
def test_rounding_is_half_to_even_for_large_amounts_too(amount: str, shown: str) -> None:
    assert str(rounded(Fraction(amount))) == shown


def test_exact_text_is_plain_and_without_trailing_zeros() -> None:
    amounts = ["1.950", "100", "0", "0.000000001"]
    assert [exact_text(Fraction(a)) for a in amounts] == ["1.95", "100", "0", "0.000000001"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prices": []}, "prices must be a list"),
        ({"colour": 1}, "book.colour is not a known key"),
        ({"gpu": "x"}, r"prices\[0\].gpu must be a list"),
        ({"vcpu": {"active": -1, "idle": 0}}, r"prices\[0\].vcpu.active must not be negative"),
        ({"memory": "cheap"}, r"prices\[0\].memory must be a finite number"),
        ({"memory": float("nan")}, r"prices\[0\].memory must be a finite number"),
        ({"disk": True}, r"prices\[0\].disk must be a number"),
        ({"valid_from": "soon"}, r"prices\[0\].valid_from must be an instant"),
        ({"unit_pric": 2}, r"prices\[0\].unit_pric is not a known key"),
    ],
)
def test_a_wrong_price_book_names_the_key(change: dict[str, object], message: str) -> None:
    document = yaml.safe_load(EXAMPLE.read_text())
    (key,) = change
    target = document if key in ("prices", "colour") else document["prices"][0]
    target.update(change)
    with pytest.raises(ConfigError, match=message) as caught:
        parse_price_book(document, "book")
    assert caught.value.reason == "PRICE_BOOK_INVALID"


def test_prices_out_of_order_are_refused() -> None:
    document = yaml.safe_load(EXAMPLE.read_text())
    document["prices"] *= 2
    with pytest.raises(ConfigError, match="in the order of valid_from"):
        parse_price_book(document, "book")
