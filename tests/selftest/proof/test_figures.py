"""Figures, lines through points, and what many cycles show."""

from __future__ import annotations

from typing import Any

import pytest

from agent.core.types import MIB
from agent.selftest.proof.cycles import MOST_GROWTH, problem_of, summarize_cycles
from agent.selftest.proof.figures import figure_of, fit_line


def test_a_figure_says_how_many_values_it_has() -> None:
    assert figure_of([3.0, 1.0, 2.0, 10.0]) == {"n": 4, "median": 2.5, "min": 1.0, "max": 10.0}
    assert figure_of([]) is None


def test_the_line_of_a_known_driver_is_found() -> None:
    """20 ms for each operation and 4 GB/s."""
    points = [(gb, 0.02 + gb / 4) for gb in (0.25, 1.0, 1.0, 8.0)]
    line = fit_line(points)
    assert line is not None
    assert (line.n, line.sizes) == (4, 3)
    assert line.intercept_s == pytest.approx(0.02)
    assert line.gb_s == pytest.approx(4.0)
    assert line.worst_residual_s == pytest.approx(0, abs=1e-9)
    assert line.at(2.0) == pytest.approx(0.52)


def test_one_slow_run_does_not_turn_the_line() -> None:
    points = [(gb, 0.1 + gb) for gb in (1.0, 1.0, 1.0, 3.0, 3.0, 3.0)]
    line = fit_line([*points, (3.0, 30.0)])
    assert line is not None
    assert (line.n, line.sizes) == (7, 2)
    assert line.s_per_gb == pytest.approx(1.0)
    assert line.worst_residual_s == pytest.approx(26.9)


def test_noise_shows_as_a_residual() -> None:
    line = fit_line([(1.0, 1.0), (2.0, 2.0), (3.0, 6.0)])
    assert line is not None
    assert line.worst_residual_s == pytest.approx(1.0)


@pytest.mark.parametrize("points", [[], [(1.0, 2.0)], [(1.0, 2.0), (1.0, 3.0)]])
def test_one_size_has_no_line(points: list[tuple[float, float]]) -> None:
    assert fit_line(points) is None


def test_time_that_does_not_grow_has_no_speed() -> None:
    line = fit_line([(1.0, 2.0), (2.0, 1.0)])
    assert line is not None
    assert line.gb_s == 0


def run(number: int, *, wake_s: float = 1.0, free: int = 0, program: int = 0, agent: int = 0) -> dict[str, Any]:
    memory = {"gpu_free_bytes": (1 << 34) - free, "program_bytes": program, "agent_bytes": agent}
    return {"counted": number > 0, "bytes_equal": True, "freeze_s": 2.0, "wake_s": wake_s, "memory": memory}


def test_drift_compares_the_last_ten_with_the_first_ten() -> None:
    runs = [run(0, wake_s=50.0), *(run(n, wake_s=1.0 if n <= 50 else 3.0) for n in range(1, 101))]
    found = summarize_cycles(runs)
    assert (found["done"], found["equal"]) == (100, 100)
    assert (found["first"]["wake_s"]["n"], found["last"]["wake_s"]["n"]) == (10, 10)
    assert found["drift"] == {"freeze_s": 1.0, "wake_s": 3.0}


def test_few_cycles_are_halved_so_that_none_counts_twice() -> None:
    found = summarize_cycles([run(0), *(run(n, wake_s=float(n)) for n in range(1, 6))])
    assert (found["first"]["wake_s"]["max"], found["last"]["wake_s"]["min"]) == (2.0, 4.0)
    assert summarize_cycles([run(0), run(1)])["drift"]["wake_s"] is None


@pytest.mark.parametrize("name", MOST_GROWTH)
def test_memory_that_grows_with_every_cycle_is_a_leak(name: str) -> None:
    key = {"gpu": "free"}.get(name, name)
    leaking = [run(n, **{key: n * 2 * MIB}) for n in range(101)]
    steady = [run(n, **{key: 5 * MIB if n == 50 else 0}) for n in range(101)]
    assert problem_of(leaking) == f"{name} memory grew by 180 MiB"
    assert problem_of(steady) == ""
