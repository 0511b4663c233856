"""A real model in a real container is frozen and woken twenty times and always reads the same text.

The pictures were drawn for this test (Pillow, with its own font), so their exact text is known.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from agent.cli.fc3.load import load_s_yaml
from agent.core.types import MILLISECOND_NS, FunctionSpec
from agent.v1 import instance_service_pb2 as instances_pb
from agent.v1 import types_pb2
from tests.e2e.stack import CALL_S, Answer, Stack, running_stack
from tests.e2e.test_load import processes_by_nvml
from tests.engines import host_traces, images, ocr_image
from tests.engines.engines import Engine

CYCLES = 20
PICTURES = Path(__file__).with_name("pictures")
SAYS = {
    "badge.png": ["HIBERNODE 2026"],
    "note.png": ["Asleep until asked.", "Order 66821 is 7 of 9"],
    "invoice.png": ["INVOICE 4711", "Cold starts: 0", "Total: 19.99 EUR"],
}
FROZEN = types_pb2.Instance.STATE_FROZEN
AMONG_THE_WEIGHTS = 9_000_000


def ocr() -> FunctionSpec:
    """The example as in its s.yaml, except for the image's name and a short freezeAfter."""
    (found,) = load_s_yaml(ocr_image.EXAMPLE / "s.yaml", environment={})
    spec = found.function
    return replace(spec, image=ocr_image.OCR, idle=replace(spec.idle, freeze_after_ns=500 * MILLISECOND_NS))


async def read(stack: Stack, picture: str) -> Answer:
    content = (PICTURES / picture).read_bytes()
    return await stack.ask("ocr", "/invoke", method="POST", data=content)


async def assert_reads_correctly(stack: Stack, picture: str, model: str) -> Answer:
    """Expect every letter, read with the bytes of the model loaded at the beginning."""
    answer = await read(stack, picture)
    assert answer.status == 200, answer.body
    said = json.loads(answer.body)
    assert (said["text"], said["model"]) == (SAYS[picture], model)
    return answer


async def freeze(stack: Stack, uid: str) -> None:
    async with stack.channel("agent") as channel:
        await channel.call(channel.instances.FreezeInstance, instances_pb.FreezeInstanceRequest(uid=uid), CALL_S)


async def frozen_instance(stack: Stack, engine: Engine) -> types_pb2.Instance:
    """The instance, checked to be FROZEN: its memory off the GPU, its cgroup frozen, the engine unaware."""
    await stack.wait_for_state(FROZEN, 1)
    (instance,) = await stack.instances()
    assert await asyncio.to_thread(processes_by_nvml, stack) == []
    assert "frozen 1" in cgroup_events(instance.container_id)
    state = engine.container(instance.uid)["State"]
    assert (state["Status"], state["Running"], state["Paused"]) == ("running", True, False)
    assert await asyncio.to_thread(listed, engine) == {f"hibernode-{instance.uid}": "Up"}
    return instance


def cgroup_events(container: str) -> list[str]:
    """The cgroup.events of a container's v2 cgroups."""
    files = [file for path in host_traces.cgroups_of(container) for file in Path(path).rglob("cgroup.events")]
    return [line for file in files for line in file.read_text().splitlines()]


def listed(engine: Engine) -> dict[str, str]:
    """`docker ps` or `podman ps` as typed by a user: name -> "Up", or "Up (Paused)"."""
    command = engine.client("ps", "--format", "{{.Names}} {{.Status}}")
    done = subprocess.run(command, env=engine.environment(), capture_output=True, text=True, timeout=60, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    return {name: " ".join([up, *(word for word in words if "Paused" in word)]) for name, up, *words in lines}


@pytest.mark.timeout(600)
async def test_recognised_text_is_the_same_after_twenty_freezes(engine: Engine, request: pytest.FixtureRequest) -> None:
    """`pytest -rP` prints the duration of each step."""
    images.load(engine, ocr_image.OCR)
    model = ocr_image.model_digest()
    seconds: dict[str, list[float]] = {"start": [], "freeze": [], "asleep": [], "awake": [], "wake": []}

    def note(what: str, began_s: float) -> None:
        seconds[what].append(time.monotonic() - began_s)

    async with running_stack(engine_socket=engine.socket) as stack:
        began = time.monotonic()
        await stack.deploy(ocr(), target=1)
        note("start", began)
        (first,) = await stack.instances()
        for cycle in range(CYCLES):
            if cycle % 2:  # by the idle timer, otherwise by request
                await stack.wait_for_state(FROZEN, 1)
            else:
                began = time.monotonic()
                await freeze(stack, first.uid)
                note("freeze", began)
            sleeper = await frozen_instance(stack, engine)
            assert (sleeper.uid, sleeper.pid, sleeper.freeze_count) == (first.uid, first.pid, cycle + 1)
            assert sleeper.frozen_bytes >= 16_000_000, "its models"
            picture = list(SAYS)[cycle % len(SAYS)]
            for state in ("asleep", "awake"):
                began = time.monotonic()
                answer = await assert_reads_correctly(stack, picture, model)
                note(state, began)
                assert answer.instance == first.uid
            (awake,) = await stack.instances()
            assert awake.wake_count == cycle + 1
            seconds["wake"].append(awake.last_wake.total_ns / 1e9)
        await assert_lost_byte_is_noticed(stack, engine, model)
        await stack.remove_functions(["ocr"])
        assert not stack.leftovers()
        uuid = (stack.folder / "agent" / "uuid").read_text().strip()
    assert not engine.leftovers(uuid)
    told = [f"{what:7} {statistics.median(each):.3f}, at most {max(each):.3f}" for what, each in seconds.items()]
    request.node.add_report_section("call", f"seconds, {engine.kind}, median", "\n".join(told))


async def assert_lost_byte_is_noticed(stack: Stack, engine: Engine, model: str) -> None:
    """The test can fail: with one wrong byte in the frozen memory, the same picture reads differently."""
    sleeper = await frozen_instance(stack, engine)
    with stack.driver() as driver:
        driver.flip_byte(sleeper.pid, offset=AMONG_THE_WEIGHTS)
        wrong = await read(stack, "badge.png")
        assert wrong.status == 500 or json.loads(wrong.body)["model"] != model, wrong.body
        driver.flip_byte(sleeper.pid, offset=AMONG_THE_WEIGHTS)
    await assert_reads_correctly(stack, "badge.png", model)
