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
    """The least-squares line through `n` points (10^9 bytes, seconds): a fixed cost and a cost for each GB.

    `sizes`: how many different sizes there are. `worst_residual_s`: the largest distance of a point from the line."""

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
    sizes = {gb for gb, _ in points}
    if len(sizes) < 2:
        return None
    slope, intercept = statistics.linear_regression([gb for gb, _ in points], [s for _, s in points])
    worst = max(abs(s - intercept - slope * gb) for gb, s in points)
    return Line(len(points), len(sizes), intercept, slope, worst)
