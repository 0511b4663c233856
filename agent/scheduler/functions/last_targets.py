"""The target of each function as last decided while all of its schedule and policies could be read.

It is needed when the scheduler starts and finds one that it can't read (`decide` in core/provisioning/autoscaling.py).
Written in the background: a SIGKILL loses the changes of the last second.
"""

from __future__ import annotations

import asyncio

from agent.core.errors import HibernodeError
from agent.log import get_logger
from agent.scheduler.database.store import Store

PAUSE_S = 1.0
"""Between two writes, and before a failed one is tried again."""
_log = get_logger()


class LastTargets:
    """`load` once, before the autoscaler decides; then `run` writes what is noted, until cancelled."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._targets: dict[str, int] = {}
        self._unwritten: set[str] = set()
        self._noted = asyncio.Event()

    async def load(self) -> None:
        """Raises UnavailableError STORE_FAILED."""
        self._targets = await self._store.last_targets()

    def get(self, function: str) -> int | None:
        """None: it has never been decided."""
        return self._targets.get(function)

    def note(self, function: str, target: int) -> None:
        if self._targets.get(function) != target:
            self._targets[function] = target
            self._unwritten.add(function)
            self._noted.set()

    def forget(self, function: str) -> None:
        """The function has no schedule or policies any more; its row is overwritten when it has one again."""
        self._targets.pop(function, None)
        self._unwritten.discard(function)

    async def run(self) -> None:
        while True:
            await self._noted.wait()
            await self.write()
            await asyncio.sleep(PAUSE_S)

    async def write(self) -> None:
        """Write what is not written yet; if that fails, it stays noted."""
        self._noted.clear()
        written = {name: self._targets[name] for name in self._unwritten}
        if not written:
            return
        try:
            await self._store.put_last_targets(written)
        except HibernodeError as error:
            _log.error("store.failed", reason=error.reason, message=error.message)
            self._noted.set()
            return
        self._unwritten -= {name for name, target in written.items() if self._targets.get(name, target) == target}
