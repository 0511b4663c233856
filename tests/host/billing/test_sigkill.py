"""kill -9 of a process that meters, on the real clock and the real store."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import pytest

from agent.adapters.kernel.clock import SystemClock
from agent.adapters.store.node_store import NodeStore
from agent.core.types import SECOND_NS, FunctionSpec, InstanceState
from agent.host.billing.billing import Billing

VICTIM = """
import asyncio, pathlib, sys, time
from agent.adapters.kernel.clock import SystemClock
from agent.adapters.store.node_store import NodeStore
from agent.core.types import FunctionSpec, InstanceState
from agent.host.billing.billing import Billing

async def main():
    store = await NodeStore.open(pathlib.Path(sys.argv[1]))
    book = Billing(SystemClock(), store, node="gpu-7", boot_id="boot-a")
    book.start()
    meter = book.open("i-ocr-1", FunctionSpec("ocr"), InstanceState.RUNNING)
    began = time.monotonic_ns()
    meter.request_began(began)
    print(began, flush=True)
    while not any(w.active_ns for w in await store.read_windows()):
        await asyncio.sleep(0.01)
    print("written", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.real_time
async def test_a_kill_loses_at_most_a_second_of_active_time_and_adds_none(tmp_path: Path) -> None:
    victim = await asyncio.create_subprocess_exec(
        sys.executable, "-c", VICTIM, str(tmp_path), stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[3]
    )
    try:
        assert victim.stdout is not None
        async with asyncio.timeout(30):
            began = int(await victim.stdout.readline())
            assert await victim.stdout.readline() == b"written\n"
    finally:
        victim.kill()
        killed = time.monotonic_ns()
        await victim.wait()

    store = await NodeStore.open(tmp_path)
    book = Billing(SystemClock(), store, node="gpu-7", boot_id="boot-a")
    await book.load()
    book.open("i-ocr-1", FunctionSpec("ocr"), InstanceState.RUNNING)
    assert await book.flush()
    metered, gap, now = await store.read_windows()
    truth = killed - began
    # A busy machine may flush late: half a second on top of the promised second.
    assert truth - 1.5 * SECOND_NS <= metered.active_ns <= truth
    assert (gap.active_ns, gap.estimated, gap.start_mono_ns) == (0, True, metered.end_mono_ns)
    assert now.start_mono_ns == gap.end_mono_ns
    await store.close()
