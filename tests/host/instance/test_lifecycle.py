"""An instance's life on a whole node: freeze and wake with hooks, health checks and failures."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from agent.core.types import (
    GIB,
    SECOND_NS,
    HealthCheck,
    Hook,
    Hooks,
    InstanceState,
)
from agent.host.instance.actor import Actor
from agent.ports import FreezeResult, Outcome
from tests.host.rig import OCR, enter, eventually, hangs, node_rig, until

S = InstanceState
HOOKED = replace(OCR, hooks=Hooks(pre_freeze=Hook(), pre_stop=Hook()))


# ---- freezing and waking --------------------------------------------------------------------------------------------


async def test_idle_then_frozen_then_awake_for_the_next_request() -> None:
    async with node_rig() as rig:
        actor = await rig.frozen()
        assert rig.holder() == ""
        assert rig.node.memory.ledger.reservations[actor.uid].taken
        await enter(actor)
        assert (actor.state, actor.figures.wakes) == (S.RUNNING, 1)
        assert rig.holder() == actor.uid
        assert rig.node.memory.ledger.reserved_bytes == 0
        actor.gate.leave()


async def test_the_idle_time_counts_from_the_last_request() -> None:
    async with node_rig() as rig:
        actor = await rig.running()
        rig.clock.advance(9 * SECOND_NS)
        await enter(actor)
        rig.clock.advance(60 * SECOND_NS)
        assert actor.state is S.RUNNING
        actor.gate.leave()
        assert actor.figures.idle_since_ns == rig.clock.monotonic_ns()
        rig.clock.advance(10 * SECOND_NS - 1)
        assert actor.state is S.RUNNING
        rig.clock.advance(1)
        await until(actor, S.FROZEN)


async def test_a_request_during_the_lock_undoes_the_freeze() -> None:
    async with node_rig() as rig:
        actor = await rig.running()
        rig.freezer.hold("lock")
        rig.clock.advance(10 * SECOND_NS)
        await rig.freezer.entered("lock")
        entering = asyncio.create_task(enter(actor))
        await asyncio.sleep(0)
        rig.freezer.release("lock")
        await entering
        assert [op for op, _ in rig.freezer.calls] == ["lock", "unlock"]
        assert rig.node.memory.ledger.reserved_bytes == 0
        actor.gate.leave()


async def test_caller_that_leaves_during_a_cancelled_freeze_lets_it_freeze_later() -> None:
    async with node_rig() as rig:
        actor = await rig.running()
        rig.freezer.hold("lock")
        rig.clock.advance(10 * SECOND_NS)
        await rig.freezer.entered("lock")
        entering = asyncio.create_task(enter(actor))
        await asyncio.sleep(0)
        entering.cancel()
        await asyncio.gather(entering, return_exceptions=True)
        rig.freezer.release("lock")
        await until(actor, S.FROZEN, S.RUNNING)
        assert (actor.gate.in_flight, actor.gate.waiting) == (0, 0)
        rig.clock.advance(10 * SECOND_NS)
        await until(actor, S.FROZEN)


async def test_a_request_that_comes_past_the_lock_gets_a_wake_right_after() -> None:
    async with node_rig() as rig:
        actor = await rig.running()
        rig.freezer.hold("checkpoint")
        rig.clock.advance(10 * SECOND_NS)
        await rig.freezer.entered("checkpoint")
        entering = asyncio.create_task(enter(actor))
        await asyncio.sleep(0)
        rig.freezer.release("checkpoint")
        await entering
        assert [op for op, _ in rig.freezer.calls] == ["lock", "checkpoint", "wake"]


async def test_the_pool_is_retired_when_the_freeze_begins() -> None:
    async with node_rig() as rig:
        actor = await rig.running()
        assert actor.pool is not None
        before = actor.pool.generation
        rig.freezer.hold("lock")
        rig.clock.advance(10 * SECOND_NS)
        assert actor.pool.generation > before
        rig.freezer.release("lock")
        await until(actor, S.FROZEN)


@pytest.mark.parametrize("trouble", ["nvml", "memory", "store", "cgroup"])
async def test_failure_before_the_lock_is_a_refusal(trouble: str) -> None:
    async with node_rig() as rig:
        actor = await rig.running()
        match trouble:
            case "nvml":

                async def fails(handle: object) -> int:
                    from agent.core.errors import UnavailableError

                    raise UnavailableError("NVML_UNAVAILABLE", "the driver does not answer")

                rig.freezer.vram_bytes = fails  # type: ignore[method-assign]
            case "memory":
                rig.memory.available = 0
            case "store":
                rig.store_problem = "out of space"
            case _:

                def gone(handle: object) -> int:
                    raise FileNotFoundError("/sys/fs/cgroup/i-1/memory.current")

                rig.memory.headroom_bytes = gone  # type: ignore[method-assign]
        rig.clock.advance(10 * SECOND_NS)
        await until(actor, S.RUNNING)
        reasons = {"nvml": "NVML_UNAVAILABLE", "memory": "HOST_MEMORY_SHORT", "store": "STORE_FAILED"}
        (message,) = rig.messages("instance.freeze_refused")
        assert message.startswith(reasons.get(trouble, "HOST_MEMORY_UNKNOWN"))
        assert actor.instance.refusal == message
        assert rig.freezer.calls == []
        await enter(actor)
        assert actor.gate.in_flight == 1
        actor.gate.leave()


async def test_short_host_memory_keeps_it_awake_until_there_is_room() -> None:
    async with node_rig() as rig:
        actor = await rig.running()
        rig.memory.available = 0
        for _ in range(3):
            rig.clock.advance(10 * SECOND_NS)
            await until(actor, S.RUNNING)
        assert actor.instance.refusals == 3
        rig.memory.available = 64 * GIB
        rig.clock.advance(10 * SECOND_NS)
        await until(actor, S.FROZEN)
        assert actor.instance.refusal == ""


async def test_while_the_store_fails_wakes_and_requests_go_on() -> None:
    async with node_rig() as rig:
        actor = await rig.frozen()
        rig.store.failing, rig.store_problem = True, "out of space"
        await enter(actor)
        assert actor.state is S.RUNNING


@pytest.mark.parametrize("outcome", [Outcome.REFUSED, Outcome.BROKEN])
@pytest.mark.parametrize("operation", ["lock", "checkpoint", "wake"])
async def test_outcomes_of_driver_calls(operation: str, outcome: Outcome) -> None:
    async with node_rig() as rig:
        actor = await (rig.frozen() if operation == "wake" else rig.running())
        times = 2 if operation == "wake" else 1
        rig.freezer.results[operation].extend([FreezeResult(outcome, "CUDA_304", "no")] * times)
        if operation == "wake":
            actor.wake(0, rig.clock.monotonic_ns() + SECOND_NS)
        else:
            rig.clock.advance(10 * SECOND_NS)
        if outcome is Outcome.REFUSED and operation != "wake":
            await eventually(lambda: actor.instance.refusals == 1)
            assert actor.instance.gate_open
            assert rig.node.memory.ledger.reserved_bytes == 0
            assert rig.holder() == actor.uid
        else:
            await until(actor, S.FAILED)
            assert actor.instance.reason == "CUDA_304"
            await eventually(lambda: actor.uid in rig.node.ended)
            assert rig.holder() == ""
            assert rig.runtime.containers == {}
            assert not rig.node.memory.ledger.reservations


# ---- pre-freeze hook -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 404])
async def test_pre_freeze_200_and_4xx_do_not_stop_the_freeze(status: int) -> None:
    async with node_rig() as rig:
        rig.app.answers["/pre-freeze"] = status
        actor = await rig.running(HOOKED)
        rig.clock.advance(10 * SECOND_NS)
        await until(actor, S.FROZEN)
        assert "/pre-freeze" in rig.app.paths()
        assert ("instance.pre_freeze_failed" in rig.names()) == (status == 404)


async def test_pre_freeze_500_ends_the_instance() -> None:
    async with node_rig() as rig:
        rig.app.answers["/pre-freeze"] = 500
        actor = await rig.running(HOOKED)
        rig.clock.advance(10 * SECOND_NS)
        await until(actor, S.STOPPED)
        assert actor.instance.reason == "PRE_FREEZE_FAILED"
        await eventually(lambda: rig.holder() == "")


async def test_pre_freeze_without_an_answer_does_not_stop_the_freeze() -> None:
    function = replace(OCR, hooks=Hooks(pre_freeze=Hook(timeout_ns=20_000_000)))
    async with node_rig() as rig:
        rig.app.answers["/pre-freeze"] = hangs
        actor = await rig.running(function)
        rig.clock.advance(10 * SECOND_NS)
        await until(actor, S.FROZEN)
        assert "did not answer within" in rig.messages("instance.pre_freeze_failed")[0]


async def test_a_request_cuts_a_slow_pre_freeze_short() -> None:
    async with node_rig() as rig:
        rig.app.answers["/pre-freeze"] = hangs
        actor = await rig.running(replace(OCR, hooks=Hooks(pre_freeze=Hook(timeout_ns=90 * SECOND_NS))))
        rig.clock.advance(10 * SECOND_NS)
        await rig.app.until_asked("/pre-freeze")
        await enter(actor)
        assert rig.freezer.calls == []
        assert actor.instance.refusals == 0, "a cancel is no refusal"


# ---- health checks --------------------------------------------------------------------------------------------------


async def test_health_is_probed_while_awake_only_and_its_change_is_reported() -> None:
    check = HealthCheck("/healthz", period_ns=1_000_000, failure_threshold=2)
    async with node_rig() as rig:
        actor = await rig.running(replace(OCR, health_check=check))
        reported: list[bool] = []

        class Listener:
            def state_changed(self, actor: Actor, old: S, new: S, at: int) -> None: ...

            def load_changed(self, actor: Actor) -> None: ...

            def fitness_changed(self, actor: Actor) -> None:
                reported.append(actor.healthy)

        rig.node.listeners.append(Listener())
        rig.app.answers["/healthz"] = 500
        await eventually(lambda: not actor.healthy)
        assert reported == [False]
        rig.clock.advance(10 * SECOND_NS)
        await until(actor, S.FROZEN)
        asked = len(rig.app.requests)
        assert rig.node.executors[actor.uid]._health._task is None
        await enter(actor)
        rig.app.answers["/healthz"] = 200
        await eventually(lambda: len(rig.app.requests) > asked)
        assert actor.healthy
