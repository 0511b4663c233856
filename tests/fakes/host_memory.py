"""Host memory as a test wants it."""

from __future__ import annotations

from agent.core.types import GIB, Handle


class FakeHostMemory:
    """Implements `ports.HostMemory`. Set `available` and, per uid, `headroom` (no entry = no limit).
    `raise_refusal` "" lets limits be raised; `raised` holds them."""

    def __init__(self, available: int = 64 * GIB) -> None:
        self.available = available
        self.headroom: dict[str, int] = {}
        self.raise_refusal = "the fake does not raise"
        self.raised: dict[str, int] = {}

    def available_bytes(self) -> int:
        return self.available

    def headroom_bytes(self, handle: Handle) -> int | None:
        return self.headroom.get(handle.uid)

    def raise_limit(self, handle: Handle, need_bytes: int) -> str:
        if not self.raise_refusal:
            self.raised[handle.uid] = need_bytes
        return self.raise_refusal

    def lower_limit(self, handle: Handle) -> None:
        self.raised.pop(handle.uid, None)
