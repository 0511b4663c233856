"""How the time of a proof is shared."""

from __future__ import annotations

import pytest

from agent.core.types import GIB
from agent.selftest.proof.budget import Share, allow, choose_sizes, predict_s
from agent.selftest.proof.steps import Options, shares_of

SHARES = [Share("a", 10, 50), Share("b", 20, 100), Share("c", 30, 400)]


def test_what_later_steps_need_is_kept_back() -> None:
    assert allow(SHARES, 0, 1000) == 50  # its most
    assert allow(SHARES, 0, 80) == 30  # 50 are kept for b and c
    assert allow(SHARES, 1, 80) == 50
    assert allow(SHARES, 2, 300) == 300


def test_the_last_steps_fall_away_first() -> None:
    assert allow(SHARES, 0, 15) == 10
    assert allow(SHARES, 1, 20) == 20
    assert allow(SHARES, 2, 29) is None


def test_all_steps_of_a_whole_proof_fit_into_eight_minutes() -> None:
    """Each may take what it is allowed, and every later one still gets what it needs."""
    shares = shares_of(Options(tuple(round(gib * GIB) for gib in (0.25, 1, 8, 32)), 100, "", 480))
    names = [share.name for share in shares]
    assert names.index("selftest 8 GiB") < names.index("cycles") < names.index("selftest 32 GiB")
    remaining = 470.0
    for index, share in enumerate(shares):
        allowed = allow(shares, index, remaining)
        assert allowed is not None, share.name
        assert share.need_s <= allowed <= share.most_s
        remaining -= allowed
    assert remaining >= 0


def test_a_larger_size_is_predicted_from_smaller_ones() -> None:
    measured = [(GIB // 4, 0.35), (GIB, 1.1)]
    assert predict_s(measured, 8 * GIB, 4) == pytest.approx((0.1 + 8) * 4 * 1.25)
    assert predict_s([(GIB, 1.0)], 4 * GIB, 2) == pytest.approx(4 * 2 * 1.25)  # no fixed cost is assumed
    assert predict_s([(GIB // 4, 3.0), (GIB, 1.0)], 8 * GIB, 1) >= 1.0  # noise
    assert predict_s([], GIB, 3) == 0


@pytest.mark.parametrize(
    ("room_gib", "expected"),
    [
        (64.0, ([1, 8, 32], [])),
        (23.6, ([1, 8, 23.5], [32])),
        (9.0, ([1, 8], [32])),  # nearly the same again teaches nothing
        (3.0, ([1, 3], [8, 32])),
        (0.6, ([0.5], [1, 8, 32])),
        (0.1, ([], [1, 8, 32])),
        (-1.0, ([], [1, 8, 32])),
    ],
)
def test_a_size_without_room_gives_way_to_the_room(room_gib: float, expected: tuple[list[float], list[float]]) -> None:
    fit, rest = choose_sizes([GIB, 8 * GIB, 32 * GIB], round(room_gib * GIB))
    assert ([size / GIB for size in fit], [size / GIB for size in rest]) == expected
