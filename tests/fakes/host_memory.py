"""Host memory as a test wants it."""

from __future__ import annotations

from agent.core.types import GIB, Handle


class FakeHostMemory:
    """Implements `ports.HostMemory`. Set `available` and, per uid, `headroom` (no entry = no limit)."""

    def __init__(self, available: int = 64 * GIB) -> None:
        self.available = available
        self.headroom: dict[str, int] = {}

    def available_bytes(self) -> int:
        return self.available

    def headroom_bytes(self, handle: Handle) -> int | None:
        return self.headroom.get(handle.uid)
