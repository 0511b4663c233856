"""Spreads and lines through measured points."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """What `n` measurements of one thing were."""

    n: int
    median: float
    min: float
    max: float


def figure_of(values: Iterable[float]) -> dict[str, float | int] | None:
    """The figure as JSON has it; None without values."""
    found = list(values)
    return asdict(Figure(len(found), statistics.median(found), min(found), max(found))) if found else None


@dataclass(frozen=True, slots=True)
class Line:
    """The line through `n` points (10^9 bytes, seconds): a fixed cost and a cost for each GB.

    Least squares through the median of each of the `sizes`, so that one slow run does not turn the line.
    `worst_residual_s`: the largest distance of any point from it."""

    n: int
    sizes: int
    intercept_s: float
    s_per_gb: float
    worst_residual_s: float

    @property
    def gb_s(self) -> float:
        """The speed without the fixed cost; 0 if time does not grow with size."""
        return 1 / self.s_per_gb if self.s_per_gb > 0 else 0.0

    def at(self, gb: float) -> float:
        return self.intercept_s + self.s_per_gb * gb


def fit_line(points: Sequence[tuple[float, float]]) -> Line | None:
    """None with fewer than two different sizes, through which there is no one line."""
    of_size: dict[float, list[float]] = {}
    for gb, seconds in points:
        of_size.setdefault(gb, []).append(seconds)
    if len(of_size) < 2:
        return None
    medians = [statistics.median(of_size[gb]) for gb in of_size]
    slope, intercept = statistics.linear_regression(list(of_size), medians)
    worst = max(abs(s - intercept - slope * gb) for gb, s in points)
    return Line(len(points), len(of_size), intercept, slope, worst)
