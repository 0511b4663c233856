"""How the time of a proof is shared: no step takes what a later one needs, and none begins that cannot end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agent.core.types import GIB
from agent.selftest.proof.figures import fit_line

GB = 1_000_000_000
SAFETY = 1.25
"""Factor on a predicted time."""


@dataclass(frozen=True, slots=True)
class Share:
    """A step takes at least `need_s`, and never more than `most_s`."""

    name: str
    need_s: float
    most_s: float


def allow(shares: Sequence[Share], index: int, remaining_s: float) -> float | None:
    """Seconds for the step `index` with `remaining_s` left; None = no time left for it.

    What later steps need is kept back, but a step is never refused for a later one: the last ones fall away first.
    """
    share = shares[index]
    if remaining_s < share.need_s:
        return None
    later = sum(one.need_s for one in shares[index + 1 :])
    return min(share.most_s, max(share.need_s, remaining_s - later))


def selftest_share(name: str, size_bytes: int) -> Share:
    """The share of a selftest of that size, before anything is known of the host."""
    gib = size_bytes / GIB
    return Share(name, 16 + 5 * gib, 60 if gib <= 1 else 110 if gib <= 8 else 400)


def predict_s(measured: Sequence[tuple[int, float]], size_bytes: int, rounds: int) -> float:
    """Seconds of a selftest of that size with `rounds` freezes, the warm-up's included, from (bytes, seconds a round)
    of smaller ones; 0 if nothing was measured."""
    if not measured:
        return 0.0
    line = fit_line([(size / GB, seconds) for size, seconds in measured])
    largest, seconds = max(measured)
    least = seconds * min(1.0, size_bytes / largest)  # noise between small sizes must not predict too little
    a_round = max(line.at(size_bytes / GB), least) if line else seconds * max(1.0, size_bytes / largest)
    return a_round * rounds * SAFETY


def choose_sizes(wanted: Sequence[int], room_bytes: int) -> tuple[list[int], list[int]]:
    """Sizes that fit into `room_bytes`, ascending, and those that do not.

    The smallest that does not fit gives way to the room, in whole quarters of a GiB, if that is well above the others.
    """
    sizes = sorted(set(wanted))
    fit, rest = [size for size in sizes if size <= room_bytes], [size for size in sizes if size > room_bytes]
    quarter = room_bytes // (GIB // 4) * (GIB // 4)
    if rest and quarter >= 1.5 * max(fit, default=0) and quarter:
        return [*fit, quarter], rest
    return fit, rest
