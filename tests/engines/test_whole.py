"""The whole system with a container engine: deployments, engine failures, and changes from outside."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent.adapters.kernel import cgroup
from agent.core.errors import HibernodeError
from agent.v1 import function_service_pb2 as functions_pb
from agent.v1 import instance_service_pb2 as instances_pb
from agent.v1 import types_pb2
from agent.wire.convert_function import function_to_proto
from tests.e2e.bad_world import HIBERNODE
from tests.e2e.stack import CALL_S, Stack, running_stack, until
from tests.engines import images
from tests.engines.engines import Engine
from tests.engines.functions import awake, bad, busybox, echo_image

FROZEN = types_pb2.Instance.STATE_FROZEN
ONE_GPU = ("--gpus", "1", "--gib", "1", "--profile", "580")

S_YAML = f"""\
edition: 3.0.0
name: pages
access: default
resources:
  pages:
    component: fc3
    props:
      region: local
      functionName: pages
      runtime: custom-container
      cpu: 0.5
      memorySize: 128
      diskSize: 512
      timeout: 20
      gpuConfig: {{gpuType: fc.gpu.ada.1, gpuMemorySize: 1024}}
      customContainerConfig: {{image: "{images.BUSYBOX}", port: 9000}}
      provisionConfig: {{defaultTarget: 1, alwaysAllocateGPU: false}}
      triggers:
        - {{triggerName: http, triggerType: http, triggerConfig: {{authType: anonymous, methods: [GET]}}}}
      hibernode: {{freezeAfter: 100ms}}
"""


@asynccontextmanager
async def whole(engine: Engine, *driver: str) -> AsyncIterator[Stack]:
    """A stack on this engine. At the end its functions are removed and nothing stays."""
    # As pid 1, a web server without a SIGTERM handler ignores it (a kernel rule).
    settings = {"runtime": {"stop_timeout": "1s"}}
    async with running_stack(*driver, engine_socket=engine.socket, agent_settings=settings) as stack:
        yield stack
        async with stack.channel("scheduler") as channel:
            listed = await channel.call(channel.functions.ListFunctions, functions_pb.ListFunctionsRequest(), CALL_S)
        await stack.remove_functions([function.name for function in listed.functions])
        assert not stack.leftovers()
        state_uuid = (stack.folder / "agent" / "uuid").read_text().strip()
        assert engine.ps(state_uuid) == []
    left = await asyncio.to_thread(engine.leftovers, state_uuid)
    assert not left, left


async def the_one(stack: Stack, function: str) -> types_pb2.Instance:
    (found,) = [one for one in await stack.instances() if one.function == function]
    return found


async def asleep(stack: Stack, function: str) -> types_pb2.Instance:
    async def sleeping() -> bool:
        return [one.state for one in await stack.instances() if one.function == function] == [FROZEN]

    await until(f"{function} is frozen", sleeping)
    return await the_one(stack, function)


async def ended(stack: Stack, uid: str) -> types_pb2.Instance:
    """Wait for the end of an instance; returns it."""
    found: list[types_pb2.Instance] = []

    async def there() -> bool:
        async with stack.channel("agent") as channel:
            request = instances_pb.ListInstancesRequest(include_ended=True)
            answer = await channel.call(channel.instances.ListInstances, request, CALL_S)
        found[:] = [one for one in answer.instances if one.uid == uid]
        return found[0].state in (types_pb2.Instance.STATE_STOPPED, types_pb2.Instance.STATE_FAILED)

    await until(f"{uid} has ended", there)
    return found[0]


async def event_names(stack: Stack) -> list[str]:
    async with stack.channel("agent") as channel:
        request = instances_pb.ListEventsRequest(page_size=1000)
        return [one.name for one in (await channel.call(channel.instances.ListEvents, request, CALL_S)).events]


def container_states(engine: Engine) -> list[str]:
    """The status column of `docker ps`, without times."""
    return [entry["Status"].split()[0] for entry in engine.ps()]


def is_frozen(pid: int) -> bool:
    """Whether the kernel reports it as frozen."""
    mount = cgroup.find_v2_mount(Path("/proc/self/mountinfo").read_text())
    assert mount is not None
    place = mount.locate(cgroup.parse_membership(Path(f"/proc/{pid}/cgroup").read_text())[""])
    assert place is not None
    events = cgroup.read_events(place)
    return events is not None and events["frozen"] == 1


# ---- deploy, freeze, wake ------------------------------------------------------------------------------------------


async def test_image_without_cuda_is_deployed_and_freezes_by_its_cgroup(engine: Engine) -> None:
    async with whole(engine) as stack:
        template = stack.folder / "s.yaml"
        template.write_text(S_YAML)
        command = [str(HIBERNODE), "--home", str(stack.folder), "deploy", "-t", str(template), "--wait"]
        done = await asyncio.to_thread(
            subprocess.run, command, env=stack.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        before = await asleep(stack, "pages")
        assert is_frozen(before.pid)
        for _ in range(3):
            answer = await stack.ask("pages", "/index.html")
            assert (answer.status, answer.body) == (200, images.BUSYBOX_PAGE)
            assert answer.instance == before.uid
            assert container_states(engine) == ["Up"]
            assert is_frozen((await asleep(stack, "pages")).pid)
        assert (await the_one(stack, "pages")).pid == before.pid


async def test_two_containers_share_one_gpu_and_lose_no_byte(engine: Engine) -> None:
    images.load(engine, images.ECHO)
    async with whole(engine, *ONE_GPU) as stack:
        for name in ("ocr", "speech"):
            await stack.deploy(echo_image(name), target=1)
        before = {one.uid: one.pid for one in await stack.instances()}
        for number in range(10):
            for name in ("ocr", "speech"):
                await stack.ask_correctly(name, number)
            assert container_states(engine) == ["Up", "Up"]
        for name in ("ocr", "speech"):
            sleeper = await asleep(stack, name)
            assert is_frozen(sleeper.pid)
            assert sleeper.container_id
            assert sleeper.wake_count >= 9
        with stack.driver() as driver:
            assert [device.used_bytes for device in driver.devices()] == [0], "asleep they leave the GPU"
        assert {one.uid: one.pid for one in await stack.instances()} == before


# ---- failures of agent and engine ----------------------------------------------------------------------------------


async def test_killed_agent_recovers_its_containers(engine: Engine) -> None:
    images.load(engine, images.ECHO)
    async with whole(engine) as stack:
        await stack.deploy(echo_image("ocr"), target=2)
        await stack.wait_for_state(FROZEN, 2)
        before = {one.uid: (one.pid, one.container_id, one.address) for one in await stack.instances()}
        for number, engine_is_up in enumerate([True, False]):
            if not engine_is_up:
                engine.kill()
            stack.kill_agent()
            await stack.start_agent()
            after = {one.uid: (one.pid, one.container_id, one.address) for one in await stack.instances()}
            assert after == before, "adopted from the bundles on disk, whether the engine is there or not"
            await stack.ask_correctly("ocr", number)
            engine.start()


async def kill_engine(engine: Engine, stack: Stack) -> None:
    """Kill the engine and wait until the agent has noticed."""
    engine.kill()

    async def noticed() -> bool:
        return "engine.down" in await event_names(stack)

    await until("the agent says that the engine is away", noticed)


async def test_instances_freeze_and_wake_without_the_engine(engine: Engine) -> None:
    images.load(engine, images.ECHO)
    async with whole(engine) as stack:
        await stack.deploy(echo_image("ocr"), target=1)
        before = await asleep(stack, "ocr")
        await kill_engine(engine, stack)
        for number in range(3):
            await stack.ask_correctly("ocr", number)
            assert (await asleep(stack, "ocr")).pid == before.pid
        await assert_engine_unavailable(stack)
        engine.start()

        async def back() -> bool:
            return "engine.up" in await event_names(stack)

        await until("the agent says that it is back", back)
        await stack.deploy(busybox("pages"), target=1)
        assert (await stack.ask("pages", "/index.html")).status == 200
        await stack.ask_correctly("ocr", 4)
        assert (await the_one(stack, "ocr")).uid == before.uid


async def assert_engine_unavailable(stack: Stack) -> None:
    """Expect a create to report the missing engine."""
    async with stack.channel("agent") as channel:
        request = instances_pb.CreateInstanceRequest(
            request_id="while-away", spec=function_to_proto(busybox("later"), reveal_secrets=True), wait=True
        )
        with pytest.raises(HibernodeError) as refused:
            await channel.call(channel.instances.CreateInstance, request, CALL_S)
    assert refused.value.reason == "ENGINE_UNAVAILABLE"


async def test_instance_that_ends_without_the_engine_is_cleaned_up_later(engine: Engine) -> None:
    async with whole(engine) as stack:
        await stack.deploy(busybox("pages"), target=1)
        before = await asleep(stack, "pages")
        await kill_engine(engine, stack)
        async with stack.channel("agent") as channel:
            request = instances_pb.StopInstanceRequest(uid=before.uid)
            await channel.call(channel.instances.StopInstance, request, CALL_S)
        assert (await ended(stack, before.uid)).state == types_pb2.Instance.STATE_STOPPED
        engine.start()

        async def removed() -> bool:
            return before.container_id not in [entry["Id"] for entry in engine.ps()]

        await until("its container is removed", removed)
        assert (await stack.ask("pages", "/index.html")).status == 200, "replaced meanwhile"


# ---- changes from outside ------------------------------------------------------------------------------------------


async def test_container_removed_from_outside_is_replaced(engine: Engine) -> None:
    async with whole(engine) as stack:
        await stack.deploy(awake(busybox("pages")), target=1)
        before = await the_one(stack, "pages")
        assert (await stack.ask("pages", "/index.html")).instance == before.uid
        await asyncio.to_thread(engine.remove, before.container_id)
        after = await ended(stack, before.uid)
        assert after.state == types_pb2.Instance.STATE_FAILED
        answer = await stack.ask("pages", "/index.html")
        assert (answer.status, answer.body) == (200, images.BUSYBOX_PAGE)
        assert answer.instance != before.uid


async def test_out_of_memory_is_reported_and_the_instance_replaced(engine: Engine) -> None:
    images.load(engine, images.BAD)
    async with whole(engine) as stack:
        await stack.deploy(awake(bad("hungry", "eats-memory-when-told")), target=1)
        before = await the_one(stack, "hungry")
        assert (await stack.ask("hungry", "/cgi-bin/eat")).status in (200, 502)
        after = await ended(stack, before.uid)
        assert (after.state, after.state_reason) == (types_pb2.Instance.STATE_FAILED, "OUT_OF_MEMORY")
        assert "memory" in after.state_message

        async def replaced() -> bool:
            return (await stack.ask("hungry", "/index.html")).instance not in ("", before.uid)

        await until("another one serves", replaced)
