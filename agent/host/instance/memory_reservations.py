"""The shell of the host-memory ledger: asks the host what is free, keeps the promises, raises and lowers the instances'
own memory limits.

Whatever writes to a disk runs in order on one thread of its own: the loop never waits for it, a freeze only where a
limit has to be raised, and a wake never.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from agent.core.errors import PreconditionError, UnavailableError
from agent.core.gpus.host_memory import MARGIN_BYTES, MemoryLedger
from agent.core.types import Handle
from agent.log import get_logger
from agent.ports import HostMemory

DISK_DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True)
class ImageSize:
    """Of a GPU image. `estimated`: it is no larger than this."""

    bytes: int = 0
    estimated: bool = False


UNMEASURED = ImageSize()


class MemoryReservations:
    """All reservations of this node; one writer, on the loop."""

    def __init__(
        self,
        memory: HostMemory,
        *,
        limit_bytes: int,
        reserve_bytes: int,
        disk_deadline_s: float = DISK_DEADLINE_S,
    ) -> None:
        self._memory = memory
        self.ledger = MemoryLedger(limit_bytes, reserve_bytes)
        self._deadline_s = disk_deadline_s
        self._declared: dict[str, int] = {}  # of those that share their GPU; 0 = nobody said
        self._asked: set[str] = set()  # a raise may be under way, or have happened
        self._noted: dict[str, int] = {}
        self._thread = ThreadPoolExecutor(1, "host-memory")
        self._changing: Future[None] | None = None  # the limit that was changed last
        self._closed = False
        self._log = get_logger()

    def available_bytes(self) -> int:
        """What the host could give now, reclaimable cache included."""
        return self._memory.available_bytes()

    def close(self) -> None:
        """What was begun on the thread still ends; nothing new is."""
        self._closed = True
        self._thread.shutdown(wait=False)

    # ---- sharers of a GPU -----------------------------------------------------------------------------------------

    def pledge(self, uid: str, declared_bytes: int) -> None:
        """Promise memory for the life of an instance that shares its GPU; 0 = it is not known yet, see `measured`.

        Raises PreconditionError HOST_MEMORY_SHORT.
        """
        self._pledge(uid, declared_bytes)
        self._declared[uid] = declared_bytes

    def measured(self, uid: str, vram_bytes: int) -> None:
        """What an instance has on its GPU. A sharer's pledge follows it, and is never less than was declared.

        Raises PreconditionError HOST_MEMORY_SHORT if nothing was declared and this can't be promised: such an instance
        could never make room for those it shares with. (If something was declared each freeze is admitted by itself.)
        """
        declared = self._declared.get(uid)
        if declared is None:
            return
        try:
            self._pledge(uid, max(declared, vram_bytes))
        except PreconditionError:
            if not declared:
                raise

    def _pledge(self, uid: str, floor_bytes: int) -> None:
        self.ledger, short = self.ledger.pledge(uid, floor_bytes, self._memory.available_bytes())
        _raise_if(short)

    # ---- recovery -------------------------------------------------------------------------------------------------

    def frozen_image(self, uid: str, pids: Collection[int]) -> ImageSize:
        """Recovery: the size that was noted before the freeze, else all that its processes have in host memory."""
        noted = self._memory.noted_image(uid)
        if noted is not None:
            self._noted[uid] = noted
            return ImageSize(noted)
        return ImageSize(self._memory.resident_bytes(pids), estimated=True)

    def recovered(self, uid: str, declared_bytes: int | None, size: ImageSize, *, frozen: bool) -> None:
        """Recovery: an instance that was admitted before. `declared_bytes` None = it shares no GPU; `size` is what it
        has on its GPU, or of its image if it is frozen."""
        if declared_bytes is not None:
            self._declared[uid] = declared_bytes
            self.ledger = self.ledger.promised(uid, declared_bytes or size.bytes)
        if frozen:
            self.ledger = self.ledger.took(uid, size.bytes, estimated=size.estimated)

    async def restore_limits(self, living: Collection[str], frozen: Collection[str]) -> None:
        """Recovery: lower the limits that an earlier agent left raised, except of who is frozen."""
        self._changing = self._in_order("recover", lambda: self._memory.recover(living, frozen))
        if not await self._changed():
            self._log.warning("host_memory.recovery_slow", deadline_s=self._deadline_s)

    # ---- freeze and wake ------------------------------------------------------------------------------------------

    async def reserve(self, handle: Handle, image_bytes: int) -> None:
        """Promise memory for one freeze: the node's ledger and every cgroup limit above the instance, whose own is
        raised if it has to be.

        Raises PreconditionError HOST_MEMORY_SHORT, UnavailableError HOST_MEMORY_UNKNOWN. After either, or if no freeze
        follows, `restored` undoes it.
        """
        if not await self._changed():
            raise UnavailableError(
                "HOST_MEMORY_UNKNOWN",
                f"a memory limit is being written for over {self._deadline_s:g} s; is the disk of state_dir stuck?",
            )
        headroom = self._memory.headroom_bytes(handle) if image_bytes else None
        self.ledger, short = self.ledger.reserve(handle.uid, image_bytes, self._memory.available_bytes())
        _raise_if(short)
        if headroom is not None and headroom < image_bytes + MARGIN_BYTES:
            why = await self._raise_limit(handle, image_bytes)
            if why:
                self.ledger = self.ledger.restored(handle.uid)
                raise PreconditionError(
                    "HOST_MEMORY_SHORT",
                    f"the instance's memory limit leaves {headroom} bytes, its GPU image needs {image_bytes} "
                    f"and a margin of {MARGIN_BYTES}; {why}",
                )
        if self._noted.get(handle.uid) != image_bytes:
            self._noted[handle.uid] = image_bytes
            self._in_order("note_image", lambda: self._memory.note_image(handle.uid, image_bytes))

    async def _raise_limit(self, handle: Handle, image_bytes: int) -> str:
        """ "" or why not."""
        answer: list[str] = []
        self._asked.add(handle.uid)
        raising = lambda: answer.append(self._memory.raise_limit(handle, image_bytes))  # noqa: E731
        self._changing = self._in_order("raise_limit", raising)
        if not await self._changed():
            return f"raising it takes more than {self._deadline_s:g} s; is the disk of state_dir stuck?"
        return answer[0] if answer else "raising it failed, see the agent's log; raise its memorySize"

    def took(self, uid: str, image_bytes: int) -> None:
        """The checkpoint holds this much now; 0 = nobody measured, so it is what was reserved."""
        reserved = self.ledger.reservations.get(uid)
        self.ledger = self.ledger.took(uid, image_bytes or (reserved.image_bytes if reserved else 0))

    def restored(self, uid: str) -> None:
        """The image is gone again."""
        self.ledger = self.ledger.restored(uid)
        if uid in self._asked or self._memory.limit_raised(uid):
            self._asked.discard(uid)
            self._changing = self._in_order("lower_limit", lambda: self._memory.lower_limit(uid))

    def forget(self, uid: str) -> None:
        """The instance is gone."""
        self.ledger = self.ledger.forget(uid)
        self._declared.pop(uid, None)
        known = uid in self._noted or uid in self._asked or self._memory.limit_raised(uid)
        self._noted.pop(uid, None)
        self._asked.discard(uid)
        if known:
            self._in_order("forget", lambda: self._memory.forget(uid))

    # ---- the thread -----------------------------------------------------------------------------------------------

    def _in_order(self, what: str, work: Callable[[], object]) -> Future[None]:
        """Queue `work`; as many wait as there are instances that froze, woke or ended meanwhile. Never fails."""

        def run() -> None:
            try:
                work()
            except Exception as error:  # a disk's failure, mostly; nothing of the instance depends on it
                self._log.warning("host_memory.failed", operation=what, error=str(error))

        if self._closed:
            done: Future[None] = Future()
            done.set_result(None)
            return done
        return self._thread.submit(run)

    async def _changed(self) -> bool:
        """Wait until the limit that was changed last is changed; False after the deadline."""
        changing = self._changing
        if changing is not None and not changing.done():
            await asyncio.wait({asyncio.wrap_future(changing)}, timeout=self._deadline_s)
            return changing.done()
        return True


def _raise_if(short: str) -> None:
    if short:
        raise PreconditionError("HOST_MEMORY_SHORT", f"{short}; the instance stays awake")
