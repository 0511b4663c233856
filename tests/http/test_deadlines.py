"""One timer for many deadlines."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from agent.http.deadlines import NEVER, DeadlineTimer
from tests.http.rig import eventually


@dataclass(eq=False)
class Member:
    deadline: float = NEVER
    expired: list[float] = field(default_factory=list)

    def expire(self, now: float) -> None:
        self.expired.append(now)
        self.deadline = NEVER


async def test_member_expires_once_and_not_early() -> None:
    loop = asyncio.get_running_loop()
    members = [Member(), Member(), Member()]
    timer = DeadlineTimer(loop, members, 0.001)
    for member, delay in zip(members, (0.03, 0.01, NEVER), strict=True):
        member.deadline = loop.time() + delay
        timer.schedule(member.deadline)
    promised = members[0].deadline
    await eventually(lambda: bool(members[0].expired))
    assert members[0].expired[0] >= promised
    assert [len(member.expired) for member in members] == [1, 1, 0]
    timer.stop()


async def test_moved_deadline_does_not_expire() -> None:
    loop = asyncio.get_running_loop()
    busy, idle = Member(), Member()
    timer = DeadlineTimer(loop, [busy, idle], 0.001)
    busy.deadline = loop.time() + 0.01
    timer.schedule(busy.deadline)
    busy.deadline = loop.time() + 1000
    idle.deadline = loop.time() + 0.03
    timer.schedule(idle.deadline)
    await eventually(lambda: bool(idle.expired))
    assert not busy.expired
    timer.stop()
