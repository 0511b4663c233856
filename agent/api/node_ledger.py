"""The node's part of the usage ledger for NodeService: windows in the store, and open ones."""

from __future__ import annotations

from collections.abc import Callable

from agent.core.billing.window import UsageWindow
from agent.core.errors import ExhaustedError
from agent.ports import LedgerStore

MAX_WINDOWS = 50_000


class NodeLedger:
    """Reads the store, and from memory the windows that are not written yet or still open."""

    def __init__(self, store: LedgerStore, unwritten: Callable[[], list[UsageWindow]]) -> None:
        self._store = store
        self._unwritten = unwritten

    async def windows(self, *, instance_uid: str, function: str, include_open: bool) -> list[UsageWindow]:
        """Sealed windows in the order of their writes, then open ones with `include_open`. Raises STORE_FAILED,
        LEDGER_TOO_LONG."""
        newer = self._unwritten()  # before the store: a window written meanwhile is then found twice, not never
        kept = await self._store.read_windows(instance_uid, MAX_WINDOWS)
        if len(kept) == MAX_WINDOWS:  # a sum over some of them would be wrong
            raise ExhaustedError(
                "LEDGER_TOO_LONG",
                f"this node holds more than {MAX_WINDOWS} usage windows; ask for one instance, or ask the scheduler",
            )
        found = {(w.instance_uid, w.seq): w for w in kept}
        for window in newer:
            known = found.get((window.instance_uid, window.seq))
            if known is None or not known.sealed:
                found[window.instance_uid, window.seq] = window
        return [
            w
            for w in found.values()
            if instance_uid in ("", w.instance_uid) and function in ("", w.function) and (w.sealed or include_open)
        ]
