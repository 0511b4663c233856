"""The node's part of the usage ledger, as NodeService shows it: what the store holds, and the open windows."""

from __future__ import annotations

from collections.abc import Callable

from agent.ports import LedgerStore, Window

MAX_WINDOWS = 50_000


class NodeLedger:
    """Bounded; open windows come from memory, newer than their row on disk."""

    def __init__(self, store: LedgerStore, open_windows: Callable[[], list[Window]]) -> None:
        self._store = store
        self._open_windows = open_windows

    async def windows(self, *, instance_uid: str, function: str, include_open: bool) -> list[Window]:
        """Sealed windows, oldest first, then the open ones if asked. Raises UnavailableError STORE_FAILED."""
        kept = await self._store.read_windows(instance_uid, MAX_WINDOWS)
        found = [window for window in kept if window.sealed]
        if include_open:
            found.extend(self._open_windows())
        return [w for w in found if instance_uid in ("", w.instance_uid) and function in ("", w.function)]
