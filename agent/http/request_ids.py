"""Request ids: what `x-fc-request-id` holds."""

from __future__ import annotations

from collections.abc import Callable


class RequestIds:
    """Makes request ids in Function Compute's shape: `1-67a59f35-150c1267-f381ba1c085c`.

    Version, Unix seconds, 32 random bits, 48 random bits. `random_bits` works like `random.getrandbits`.
    """

    __slots__ = ("_random_bits", "_wall_s")

    def __init__(self, wall_s: Callable[[], int], random_bits: Callable[[int], int]) -> None:
        self._wall_s = wall_s
        self._random_bits = random_bits

    def __call__(self) -> str:
        bits = self._random_bits(80)
        return f"1-{self._wall_s() & 0xFFFFFFFF:08x}-{bits >> 48:08x}-{bits & 0xFFFFFFFFFFFF:012x}"
