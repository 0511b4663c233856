"""The node's part of the usage ledger, as NodeService shows it: what the store holds, and the open windows."""

from __future__ import annotations

from collections.abc import Callable

from agent.core.billing.window import UsageWindow
from agent.core.errors import ExhaustedError
from agent.ports import LedgerStore

MAX_WINDOWS = 50_000


class NodeLedger:
    """Bounded; what is still on its way to the store, and the open windows, come from memory."""

    def __init__(self, store: LedgerStore, unwritten: Callable[[], list[UsageWindow]]) -> None:
        self._store = store
        self._unwritten = unwritten

    async def windows(self, *, instance_uid: str, function: str, include_open: bool) -> list[UsageWindow]:
        """Sealed windows in the order they were written, then the open ones if asked. Raises STORE_FAILED,
        LEDGER_TOO_LONG."""
        newer = self._unwritten()  # before the store is read: what is written meanwhile is then there twice, not never
        kept = await self._store.read_windows(instance_uid, MAX_WINDOWS)
        if len(kept) == MAX_WINDOWS:  # a sum over a part of them would be silently wrong
            raise ExhaustedError(
                "LEDGER_TOO_LONG",
                f"this node holds more than {MAX_WINDOWS} usage windows: ask for one instance, or ask the scheduler",
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
