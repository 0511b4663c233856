"""Statistics of benchmarks: percentiles, spread, and ratios with confidence intervals."""

from __future__ import annotations

import os
import platform
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

RESAMPLES = 1000
SEED = 1


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` % of the values do not exceed (nearest rank)."""
    return sorted(values)[_rank(len(values), percent) - 1]


def _rank(count: int, percent: float) -> int:
    return max(1, int(-(-count * percent // 100)))


def summary(values: Sequence[float]) -> dict[str, float]:
    """p50, p99 and spread of a series."""
    return {
        "p50": round(percentile(values, 50), 3),
        "p99": round(percentile(values, 99), 3),
        "p25": round(percentile(values, 25), 3),
        "p75": round(percentile(values, 75), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ratio of the same percentile of two series; `low` to `high` is its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def as_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def ratio(ours: Sequence[float], rivals: Sequence[float], percent: float) -> Ratio:
    """Ratio of our percentile to the rival's. Seeded, so that equal data give an equal result."""
    source = random.Random(SEED)
    up, down = sorted(ours), sorted(rivals)
    found = sorted(_redrawn(up, percent, source) / _redrawn(down, percent, source) for _ in range(RESAMPLES))
    value = percentile(up, percent) / percentile(down, percent)
    return Ratio(round(value, 4), round(percentile(found, 2.5), 4), round(percentile(found, 97.5), 4))


def _redrawn(ordered: Sequence[float], percent: float, source: random.Random) -> float:
    """The percentile of a resample with replacement, drawn directly: the k-th smallest of n uniform draws has the
    distribution Beta(k, n - k + 1)."""
    count = len(ordered)
    rank = _rank(count, percent)
    return ordered[min(count - 1, int(source.betavariate(rank, count - rank + 1) * count))]


def machine() -> dict[str, Any]:
    """The machine of a run, for its result."""
    return {"cpus": os.cpu_count(), "kernel": platform.release(), "load_1m": round(os.getloadavg()[0], 2)}


def row(title: str, cells: Iterable[object], decimals: int = 3) -> str:
    """A line of a table of times."""
    return f"{title:<34}" + "".join(f"{f'{c:.{decimals}f}' if isinstance(c, float) else c:>10}" for c in cells)
