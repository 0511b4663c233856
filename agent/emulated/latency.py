"""How long operations take on the emulated hardware; real ones: agent/docs/facts/gpu-checkpoint.md, section 6."""

from __future__ import annotations

from dataclasses import dataclass

from agent.core.gpus.speeds import CHECKPOINT_PER_RESTORE, CardSpeeds
from agent.emulated.protocol import MessageOp


@dataclass(frozen=True, slots=True)
class Latency:
    """What an operation takes at least.

    fixed_us: of every operation. bandwidth_bytes_s: of a restore; a checkpoint is slower by CHECKPOINT_PER_RESTORE;
    0 = no limit. card: the speeds of a real card, in place of a bandwidth; None = no card."""

    fixed_us: int = 0
    bandwidth_bytes_s: int = 0
    card: CardSpeeds | None = None

    def of(self, op: MessageOp, size: int) -> int:
        """Least duration in microseconds of an operation on `size` bytes."""
        match op:
            case MessageOp.LOCK | MessageOp.UNLOCK:
                return self.fixed_us
            case MessageOp.CHECKPOINT:
                return self.fixed_us + self._checkpoint_us(size)
            case MessageOp.RESTORE:
                return self.fixed_us + self._restore_us(size)
            case _:
                return 0

    def _checkpoint_us(self, size: int) -> int:
        return self.card.freeze_ns(size) // 1000 if self.card else int(self._copy_us(size) * CHECKPOINT_PER_RESTORE)

    def _restore_us(self, size: int) -> int:
        return self.card.wake_ns(size) // 1000 if self.card else self._copy_us(size)

    def _copy_us(self, size: int) -> int:
        return size * 1_000_000 // self.bandwidth_bytes_s if self.bandwidth_bytes_s else 0
