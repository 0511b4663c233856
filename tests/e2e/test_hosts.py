"""Hosts with other driver versions and GPU faults, from the users' point of view."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.core.errors import PreconditionError
from agent.core.types import MIB, FunctionSpec, GpuNeed, IdleMode
from agent.v1 import instance_service_pb2 as pb
from agent.v1 import types_pb2
from agent.wire.convert_function import function_to_proto
from tests.e2e.stack import Stack, echo, running_stack, until

STATE = types_pb2.Instance.State


async def create(stack: Stack, spec: FunctionSpec) -> types_pb2.Instance:
    """Create an instance directly and wait until it runs."""
    request = pb.CreateInstanceRequest(
        request_id=spec.name, spec=function_to_proto(spec, reveal_secrets=True), wait=True
    )
    async with stack.channel("agent") as channel:
        return (await channel.call(channel.instances.CreateInstance, request, 30.0)).instance


async def stop(stack: Stack, uid: str) -> None:
    async with stack.channel("agent") as channel:
        await channel.call(channel.instances.StopInstance, pb.StopInstanceRequest(uid=uid, force=True), 30.0)


def in_mode(name: str, mode: IdleMode) -> FunctionSpec:
    spec = echo(name)
    return replace(spec, idle=replace(spec.idle, mode=mode))


async def test_driver_535_runs_instances_but_never_freezes_them() -> None:
    async with running_stack("--gpus", "1", "--gib", "1", "--profile", "535", scheduler=False) as stack:
        with pytest.raises(PreconditionError) as refusal:
            await create(stack, in_mode("asleep", IdleMode.REQUIRE))
        assert refusal.value.reason == "IDLE_MODE_UNSUPPORTED"
        assert "535" in refusal.value.message
        assert "hibernode.idle: prefer" in refusal.value.message
        awake = await create(stack, in_mode("awake", IdleMode.PREFER))
        assert awake.state == STATE.STATE_RUNNING
        failed = [line for line in (await stack.node()).capabilities if line.level == types_pb2.Capability.LEVEL_FAIL]
        assert [line.name for line in failed] == ["checkpoint"]
        await stop(stack, awake.uid)


async def test_driver_555_freezes_with_the_utility_and_keeps_memory() -> None:
    async with running_stack("--gpus", "1", "--gib", "1", "--profile", "555") as stack:
        await stack.deploy(echo("ocr"), target=1)
        for number in range(3):
            await stack.wait_for_state(STATE.STATE_FROZEN, 1)
            await stack.ask_correctly("ocr", number)
        (line,) = [line for line in (await stack.node()).capabilities if line.name == "checkpoint"]
        assert "cuda-checkpoint" in line.reason
        await stack.remove_functions(["ocr"])
        assert not stack.leftovers()


async def test_frozen_instance_with_two_gpus_releases_both() -> None:
    async with running_stack("--gpus", "2", "--gib", "1", "--profile", "580") as stack:
        pair = replace(in_mode("pair", IdleMode.REQUIRE), gpu=GpuNeed(2, memory_bytes=16 * MIB))
        await stack.deploy(pair, target=1)
        await stack.wait_for_state(STATE.STATE_FROZEN, 1)
        await stack.deploy(echo("left"), target=1)
        await stack.deploy(echo("right"), target=1)
        for number, function in enumerate(("pair", "left", "right", "pair", "right", "left", "pair")):
            await stack.ask_correctly(function, number)
        await stack.remove_functions(["pair", "left", "right"])
        assert not stack.leftovers()


async def test_lost_gpu_does_not_affect_freezes_on_the_other() -> None:
    async with running_stack("--gpus", "2", "--gib", "1", "--profile", "580") as stack:
        await stack.deploy(echo("ocr"), target=1)
        await stack.wait_for_state(STATE.STATE_FROZEN, 1)
        (mine,) = (await stack.instances())[0].gpu_uuids
        with stack.driver() as driver:
            other = next(device.uuid for device in driver.devices() if device.uuid != mine)
            driver.set_device(other, nvml_error=15)  # GPU lost

            async def noticed() -> bool:
                return any(gpu.health == types_pb2.Gpu.HEALTH_LOST for gpu in (await stack.node()).gpus)

            await until("the GPU is known to be lost", noticed)
            for number in range(3):
                await stack.wait_for_state(STATE.STATE_FROZEN, 1)
                await stack.ask_correctly("ocr", number)
        await stack.remove_functions(["ocr"])
        assert not stack.leftovers()


async def test_user_of_a_gpu_that_it_does_not_hold_is_killed() -> None:
    """A program that unsets CUDA_VISIBLE_DEVICES finds the first GPU, which another instance holds."""
    async with running_stack("--gpus", "2", "--gib", "1", "--profile", "580", scheduler=False) as stack:
        honest = await create(stack, in_mode("honest", IdleMode.NEVER))
        thief = in_mode("thief", IdleMode.NEVER)
        thief = replace(thief, entrypoint=("/usr/bin/env", "-u", "CUDA_VISIBLE_DEVICES", *thief.entrypoint))
        caught = await create(stack, thief)
        assert list(caught.gpu_uuids) != list(honest.gpu_uuids)

        async def killed() -> bool:
            return caught.uid not in [one.uid for one in await stack.instances()]

        await until("the trespasser is killed", killed)
        async with stack.channel("agent") as channel:
            listed = await channel.call(
                channel.instances.ListEvents, pb.ListEventsRequest(instance_uid=caught.uid), 5.0
            )
        (event,) = [event for event in listed.events if event.name == "gpu.isolation_violated"]
        assert event.attributes["gpu"] == honest.gpu_uuids[0]
        assert [one.uid for one in await stack.instances()] == [honest.uid]
        await stop(stack, honest.uid)
