"""A fake `UsageReader` port."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from agent.core.errors import UnavailableError
from agent.core.snapshots import InstanceReading
from agent.core.types import Handle


@dataclass
class FakeInstanceReader:
    """Implements `ports.UsageReader`. `readings` by uid; an instance without an entry has ended. `asked`: the
    uids of every call; `fails` makes the next calls fail."""

    readings: dict[str, InstanceReading] = field(default_factory=dict)
    asked: list[list[str]] = field(default_factory=list)
    fails: bool = False

    async def read(self, handles: Sequence[Handle]) -> dict[str, InstanceReading]:
        self.asked.append([handle.uid for handle in handles])
        if self.fails:
            raise UnavailableError("GAUGES_LATE", "the fake is told to be late")
        return {handle.uid: self.readings[handle.uid] for handle in handles if handle.uid in self.readings}
