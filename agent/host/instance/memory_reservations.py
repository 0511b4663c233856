"""Reserves host memory for GPU images: keeps the ledger, and raises and lowers the instances' own memory limits.

Disk writes run in order on one thread. The loop and a wake never wait for them, a freeze only for changes of a
memory limit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from agent.core.errors import PreconditionError, UnavailableError
from agent.core.gpus.host_memory import MARGIN_BYTES, MemoryLedger
from agent.core.sizes import size_text
from agent.core.types import Handle
from agent.log import get_logger
from agent.ports import HostMemory

DISK_DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True)
class ImageSize:
    """Size of a GPU image. `estimated`: an upper bound."""

    bytes: int = 0
    estimated: bool = False


UNMEASURED = ImageSize()


class MemoryReservations:
    """All reservations of this node; one writer, on the loop."""

    def __init__(
        self, memory: HostMemory, *, limit_bytes: int, reserve_bytes: int, disk_deadline_s: float = DISK_DEADLINE_S
    ) -> None:
        self._memory = memory
        self.ledger = MemoryLedger(limit_bytes, reserve_bytes)
        self._deadline_s = disk_deadline_s
        self._declared: dict[str, int] = {}  # VRAM of instances that share their GPU; 0 = not declared
        self._raised: set[str] = set()  # limits that were raised, or are being raised
        self._noted: dict[str, int] = {}
        self._thread = ThreadPoolExecutor(1, "host-memory")
        self._changing: Future[None] | None = None  # the latest change of a limit
        self._closed = False
        self._log = get_logger()

    def available_bytes(self) -> int:
        """Memory that the host can give now, reclaimable cache included."""
        return self._memory.available_bytes()

    def close(self) -> None:
        """Begin nothing new on the thread; what is queued there still runs."""
        self._closed = True
        self._thread.shutdown(wait=False)

    # ---- sharers of a GPU -----------------------------------------------------------------------------------------

    def pledge(self, uid: str, declared_bytes: int) -> None:
        """Promise memory for the life of an instance that shares its GPU; 0 = not known yet, see `measured`.

        Raises PreconditionError HOST_MEMORY_SHORT.
        """
        self._pledge(uid, declared_bytes)
        self._declared[uid] = declared_bytes

    def measured(self, uid: str, vram_bytes: int) -> None:
        """Raise a sharer's pledge to its measured VRAM; it never goes below the declared size.

        Raises PreconditionError HOST_MEMORY_SHORT if no size was declared and the memory can't be promised: then the
        instance could never be frozen for the others on its GPU. (With a declared size each freeze is admitted anew.)
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
        """Recovery: the size noted before the freeze, else all host memory of its processes."""
        noted = self._memory.noted_image(uid)
        if noted is not None:
            self._noted[uid] = noted
            return ImageSize(noted)
        return ImageSize(self._memory.resident_bytes(pids), estimated=True)

    def recovered(self, uid: str, declared_bytes: int | None, size: ImageSize, *, frozen: bool) -> None:
        """Recovery: enter an instance that an earlier agent admitted. `declared_bytes` None = it shares no GPU; `size`:
        of its image if it is frozen, else of its VRAM."""
        if declared_bytes is not None:
            self._declared[uid] = declared_bytes
            self.ledger = self.ledger.promised(uid, declared_bytes or size.bytes)
        if frozen:
            self.ledger = self.ledger.took(uid, size.bytes, estimated=size.estimated)

    async def restore_limits(self, living: Collection[str], frozen: Collection[str]) -> None:
        """Recovery: lower the limits that an earlier agent left raised, except those of frozen instances."""
        self._changing = self._in_order("recover", lambda: self._memory.recover(living, frozen))
        if not await self._changed():
            self._log.warning("host_memory.recovery_slow", deadline_s=self._deadline_s)

    # ---- freeze and wake ------------------------------------------------------------------------------------------

    async def reserve(self, handle: Handle, image_bytes: int) -> None:
        """Promise memory for one freeze, within the node's ledger and every cgroup limit above the instance. The
        instance's own limit is raised if necessary.

        Raises PreconditionError HOST_MEMORY_SHORT, UnavailableError HOST_MEMORY_UNKNOWN. `restored` undoes it, also
        after either error.
        """
        if not await self._changed():
            raise UnavailableError(
                "HOST_MEMORY_UNKNOWN",
                f"writing a memory limit takes more than {self._deadline_s:g} s; is the disk of state_dir stuck?",
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
                    f"the instance's memory limit leaves {size_text(headroom)}, its GPU image needs "
                    f"{size_text(image_bytes)} and a margin of {size_text(MARGIN_BYTES)}; {why}",
                )
        if self._noted.get(handle.uid) != image_bytes:
            self._noted[handle.uid] = image_bytes
            self._in_order("note_image", lambda: self._memory.note_image(handle.uid, image_bytes))

    async def _raise_limit(self, handle: Handle, image_bytes: int) -> str:
        """Raise the instance's own limit. Returns "" or why that failed."""
        answer: list[str] = []
        self._raised.add(handle.uid)
        raising = lambda: answer.append(self._memory.raise_limit(handle, image_bytes))  # noqa: E731
        self._changing = self._in_order("raise_limit", raising)
        if not await self._changed():
            return f"raising the limit takes more than {self._deadline_s:g} s; is the disk of state_dir stuck?"
        return answer[0] if answer else "raising the limit failed, see the agent's log; or raise its memorySize"

    def took(self, uid: str, image_bytes: int) -> None:
        """The checkpoint took this much host memory; 0 = not measured, so the reserved size counts."""
        reserved = self.ledger.reservations.get(uid)
        self.ledger = self.ledger.took(uid, image_bytes or (reserved.image_bytes if reserved else 0))

    def restored(self, uid: str) -> None:
        """The image is gone or was never made: end its reservation, lower the limit that was raised for it."""
        self.ledger = self.ledger.restored(uid)
        if uid in self._raised or self._memory.limit_raised(uid):
            self._raised.discard(uid)
            self._changing = self._in_order("lower_limit", lambda: self._memory.lower_limit(uid))

    def forget(self, uid: str) -> None:
        """The instance is gone."""
        self.ledger = self.ledger.forget(uid)
        self._declared.pop(uid, None)
        known = uid in self._noted or uid in self._raised or self._memory.limit_raised(uid)
        self._noted.pop(uid, None)
        self._raised.discard(uid)
        if known:
            self._in_order("forget", lambda: self._memory.forget(uid))

    # ---- the thread -----------------------------------------------------------------------------------------------

    def _in_order(self, what: str, work: Callable[[], object]) -> Future[None]:
        """Queue `work` on the thread; after `close` nothing is queued. Never fails: an error of `work` is logged."""

        def run() -> None:
            try:
                work()
            except Exception as error:  # mostly a disk failure; the instance does not depend on it
                self._log.warning("host_memory.failed", operation=what, error=str(error))

        if self._closed:
            done: Future[None] = Future()
            done.set_result(None)
            return done
        return self._thread.submit(run)

    async def _changed(self) -> bool:
        """Wait until the last change of a limit is done; False after the deadline."""
        changing = self._changing
        if changing is not None and not changing.done():
            await asyncio.wait({asyncio.wrap_future(changing)}, timeout=self._deadline_s)
            return changing.done()
        return True


def _raise_if(short: str) -> None:
    if short:
        raise PreconditionError("HOST_MEMORY_SHORT", f"{short}: no room for its GPU image")
