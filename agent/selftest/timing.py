"""What the steps of a freeze and a wake take: a checkpointer and a process freezer that keep the time of another one.

They stand between the freezer and the real ones, so what is measured is the production path itself.
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

MAX_TROUBLES = 100


class TimedCheckpointer:
    """`agent.ports.Checkpointer`: adds up the time inside the driver's calls, by operation. `troubles` tells of calls
    that failed, also where the freezer made it good: a wake that succeeds at the second attempt is worth knowing."""

    def __init__(self, inner: Checkpointer) -> None:
        self._inner = inner
        self.troubles: list[str] = []
        self._taken_us: defaultdict[CudaOp, int] = defaultdict(int)

    async def run(self, calls: Sequence[CudaCall], deadline_s: float, gpu_uuids: Sequence[str] = ()) -> CudaReply:
        reply = await self._inner.run(calls, deadline_s, gpu_uuids)
        for answer in reply.answers:
            self._taken_us[answer.call.op] += answer.elapsed_us
        if not reply.ok and len(self.troubles) < MAX_TROUBLES:
            self.troubles.append(": ".join(failure(reply)))
        return reply

    def take_ns(self, op: CudaOp) -> int:
        """The time since it was last asked for."""
        return self._taken_us.pop(op, 0) * 1000


class TimedProcessFreezer:
    """`ProcessFreezer`: remembers how long the last freeze and the last thaw took."""

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
