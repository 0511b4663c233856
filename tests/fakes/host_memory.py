"""A fake `HostMemory` port."""

from __future__ import annotations

from collections.abc import Callable, Collection

from agent.core.types import GIB, Handle


class FakeHostMemory:
    """Implements `ports.HostMemory`. Set `available` and, per uid, `headroom` (no entry = no limit).

    `raise_refusal` "" lets limits be raised; `raised` holds them. `in_use`: limits of these are not lowered.
    `noted` are the sizes of images, `resident` what processes hold. `on_disk(operation)` is called, on the caller's
    thread, by what writes; `writes` are those operations.
    """

    def __init__(self, available: int = 64 * GIB) -> None:
        self.available = available
        self.headroom: dict[str, int] = {}
        self.raise_refusal = "the fake does not raise"
        self.raised: dict[str, int] = {}
        self.in_use: set[str] = set()
        self.noted: dict[str, int] = {}
        self.resident = 0
        self.writes: list[tuple[str, str]] = []
        self.on_disk: Callable[[str], object] = lambda operation: None

    def available_bytes(self) -> int:
        return self.available

    def headroom_bytes(self, handle: Handle) -> int | None:
        return self.headroom.get(handle.uid)

    def raise_limit(self, handle: Handle, need_bytes: int) -> str:
        self._write("raise_limit", handle.uid)
        if not self.raise_refusal:
            self.raised[handle.uid] = need_bytes
        return self.raise_refusal

    def limit_raised(self, uid: str) -> bool:
        return uid in self.raised

    def lower_limit(self, uid: str) -> None:
        self._write("lower_limit", uid)
        if uid not in self.in_use:
            self.raised.pop(uid, None)

    def note_image(self, uid: str, image_bytes: int) -> None:
        self._write("note_image", uid)
        self.noted[uid] = image_bytes

    def noted_image(self, uid: str) -> int | None:
        return self.noted.get(uid)

    def resident_bytes(self, pids: Collection[int]) -> int:
        return self.resident

    def forget(self, uid: str) -> None:
        self._write("forget", uid)
        self.raised.pop(uid, None)
        self.noted.pop(uid, None)

    def recover(self, living: Collection[str], frozen: Collection[str]) -> None:
        self._write("recover", "")
        for uid in set(self.raised) - set(frozen):
            del self.raised[uid]
        for uid in set(self.noted) - set(living):
            del self.noted[uid]

    def _write(self, operation: str, uid: str) -> None:
        self.writes.append((operation, uid))
        self.on_disk(operation)
