"""Times the steps of a freeze and a wake by wrapping the checkpointer and the process freezer.

The wrappers sit between the freezer and the real ones, so the production path itself is measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from agent.adapters.freezer.limits import failure
from agent.core.types import Handle
from agent.ports import (
    FREEZE_DEADLINE_S,
    Checkpointer,
    Clock,
    CudaCall,
    CudaOp,
    CudaReply,
    FreezerState,
    ProcessFreezer,
)

MAX_FAILURES = 100


class TimedCheckpointer:
    """A `Checkpointer` that adds up the time inside the driver's calls by operation. `failures`: failed calls,
    including those that the freezer recovered from."""

    def __init__(self, inner: Checkpointer) -> None:
        self._inner = inner
        self.failures: list[str] = []
        self._taken_us: defaultdict[CudaOp, int] = defaultdict(int)

    async def run(self, calls: Sequence[CudaCall], deadline_s: float, gpu_uuids: Sequence[str] = ()) -> CudaReply:
        reply = await self._inner.run(calls, deadline_s, gpu_uuids)
        for answer in reply.answers:
            self._taken_us[answer.call.op] += answer.elapsed_us
        if not reply.ok and len(self.failures) < MAX_FAILURES:
            self.failures.append(": ".join(failure(reply)))
        return reply

    def pop_ns(self, op: CudaOp) -> int:
        """The time since the last call for `op`."""
        return self._taken_us.pop(op, 0) * 1000


class TimedProcessFreezer:
    """A `ProcessFreezer` that records the duration of the last freeze and thaw."""

    def __init__(self, inner: ProcessFreezer, clock: Clock) -> None:
        self._inner = inner
        self._clock = clock
        self.name = inner.name
        self.freeze_ns = 0
        self.thaw_ns = 0

    async def freeze(self, handle: Handle, deadline_s: float = FREEZE_DEADLINE_S) -> None:
        begin = self._clock.monotonic_ns()
        await self._inner.freeze(handle, deadline_s)
        self.freeze_ns = self._clock.monotonic_ns() - begin

    async def thaw(self, handle: Handle, deadline_s: float = FREEZE_DEADLINE_S) -> None:
        begin = self._clock.monotonic_ns()
        await self._inner.thaw(handle, deadline_s)
        self.thaw_ns = self._clock.monotonic_ns() - begin

    def state(self, handle: Handle) -> FreezerState:
        return self._inner.state(handle)

    def is_frozen(self, handle: Handle) -> bool:
        return self._inner.is_frozen(handle)
