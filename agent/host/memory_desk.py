"""The shell of the host-memory ledger: asks the host what is free, keeps the promises."""

from __future__ import annotations

from agent.core.errors import PreconditionError
from agent.core.host_memory import MARGIN_BYTES, MemoryLedger
from agent.core.types import Handle
from agent.ports import HostMemory


class MemoryDesk:
    """All reservations of this node; synchronous, one writer."""

    def __init__(self, memory: HostMemory, *, limit_bytes: int, reserve_bytes: int) -> None:
        self._memory = memory
        self.ledger = MemoryLedger(limit_bytes, reserve_bytes)

    def available_bytes(self) -> int:
        """What the host could give now, reclaimable cache included."""
        return self._memory.available_bytes()

    def pledge(self, uid: str, floor_bytes: int) -> None:
        """Promise memory for an instance's life (GPU sharers). Raises PreconditionError HOST_MEMORY_SHORT."""
        self.ledger, short = self.ledger.pledge(uid, floor_bytes, self._memory.available_bytes())
        _raise_if(short)

    def recovered(self, uid: str, floor_bytes: int, *, frozen: bool) -> None:
        """Recovery: the pledge of an instance that was admitted before, and its image if it is frozen. Nobody knows
        the size of that any more; where there is a pledge, that is what it is taken for."""
        self.ledger = self.ledger.promised(uid, floor_bytes)
        if frozen:
            self.ledger = self.ledger.took(uid, floor_bytes)

    def reserve(self, handle: Handle, image_bytes: int) -> None:
        """Promise memory for one freeze: the node's ledger and every cgroup limit above the instance.

        Raises PreconditionError HOST_MEMORY_SHORT.
        """
        headroom = self._memory.headroom_bytes(handle) if image_bytes else None
        if headroom is not None and headroom < image_bytes + MARGIN_BYTES:
            raise PreconditionError(
                "HOST_MEMORY_SHORT",
                f"the instance's memory limit leaves {headroom} bytes, its GPU image needs {image_bytes} "
                f"and a margin of {MARGIN_BYTES}; raise its memorySize",
            )
        self.ledger, short = self.ledger.reserve(handle.uid, image_bytes, self._memory.available_bytes())
        _raise_if(short)

    def took(self, uid: str, image_bytes: int) -> None:
        """The checkpoint holds this much now."""
        self.ledger = self.ledger.took(uid, image_bytes)

    def restored(self, uid: str) -> None:
        """The image is gone again."""
        self.ledger = self.ledger.restored(uid)

    def forget(self, uid: str) -> None:
        """The instance is gone."""
        self.ledger = self.ledger.forget(uid)


def _raise_if(short: str) -> None:
    if short:
        raise PreconditionError("HOST_MEMORY_SHORT", f"{short}; the instance stays awake")
