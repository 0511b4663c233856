"""2,000 requests in bursts and pauses, 4 instances on 2 GPUs: nothing fails, nothing is wrong, nobody shares."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from agent.v1 import types_pb2
from tests.e2e.ledger import check_contiguous
from tests.e2e.load import Traffic
from tests.e2e.stack import Stack, echo, running_stack

FUNCTIONS = ("ocr", "speech")
REQUESTS = 2_000
ROUNDS = 20
CYCLES = 50

NVML = """
import pynvml
pynvml.nvmlInit()
for i in range(pynvml.nvmlDeviceGetCount()):
    device = pynvml.nvmlDeviceGetHandleByIndex(i)
    for p in pynvml.nvmlDeviceGetComputeRunningProcesses(device):
        if p.usedGpuMemory:
            print(i, p.pid, p.usedGpuMemory)
"""


def processes_by_nvml(stack: Stack) -> list[str]:
    """Compute processes with memory on a GPU, as NVIDIA's own library shows them to an outsider."""
    command = [sys.executable, "-c", NVML]
    return subprocess.run(command, env=stack.environment, check=True, capture_output=True, text=True).stdout.split(
        "\n"
    )[:-1]


def shared_gpus(stack: Stack) -> list[str]:
    """Where the driver's own log shows that a second process got memory of a GPU whose holder still had some."""
    holder: dict[str, int] = {}
    found = []
    with stack.driver() as driver:
        for device in driver.devices():
            holder[device.uuid] = 0
        for process in driver.processes():
            for uuid, used in process.vram_bytes.items():
                if used and holder[uuid]:
                    found.append(f"{process.pid} and {holder[uuid]} both have memory on {uuid}")
                if used:
                    holder[uuid] = process.pid
    return found


@pytest.mark.timeout(240)
async def test_two_thousand_requests_across_fifty_freezes() -> None:
    async with running_stack() as stack:
        for function in FUNCTIONS:
            await stack.deploy(echo(function), target=2)
        shared: list[str] = []
        traffics = [Traffic(stack, function, seed) for seed, function in enumerate(FUNCTIONS)]
        for rounds in range(ROUNDS):
            each = REQUESTS // ROUNDS // len(traffics)
            await asyncio.gather(*(t.run(each, most_at_once=20, longest_pause_s=0.25) for t in traffics))
            shared += shared_gpus(stack)
            if rounds % 5 == 0:
                await stack.wait_for_state(types_pb2.Instance.STATE_FROZEN, 4)
                assert processes_by_nvml(stack) == [], "frozen instances hold no device memory"
        instances = await stack.instances()
        for traffic in traffics:
            assert not traffic.failed, [(a.status, a.body[:200]) for a in traffic.failed[:5]]
            assert not traffic.broken, traffic.broken[:5]
            assert not traffic.wrong, traffic.wrong[:5]
        assert sum(len(traffic.answers) for traffic in traffics) == REQUESTS
        assert shared == []
        assert sum(one.wake_count for one in instances) >= CYCLES, [one.wake_count for one in instances]
        assert sum(one.freeze_count for one in instances) >= CYCLES
        used = {answer.instance for traffic in traffics for answer in traffic.answers}
        assert used <= {one.uid for one in instances}
        check_contiguous(await stack.windows())
        with stack.driver() as driver:
            assert driver.frozen_calls() == 0, "no call ever went to a frozen process"
        await stack.remove_functions(FUNCTIONS)
        assert not stack.leftovers()
