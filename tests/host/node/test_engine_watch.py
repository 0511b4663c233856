"""The engine goes down and comes back: instances live on, and leftovers are removed then."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from agent.core.errors import UnavailableError
from agent.host.node.engine_watch import BACK_OFF_MAX_S, POLL_S, EngineWatch
from tests.host.rig import NodeRig, node_rig

AWAY = UnavailableError("ENGINE_UNAVAILABLE", "no engine answers at /run/docker.sock; start docker")


class FakeEngine:
    """Answers in turn; None = up."""

    def __init__(self, *answers: UnavailableError | None) -> None:
        self._answers = list(answers)

    async def check(self) -> None:
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if answer:
            raise answer


def watch(
    rig: NodeRig, engine: FakeEngine, pauses: list[float], rounds: int, problems: list[str] | None = None
) -> EngineWatch:
    async def on_change() -> None:
        if problems is not None:
            problems.append(watching.problem)

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == rounds:
            raise asyncio.CancelledError

    watching = EngineWatch(engine, rig.runtime, rig.node, rig.events, on_change, pause)
    return watching


async def follow(watching: EngineWatch) -> None:
    with pytest.raises(asyncio.CancelledError):
        await watching.run()


async def test_engine_that_stays_down_is_polled_less_often_and_reported_once() -> None:
    async with node_rig() as rig:
        pauses: list[float] = []
        problems: list[str] = []
        await follow(watch(rig, FakeEngine(None, *[AWAY] * 8, None), pauses, 10, problems))
        assert [bool(problem) for problem in problems] == [False, True, False]
        assert pauses == [POLL_S, 1, 2, 4, 8, *[BACK_OFF_MAX_S] * 4, POLL_S]
        assert [name for name in rig.names("") if name.startswith("engine.")] == ["engine.down", "engine.up"]


async def test_leftovers_are_removed_when_the_engine_is_back() -> None:
    async with node_rig() as rig:
        living = await rig.running()
        container = rig.runtime.containers[living.uid]
        container.handle = replace(container.handle, container_id="4f2e")
        orphan = replace(container.handle, uid="i-gone", container_id="77aa")
        rig.runtime.containers["i-gone"] = replace(container, handle=orphan, ended=asyncio.Future())
        await follow(watch(rig, FakeEngine(AWAY, None), [], 2))
        assert rig.runtime.running() == [living.uid]
        assert "instance.leftover_removed" in rig.names("i-gone")


async def test_a_process_of_the_host_is_no_leftover_of_the_engine() -> None:
    async with node_rig() as rig:
        actor = await rig.running()
        container = rig.runtime.containers[actor.uid]
        rig.runtime.containers["i-gone"] = replace(container, handle=replace(container.handle, uid="i-gone"))
        await follow(watch(rig, FakeEngine(None), [], 1))
        assert "i-gone" in rig.runtime.containers


async def test_leftover_that_cannot_be_removed_is_retried_at_the_next_sweep() -> None:
    async with node_rig() as rig:
        actor = await rig.running()
        container = rig.runtime.containers[actor.uid]
        orphan = replace(container.handle, uid="i-gone", container_id="77aa")
        rig.runtime.containers["i-gone"] = replace(container, handle=orphan, ended=asyncio.Future())
        rig.runtime.kill_hangs = True
        watching = watch(rig, FakeEngine(None), [], 1)
        await watching.sweep()
        assert "i-gone" in rig.runtime.containers
        rig.runtime.kill_hangs = False
        await watching.sweep()
        assert "i-gone" not in rig.runtime.containers
