"""A `ProcessFreezer` that stops nothing but the `FakeCheckpointer`'s processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from agent.core.errors import HibernodeError
from agent.core.types import Handle
from agent.ports import FREEZE_DEADLINE_S, FreezerState
from tests.fakes.checkpointer import FakeCheckpointer


@dataclass
class FakeProcessFreezer:
    """Knobs: `fail_freeze`, `fail_thaw` (raised once), `now` (set it to simulate an external pause)."""

    name: str = "fake"
    driver: FakeCheckpointer | None = None
    now: FreezerState = FreezerState.THAWED
    fail_freeze: HibernodeError | None = None
    fail_thaw: HibernodeError | None = None
    calls: list[str] = field(default_factory=list)

    async def freeze(self, handle: Handle, deadline_s: float = FREEZE_DEADLINE_S) -> None:
        self.calls.append("freeze")
        error, self.fail_freeze = self.fail_freeze, None
        if error is not None:
            raise error
        self.pause()

    async def thaw(self, handle: Handle, deadline_s: float = FREEZE_DEADLINE_S) -> None:
        self.calls.append("thaw")
        error, self.fail_thaw = self.fail_thaw, None
        if error is not None:
            raise error
        self.now = FreezerState.THAWED
        for process in self.driver.processes.values() if self.driver else ():
            process.thaw()

    def pause(self) -> None:
        """Stop the processes: driver calls on them hang from now on."""
        self.now = FreezerState.FROZEN
        for process in self.driver.processes.values() if self.driver else ():
            process.thawed.clear()

    def state(self, handle: Handle) -> FreezerState:
        return self.now

    def is_frozen(self, handle: Handle) -> bool:
        return self.now is FreezerState.FROZEN
