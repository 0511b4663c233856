"""The ledger of host memory for frozen GPU images: bytes are reserved before the lock and freed after the restore.

A checkpoint copies VRAM into host memory; running short during one is an OOM kill. A finished checkpoint already
lowers the host's available memory, so only reservations not yet taken are subtracted from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from agent.core.sizes import size_text
from agent.core.types import GIB

MARGIN_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Reservation:
    """The host memory of one instance.

    - `floor_bytes`: pledged for its life (instances that share a GPU)
    - `image_bytes`: reserved for one freeze
    - `taken`: the checkpoint holds the memory
    - `estimated`: `image_bytes` is an upper bound: it counts against the budget, but not as a used part of the pledge
    """

    floor_bytes: int = 0
    image_bytes: int = 0
    taken: bool = False
    estimated: bool = False

    @property
    def total_bytes(self) -> int:
        """Bytes that count against the node's budget."""
        return max(self.floor_bytes, self.image_bytes)

    @property
    def outstanding_bytes(self) -> int:
        """Bytes that will still be taken from the host's available memory."""
        if not self.taken:
            return self.total_bytes
        return self.floor_bytes if self.estimated else max(0, self.floor_bytes - self.image_bytes)


@dataclass(frozen=True, slots=True)
class MemoryLedger:
    """All reservations of a node. `limit_bytes`: their budget, 0 = none; `reserve_bytes` stay free for the host."""

    limit_bytes: int
    reserve_bytes: int
    reservations: Mapping[str, Reservation] = field(default_factory=dict)

    @property
    def reserved_bytes(self) -> int:
        """Bytes reserved, taken or not."""
        return sum(r.total_bytes for r in self.reservations.values())

    @property
    def outstanding_bytes(self) -> int:
        """Bytes reserved and not yet taken."""
        return sum(r.outstanding_bytes for r in self.reservations.values())

    def pledge(self, uid: str, floor_bytes: int, available_bytes: int) -> tuple[MemoryLedger, str]:
        """Pledge `floor_bytes` for the instance's life. Returns the ledger (unchanged if refused) and "" or why."""
        return self._admit(uid, replace(self._of(uid), floor_bytes=floor_bytes), available_bytes)

    def promised(self, uid: str, floor_bytes: int) -> MemoryLedger:
        """Recovery: enter a pledge that was admitted before the agent restarted."""
        return self._with(uid, replace(self._of(uid), floor_bytes=floor_bytes))

    def reserve(self, uid: str, image_bytes: int, available_bytes: int) -> tuple[MemoryLedger, str]:
        """Reserve `image_bytes` for a freeze. Returns the ledger (unchanged if refused) and "" or why."""
        wanted = replace(self._of(uid), image_bytes=image_bytes, taken=False, estimated=False)
        return self._admit(uid, wanted, available_bytes)

    def took(self, uid: str, image_bytes: int, *, estimated: bool = False) -> MemoryLedger:
        """The checkpoint is done, or was found at recovery, and holds `image_bytes` (`estimated`: at most)."""
        return self._with(uid, replace(self._of(uid), image_bytes=image_bytes, taken=True, estimated=estimated))

    def restored(self, uid: str) -> MemoryLedger:
        """The image is gone from the host or was never made: its reservation ends, the pledge stays."""
        return self._with(uid, replace(self._of(uid), image_bytes=0, taken=False, estimated=False))

    def forget(self, uid: str) -> MemoryLedger:
        """The instance has ended."""
        return replace(self, reservations={k: v for k, v in self.reservations.items() if k != uid})

    def _of(self, uid: str) -> Reservation:
        return self.reservations.get(uid, Reservation())

    def _with(self, uid: str, reservation: Reservation) -> MemoryLedger:
        return replace(self, reservations={**self.reservations, uid: reservation})

    def _admit(self, uid: str, wanted: Reservation, available_bytes: int) -> tuple[MemoryLedger, str]:
        proposed = self._with(uid, wanted)
        if wanted.total_bytes <= self._of(uid).total_bytes and not self._of(uid).taken:
            return proposed, ""
        if self.limit_bytes and proposed.reserved_bytes > self.limit_bytes:
            return self, (
                f"{size_text(proposed.reserved_bytes)} of frozen GPU memory needed on this node, "
                f"gpu.frozen_memory_limit is {size_text(self.limit_bytes)}"
            )
        needed = proposed.outstanding_bytes + self.reserve_bytes + (MARGIN_BYTES if wanted.total_bytes else 0)
        if needed > available_bytes:
            # In whole GiB: what is available changes from second to second, and the message should not.
            return self, (
                f"{size_text(proposed.outstanding_bytes)} to come plus gpu.host_memory_reserve "
                f"{size_text(self.reserve_bytes)} are more than "
                f"the about {available_bytes // GIB} GiB available on this host"
            )
        return proposed, ""
