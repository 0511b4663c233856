"""How long operations take on the emulated hardware; real ones: agent/docs/facts/gpu-checkpoint.md, section 6."""

from __future__ import annotations

from dataclasses import dataclass

from agent.emulated.protocol import MessageOp

CHECKPOINT_PER_RESTORE = 1.5
"""A checkpoint takes 1.5 to 2 times as long as a restore of the same size."""


@dataclass(frozen=True, slots=True)
class Latency:
    """fixed + bytes / bandwidth. fixed_us: of every operation. bandwidth_bytes_s: of a restore; 0 = no limit."""

    fixed_us: int = 0
    bandwidth_bytes_s: int = 0

    def of(self, op: MessageOp, size: int) -> int:
        """Least duration in microseconds of an operation on `size` bytes."""
        match op:
            case MessageOp.LOCK | MessageOp.UNLOCK:
                return self.fixed_us
            case MessageOp.CHECKPOINT | MessageOp.RESTORE:
                copy = size * 1_000_000 // self.bandwidth_bytes_s if self.bandwidth_bytes_s else 0
                return self.fixed_us + (int(copy * CHECKPOINT_PER_RESTORE) if op is MessageOp.CHECKPOINT else copy)
            case _:
                return 0
