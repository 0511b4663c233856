"""Tests XID events through NVML, and a monitor over a driver that falls silent, on the emulated driver."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator

import pytest

from agent.adapters.nvml.gpus import NvmlGpus
from agent.adapters.nvml.xid_events import MAX_UNREAD, NvmlEvents
from agent.core.errors import UnavailableError
from agent.core.types import ComputeMode, Xid
from tests.fakes.emulated_driver import EmulatedNvidia

PATIENCE_S = 15.0


@pytest.fixture
def driver(nvidia: EmulatedNvidia) -> Iterator[EmulatedNvidia]:
    nvidia.see_nvml_here()
    yield nvidia
    for device in nvidia.control.devices():
        nvidia.control.set_device(device.uuid, silent=False, nvml_error=0, compute_mode="DEFAULT", persistence=True)


@pytest.fixture
async def events(driver: EmulatedNvidia) -> AsyncIterator[NvmlEvents]:
    made = NvmlEvents()
    yield made
    made.close()


async def receive_xid(events: NvmlEvents, driver: EmulatedNvidia, uuid: str, code: int) -> Xid:
    """Raise it until it is received: from outside it can't be seen when the thread has begun to wait."""
    async with asyncio.timeout(PATIENCE_S):
        received = asyncio.ensure_future(events.next_xid())
        while not received.done():
            driver.control.raise_xid(uuid, code)
            await asyncio.wait([received], timeout=0.1)
        return received.result()


async def test_xid_is_reported_with_its_gpu_and_code(driver: EmulatedNvidia, events: NvmlEvents) -> None:
    first, second = [device.uuid for device in driver.control.devices()]
    assert await receive_xid(events, driver, second, 79) == Xid(second, 79)
    assert await receive_xid(NvmlEvents(), driver, first, 13) == Xid(first, 13)


async def test_lost_gpu_does_not_hide_xids_of_others(driver: EmulatedNvidia, events: NvmlEvents) -> None:
    first, second = [device.uuid for device in driver.control.devices()]
    driver.control.set_device(second, nvml_error=15)
    assert await receive_xid(events, driver, first, 48) == Xid(first, 48)


async def test_unread_events_are_bounded_and_the_newest_stay() -> None:
    events = NvmlEvents()
    for code in range(MAX_UNREAD + 3):
        events._add(Xid("GPU-a", code))
    events._thread = threading.Thread()  # never started: only kept events are read
    assert [(await events.next_xid()).code for _ in range(MAX_UNREAD)] == list(range(3, MAX_UNREAD + 3))


async def errors_of(gpus: NvmlGpus) -> list[str]:
    """Errors by device; empty while the driver does not answer."""
    try:
        return [sample.error for sample in await gpus.samples()]
    except UnavailableError:
        return []


async def test_figures_return_after_a_silent_device(driver: EmulatedNvidia) -> None:
    second = driver.control.devices()[1].uuid
    gpus = NvmlGpus(deadline_s=0.3)
    assert len(await gpus.samples()) == 2
    driver.control.set_device(second, silent=True)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(UnavailableError, match="NVML_UNAVAILABLE"):
            await gpus.samples()
        driver.control.set_device(second, silent=False)
        while not (errors := await errors_of(gpus)):  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)
    assert errors == ["", ""]
    await gpus.close()


async def test_modes_that_forbid_instances_are_reported(driver: EmulatedNvidia) -> None:
    first, second = [device.uuid for device in driver.control.devices()]
    driver.control.set_device(first, compute_mode="EXCLUSIVE_PROCESS", persistence=False)
    driver.control.set_device(second, compute_mode="PROHIBITED")
    gpus = NvmlGpus()
    one, other = await gpus.list_gpus()
    assert (one.compute_mode, one.persistence, one.virtual) == (ComputeMode.EXCLUSIVE, False, False)
    assert other.compute_mode is ComputeMode.PROHIBITED
    await gpus.close()
