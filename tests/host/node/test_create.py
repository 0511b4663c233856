"""Creates: once per request id, durable before the answer, and never half done."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from agent.core.errors import (
    ConflictError,
    ExhaustedError,
    HibernodeError,
    InstanceError,
    PreconditionError,
    UnavailableError,
)
from agent.core.instance_record import RecordPhase
from agent.core.lifecycle import events as ev
from agent.core.types import GIB, Exit, GpuNeed, InstanceState
from agent.host.instance import executor
from tests.host.rig import OCR, NodeRig, eventually, node_rig, until


def nothing_is_left(rig: NodeRig) -> None:
    assert not rig.node.actors
    assert not rig.node.broker.allocator.assigned
    assert not rig.node.memory.ledger.reservations
    assert not rig.billing.open_windows()


async def test_instance_starts_on_its_gpu_and_is_recorded_first() -> None:
    async with node_rig() as rig:
        rig.store.stall()
        creating = asyncio.create_task(rig.create())
        await asyncio.wait_for(rig.store.attempted.wait(), 5)
        assert rig.runtime.calls == []
        rig.store.release()
        actor = await creating
        await until(actor, InstanceState.RUNNING)
        (record,) = await rig.store.load_instances()
        assert (record.phase, record.gpu_uuids) == (RecordPhase.READY, actor.gpu_uuids)
        assert rig.holder() == actor.uid
        assert rig.runtime.containers[actor.uid].spec.gpu_uuids == actor.gpu_uuids


async def test_the_same_request_id_is_the_same_instance() -> None:
    async with node_rig() as rig:
        first = await rig.create(request_id="fn/1/0/0")
        assert await rig.create(request_id="fn/1/0/0") is first
        with pytest.raises(ConflictError) as caught:
            await rig.create(replace(OCR, port=9001), request_id="fn/1/0/0")
        assert caught.value.reason == "REQUEST_ID_REUSED"


async def test_two_creates_at_once_with_one_request_id_make_one_instance() -> None:
    async with node_rig() as rig:
        rig.store.stall()
        both = [asyncio.create_task(rig.create(request_id="fn/1/0/0")) for _ in range(2)]
        await asyncio.wait_for(rig.store.attempted.wait(), 5)
        assert not any(task.done() for task in both), "neither is told before it is durable"
        rig.store.release()
        first, second = await asyncio.gather(*both)
        assert first is second
        assert len(rig.node.actors) == 1


async def test_a_repetition_of_a_create_that_fails_tries_for_itself() -> None:
    async with node_rig() as rig:
        rig.store.stall()
        rig.store.failing = True
        three = [asyncio.create_task(rig.create(request_id="fn/1/0/0")) for _ in range(3)]
        await asyncio.wait_for(rig.store.attempted.wait(), 5)
        rig.store.release()
        results = await asyncio.gather(*three, return_exceptions=True)
        assert [getattr(result, "reason", "") for result in results] == ["STORE_FAILED"] * 3
        nothing_is_left(rig)
        rig.store.failing = False
        await rig.create(request_id="fn/1/0/0")


async def test_a_caller_that_leaves_in_the_middle_leaves_no_half_instance() -> None:
    async with node_rig() as rig:
        rig.store.stall()
        creating = asyncio.create_task(rig.create(request_id="fn/1/0/0"))
        await asyncio.wait_for(rig.store.attempted.wait(), 5)
        creating.cancel()
        await asyncio.gather(creating, return_exceptions=True)
        rig.store.release()
        actor = await rig.create(request_id="fn/1/0/0")
        await until(actor, InstanceState.RUNNING)
        assert len(rig.runtime.containers) == 1


async def test_if_the_store_fails_nothing_is_created() -> None:
    async with node_rig() as rig:
        rig.store.failing = True
        with pytest.raises(UnavailableError) as caught:
            await rig.create()
        assert caught.value.reason == "STORE_FAILED"
        nothing_is_left(rig)


async def test_without_a_free_gpu_the_create_is_refused_at_once() -> None:
    async with node_rig() as rig:
        await rig.running()
        await rig.running()
        with pytest.raises(ExhaustedError) as caught:
            await rig.create()
        assert caught.value.reason == "GPU_CAPACITY"


async def test_sharers_of_a_gpu_must_all_fit_into_host_memory() -> None:
    async with node_rig(per_gpu=4) as rig:
        rig.memory.available = 3 * GIB + (64 << 20)
        for _ in range(3):
            await rig.create()
        with pytest.raises(PreconditionError) as caught:
            await rig.create()
        assert caught.value.reason == "HOST_MEMORY_SHORT"
        assert len(rig.node.broker.allocator.assigned) == 3


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (replace(OCR, image="registry/ocr:1"), "IMAGE_RUNTIME_UNAVAILABLE"),
        (replace(OCR, command=()), "COMMAND_MISSING"),
        (replace(OCR, gpu=GpuNeed(gpu_type="fc.gpu.ada.1")), "NO_SUCH_GPU"),
        (replace(OCR, gpu=GpuNeed(gpu_type="L4")), "NO_SUCH_GPU"),
        (replace(OCR, gpu=GpuNeed(memory_bytes=17 * GIB)), "NO_SUCH_GPU"),
        (replace(OCR, gpu=GpuNeed(count=9)), "NO_SUCH_GPU"),
    ],
)
async def test_what_this_node_cannot_run_is_refused(function: object, reason: str) -> None:
    async with node_rig() as rig:
        with pytest.raises(HibernodeError) as caught:
            await rig.create(function)  # type: ignore[arg-type]
        assert caught.value.reason == reason
        nothing_is_left(rig)


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [("/initialize", 500, "INITIALIZATION_ERROR"), ("/healthz", 503, "HEALTH_CHECK_FAILED")],
)
async def test_a_start_that_fails_says_why_and_leaves_nothing(path: str, status: int, reason: str) -> None:
    from agent.core.types import HealthCheck, Hook, Hooks

    function = replace(OCR, hooks=Hooks(initializer=Hook()), health_check=HealthCheck("/healthz"))
    async with node_rig() as rig:
        rig.app.answers[path] = status
        actor = await rig.create(function)
        rig.runtime.print(actor.uid, b"weights not found")
        await until(actor, InstanceState.FAILED)
        assert actor.instance.reason == reason
        assert "weights not found" in actor.instance.message
        await eventually(lambda: actor.uid in rig.node.ended)
        nothing_is_left(rig)
        assert rig.runtime.containers == {}
        assert await rig.store.load_instances() == []


async def test_a_port_that_never_opens_fails_the_start_in_fcs_words() -> None:
    async with node_rig(ready_timeout_s=0.05) as rig:
        rig.runtime.port_of = lambda spec: 1
        actor = await rig.create()
        await until(actor, InstanceState.FAILED)
        assert actor.instance.reason == "FUNCTION_NOT_STARTED"
        assert "The CA's http server cannot be started" in actor.instance.message


async def test_a_start_that_listens_elsewhere_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "LISTEN_CHECK_S", 0.005)
    async with node_rig(ready_timeout_s=0.3) as rig:
        rig.runtime.port_of = lambda spec: 1
        rig.runtime.listens_on = ["0.0.0.0:9000", "[::1]:9001"]
        actor = await rig.create()
        waits = "waiting for its server on port 1; it listens on 0.0.0.0:9000, [::1]:9001"
        await eventually(lambda: actor.figures.progress == waits)
        await until(actor, InstanceState.FAILED)
        assert "(1). It listens on 0.0.0.0:9000, [::1]:9001 instead. Logs" in actor.instance.message


async def test_a_process_that_ends_during_its_start_shows_its_log() -> None:
    from agent.core.types import Exit

    async with node_rig() as rig:
        rig.runtime.port_of = lambda spec: 1
        actor = await rig.create()
        await eventually(lambda: actor.uid in rig.runtime.containers)
        rig.runtime.print(actor.uid, b"ImportError: torch")
        await eventually(lambda: actor.handle_of_container is not None)
        rig.runtime.exit(actor.uid, Exit(code=1))
        await until(actor, InstanceState.FAILED)
        assert actor.instance.reason == "FUNCTION_NOT_STARTED"
        assert "exited with code 1" in actor.instance.message
        assert "ImportError: torch" in actor.instance.message


async def test_image_is_pulled_before_the_gpu_is_taken_and_shows_progress() -> None:
    async with node_rig() as rig:
        rig.runtime.prepare_gate = asyncio.Event()
        actor = await rig.create()
        await eventually(lambda: actor.figures.progress == "pulling: 45 %")
        assert rig.holder() == ""
        rig.runtime.prepare_gate.set()
        await until(actor, InstanceState.RUNNING)
        assert rig.holder() == actor.uid
        assert actor.figures.progress == ""


async def test_an_image_that_is_not_there_fails_the_start_with_its_reason() -> None:
    async with node_rig() as rig:
        rig.runtime.prepare_error = InstanceError("IMAGE_NOT_FOUND", "there is no image ocr:9; push it first")
        actor = await rig.create()
        await until(actor, InstanceState.FAILED)
        assert (actor.instance.reason, actor.instance.message) == (
            "IMAGE_NOT_FOUND", "there is no image ocr:9; push it first",
        )  # fmt: skip
        assert [call for call, _ in rig.runtime.calls] == ["prepare"]


async def test_pull_is_cancelled_by_a_stop() -> None:
    async with node_rig() as rig:
        rig.runtime.prepare_gate = asyncio.Event()
        actor = await rig.create()
        await eventually(lambda: actor.figures.progress == "pulling: 45 %")
        actor.handle(ev.StopAsked(0))
        await asyncio.wait_for(actor.ended.wait(), 5)
        assert actor.state is InstanceState.STOPPED
        assert "start" not in [call for call, _ in rig.runtime.calls]


async def test_start_that_ran_out_of_memory_says_so() -> None:
    async with node_rig() as rig:
        rig.runtime.port_of = lambda spec: 1
        actor = await rig.create()
        await eventually(lambda: actor.uid in rig.runtime.containers)
        rig.runtime.exit(actor.uid, Exit(code=-1, signal=9, oom_killed=True, message="killed by signal 9 (Killed)"))
        await until(actor, InstanceState.FAILED)
        assert actor.instance.reason == "OUT_OF_MEMORY"
        assert "killed by signal 9" in actor.instance.message
