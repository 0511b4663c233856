"""2,000 requests in bursts and pauses, 4 instances on 2 GPUs: no failure, no wrong answer, no shared GPU."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys

import pytest

from agent.emulated.oplog import OpRecord
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
    """Compute processes with memory on a GPU, read through NVIDIA's own library."""
    command = [sys.executable, "-c", NVML]
    return subprocess.run(command, env=stack.environment, check=True, capture_output=True, text=True).stdout.split(
        "\n"
    )[:-1]


def awake_intervals(operations: list[OpRecord]) -> dict[int, list[tuple[int, int]]]:
    """When each process had memory on the GPU, from the driver's log: from a restore to the end of the checkpoint."""
    found: dict[int, list[tuple[int, int]]] = {}
    since: dict[int, int] = {}
    for operation in operations:
        if operation.result != 0:
            continue
        if operation.op == "restore":
            since[operation.pid] = operation.at_ns
        elif operation.op == "checkpoint":
            ended_ns = operation.at_ns + operation.us * 1000
            if operation.pid in since:  # the first awake time began with cuMemAlloc, which is not logged
                found.setdefault(operation.pid, []).append((since.pop(operation.pid), ended_ns))
    return found


def shared_gpus(instances: list[types_pb2.Instance], operations: list[OpRecord]) -> list[str]:
    """Where two instances had memory on the same GPU at the same time."""
    intervals = awake_intervals(operations)
    found = []
    for uuid in {one.gpu_uuids[0] for one in instances}:
        turns = sorted(
            (*interval, one.uid)
            for one in instances
            if one.gpu_uuids[0] == uuid
            for interval in intervals.get(one.pid, [])
        )
        found += [
            f"{uuid}: {after[2]} was restored before {before[2]} was checkpointed"
            for before, after in itertools.pairwise(turns)
            if after[0] < before[1]
        ]
    return found


@pytest.mark.timeout(240)
async def test_two_thousand_requests_across_fifty_freezes() -> None:
    async with running_stack() as stack:
        for function in FUNCTIONS:
            await stack.deploy(echo(function), target=2)
        traffics = [Traffic(stack, function, seed) for seed, function in enumerate(FUNCTIONS)]
        for rounds in range(ROUNDS):
            each = REQUESTS // ROUNDS // len(traffics)
            await asyncio.gather(*(t.run(each, most_at_once=20, longest_pause_s=0.25) for t in traffics))
            if rounds % 5 == 0:
                await stack.wait_for_state(types_pb2.Instance.STATE_FROZEN, 4)
                assert processes_by_nvml(stack) == [], "frozen instances hold no device memory"
        instances = await stack.instances()
        for traffic in traffics:
            assert not traffic.failed, [(a.status, a.body[:200]) for a in traffic.failed[:5]]
            assert not traffic.broken, traffic.broken[:5]
            assert not traffic.wrong, traffic.wrong[:5]
        assert sum(len(traffic.answers) for traffic in traffics) == REQUESTS
        with stack.driver() as driver:
            operations = driver.oplog()
        assert sum(map(len, awake_intervals(operations).values())) >= CYCLES
        assert shared_gpus(instances, operations) == []
        assert sum(one.wake_count for one in instances) >= CYCLES, [one.wake_count for one in instances]
        assert sum(one.freeze_count for one in instances) >= CYCLES
        used = {answer.instance for traffic in traffics for answer in traffic.answers}
        assert used <= {one.uid for one in instances}
        check_contiguous(await stack.windows())
        with stack.driver() as driver:
            assert driver.frozen_calls() == 0, "no call ever went to a frozen process"
        await stack.remove_functions(FUNCTIONS)
        assert not stack.leftovers()
