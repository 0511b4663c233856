"""How long the driver takes to freeze and wake on cards that others have measured: fixed time + bytes / bandwidth.

Sources: agent/docs/facts/gpu-checkpoint.md, section 6. For the emulated driver and the simulator; no deadline depends
on them.
"""

from __future__ import annotations

from dataclasses import dataclass

from agent.core.types import SECOND_NS

CHECKPOINT_PER_RESTORE = 2.5
"""The copy to the host takes 2.5 (A10G) to 3.6 (A100) times as long as the copy back."""


@dataclass(frozen=True, slots=True)
class CardSpeeds:
    """The driver's own copies between GPU and host memory, in bytes a second, and what each takes besides.

    `wake_fixed_ns` stands for contexts and modules that are built anew. It is the least that was seen of a program with
    a framework; up to 15 s were.
    """

    freeze_bytes_s: int
    wake_bytes_s: int
    freeze_fixed_ns: int = SECOND_NS // 2
    wake_fixed_ns: int = SECOND_NS

    def freeze_ns(self, bytes_: int) -> int:
        return self.freeze_fixed_ns + bytes_ * SECOND_NS // self.freeze_bytes_s

    def wake_ns(self, bytes_: int) -> int:
        return self.wake_fixed_ns + bytes_ * SECOND_NS // self.wake_bytes_s


DEFAULT_CARD = "a10g"
"""The slower of those whose freezes were measured."""

CARDS = {
    "a10g": CardSpeeds(freeze_bytes_s=1_900_000_000, wake_bytes_s=4_700_000_000),
    "a100": CardSpeeds(freeze_bytes_s=1_950_000_000, wake_bytes_s=7_000_000_000),
    # Its wakes were measured; its freezes were not, so they have the A100's figures.
    "b200": CardSpeeds(freeze_bytes_s=1_950_000_000, wake_bytes_s=8_300_000_000, wake_fixed_ns=7 * SECOND_NS // 10),
}
