"""The selftest's CUDA program: its pattern detects every change, and its processes leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest

from agent.adapters.kernel import cgroup, process_table
from agent.core.errors import DeadlineError, InstanceError
from agent.core.types import MIB
from agent.selftest.target import BLOCK, PAGE, CudaDevice, Pattern, sizes
from agent.selftest.target_process import SLICE_NAME, SelftestProcess, TargetLocation, find_location
from tests.fakes.emulated_driver import EmulatedNvidia

SIZE = 9 * MIB + 5
DEADLINE_S = 20.0


def pages(round_: int, index: int) -> list[bytes]:
    pattern = Pattern()
    pattern.fill(round_, index)
    return [bytes(pattern.bytes[at : at + PAGE]) for at in range(0, BLOCK, PAGE)]


def test_pages_differ_in_all_blocks_and_rounds() -> None:
    found = [page for round_ in (1, 2, 40) for index in (0, 1, 997, 5000) for page in pages(round_, index)]
    assert len(set(found)) == len(found) == 12 * BLOCK // PAGE


def test_page_contents_differ_beyond_the_stamp() -> None:
    """Half a page from elsewhere shows too."""
    tails = [page[PAGE // 2 :] for round_, index in ((1, 0), (1, 1), (2, 0), (2, 1)) for page in pages(round_, index)]
    assert len(set(tails)) == len(tails)


@pytest.mark.parametrize("total", [100, 5_000, MIB, SIZE, 512 * MIB, 80 << 30])
def test_allocations_add_up_to_the_total(total: int) -> None:
    parts = sizes(total)
    assert sum(parts) == total
    assert all(part > 0 for part in parts)
    assert len(parts) <= 24
    if total >= MIB:
        assert any(part % PAGE for part in parts), "a real program has odd sizes too"


@pytest.fixture
async def target(nvidia: EmulatedNvidia, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SelftestProcess]:
    for name, value in nvidia.environment.items():
        monkeypatch.setenv(name, value)
    made = await SelftestProcess.start(find_location(process_table.boot_id()), nvidia.control.devices()[0].uuid)
    try:
        yield made
    finally:
        await made.end()
    assert made.handle.process.pid not in [process.pid for process in nvidia.control.processes()]


async def test_changed_byte_is_found_and_named(target: SelftestProcess, nvidia: EmulatedNvidia) -> None:
    made = await target.ask("allocate", DEADLINE_S, bytes=SIZE)
    assert made["allocations"] == len(sizes(SIZE))
    await target.ask("fill", DEADLINE_S, round=1)
    assert (await target.ask("verify", DEADLINE_S, round=1))["wrong_pages"] == 0
    nvidia.control.flip_byte(pid=target.handle.process.pid, offset=SIZE // 2)
    found = await target.ask("verify", DEADLINE_S, round=1)
    assert found["wrong_pages"] == 1
    assert " is 0x" in found["first"]
    await target.ask("fill", DEADLINE_S, round=2)
    assert (await target.ask("verify", DEADLINE_S, round=2))["wrong_pages"] == 0


async def test_memory_of_an_earlier_round_is_detected(target: SelftestProcess) -> None:
    await target.ask("allocate", DEADLINE_S, bytes=SIZE)
    await target.ask("fill", DEADLINE_S, round=1)
    stale = await target.ask("verify", DEADLINE_S, round=2)
    assert stale["wrong_pages"] >= SIZE // PAGE


async def test_pinned_copy_leaves_memory_unchanged(target: SelftestProcess) -> None:
    await target.ask("allocate", DEADLINE_S, bytes=SIZE)
    await target.ask("fill", DEADLINE_S, round=1)
    copied = await target.ask("copy", DEADLINE_S, chunk=MIB)
    assert (copied["chunk"], copied["to_host_us"] > 0, copied["to_device_us"] > 0) == (MIB, True, True)
    assert (await target.ask("verify", DEADLINE_S, round=1))["wrong_pages"] == 0


def test_missing_pinned_memory_is_no_failure() -> None:
    device = CudaDevice.__new__(CudaDevice)
    device.__dict__.update(_cuda=SimpleNamespace(), _allocations=[(4096, MIB)])
    assert device.copy(MIB) == {"unavailable": "this driver has no cuMemHostAlloc"}


async def test_lack_of_gpu_memory_is_an_answer(target: SelftestProcess) -> None:
    answer = await target.ask("allocate", DEADLINE_S, bytes=4 << 30)
    assert answer["code"] == 2  # CUDA_ERROR_OUT_OF_MEMORY
    assert "cuMemAlloc" in answer["error"]


async def test_program_runs_in_its_own_cgroup(target: SelftestProcess) -> None:
    if not target.handle.cgroup:
        pytest.skip("no cgroup v2 can be written here")
    assert await target.pids(target.handle) == [target.handle.process.pid]


async def test_death_of_the_program_is_reported_at_once(target: SelftestProcess) -> None:
    await target.ask("allocate", DEADLINE_S, bytes=MIB)
    os.kill(target.handle.process.pid, signal.SIGKILL)
    with pytest.raises(InstanceError, match="killed by signal 9"):
        await target.ask("verify", DEADLINE_S, round=1)


async def test_hanging_program_has_a_deadline(target: SelftestProcess) -> None:
    os.kill(target.handle.process.pid, signal.SIGSTOP)
    with pytest.raises(DeadlineError, match="did not finish `fill`"):
        await target.ask("fill", 0.1, round=1)


async def test_end_leaves_no_cgroup(nvidia: EmulatedNvidia, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in nvidia.environment.items():
        monkeypatch.setenv(name, value)
    place = find_location(process_table.boot_id())
    made = await SelftestProcess.start(place, nvidia.control.devices()[0].uuid)
    await made.ask("allocate", DEADLINE_S, bytes=MIB)
    assert await made.leave() == {}
    await made.end()
    await made.end()
    assert place.path is None or not place.path.exists()
    assert process_table.read_stat(made.handle.process.pid) is None, "it has been waited for"


async def test_missing_driver_is_an_answer(monkeypatch: pytest.MonkeyPatch, nvidia: EmulatedNvidia) -> None:
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    made = await SelftestProcess.start(find_location(process_table.boot_id()), nvidia.control.devices()[0].uuid)
    try:
        answer = await made.ask("allocate", DEADLINE_S, bytes=MIB)
    finally:
        await made.end()
    if "error" not in answer:
        pytest.skip("this machine has a real libcuda.so.1 in its loader's path")
    assert "libcuda.so.1 can't be loaded" in answer["error"]


def test_only_unused_cgroups_of_killed_selftests_are_removed() -> None:
    boot_id = process_table.boot_id()
    slice_ = cgroup.open_slice(SLICE_NAME)
    if slice_ is None:
        pytest.skip("no cgroup v2 can be written here")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as somebody:
        other = process_table.identify(somebody.pid, boot_id)
        assert other is not None
        in_use = TargetLocation(slice_, f"{other.pid}-{other.start_time}", boot_id)
        left = TargetLocation(slice_, f"{other.pid}-{other.start_time - 1}", boot_id)  # a reused pid
        for place in (in_use, left):
            slice_.create(place.uid)
        assert in_use.path is not None
        assert left.path is not None
        find_location(boot_id)
        assert (in_use.path.exists(), left.path.exists()) == (True, False)
        in_use.path.rmdir()
        slice_.remove_if_empty()
        somebody.communicate()
