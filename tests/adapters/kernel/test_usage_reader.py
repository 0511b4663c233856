"""Tests the usage of instances, from real cgroups and processes and from files of other kernels."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, process_time

import pytest

from agent.adapters.kernel import cgroup, process_table
from agent.adapters.kernel.cgroup import CgroupSlice
from agent.adapters.kernel.usage_reader import ProcUsageReader
from agent.core.errors import UnavailableError
from agent.core.snapshots import InstanceReading
from agent.core.types import MIB, SECOND_NS, Handle, ProcessId

BOOT = process_table.boot_id()
HELD = 64 * MIB
PATIENCE_S = 20.0
# Prints "ready" and computes, in a child process with `child`.
WORK = f"block = b'x' * {HELD}\nprint('ready', flush=True)\nwhile True: pass"
CHILD = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {WORK!r}])"


@pytest.fixture
def start() -> Iterator[Callable[..., ProcessId]]:
    """Start a Python program, wait until it prints "ready"; it leads a session, as every instance does."""
    started: list[subprocess.Popen[bytes]] = []

    def program(code: str, joins: Path | None = None) -> ProcessId:
        if joins is not None:
            code = f"open({str(joins / 'cgroup.procs')!r}, 'w').write('0')\n{code}"
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        found = process_table.identify(process.pid, BOOT)
        assert found is not None
        return found

    yield program
    for process in started:
        os.killpg(process.pid, 9)
        process.wait(PATIENCE_S)
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def slice_() -> Iterator[CgroupSlice]:
    made = cgroup.open_slice(str(uuid.uuid4()))
    if made is None:
        pytest.skip("no v2 cgroup can be written here")
    yield made
    for uid in made.uids():
        asyncio.run(cgroup.remove(made.path_of(uid), PATIENCE_S))
    made.remove_if_empty()


async def grown(reader: ProcUsageReader, handle: Handle) -> InstanceReading:
    """Read until it has used a tenth of a second of CPU time."""
    ends = monotonic() + PATIENCE_S
    while True:
        found = (await reader.read([handle]))[handle.uid]
        assert monotonic() < ends, found
        if found.cpu_ns is not None and found.cpu_ns >= SECOND_NS // 10:
            return found


@pytest.mark.parametrize("code", [WORK, CHILD], ids=["itself", "its child"])
async def test_without_a_cgroup_the_process_tree_is_added_up(start: Callable[..., ProcessId], code: str) -> None:
    reader = ProcUsageReader(BOOT)
    reading = await grown(reader, Handle("i-1", start(code), "", 0))
    assert reading.memory_bytes is not None
    assert HELD < reading.memory_bytes < 4 * HELD
    reader.close()


async def test_cgroup_has_cpu_time_without_the_cpu_controller(
    start: Callable[..., ProcessId], slice_: CgroupSlice
) -> None:
    path = slice_.create("i-1")
    process = start(CHILD, path)
    reader = ProcUsageReader(BOOT)
    reading = await grown(reader, Handle("i-1", process, "", 0, cgroup=str(path)))
    assert reading.memory_bytes is not None
    assert HELD < reading.memory_bytes < 4 * HELD
    await cgroup.kill(path, PATIENCE_S)
    assert await reader.read([Handle("i-1", process, "", 0, cgroup=str(path))]) == {}, "it is empty: not 0, but gone"
    reader.close()


async def test_ended_instance_is_left_out(tmp_path: Path) -> None:
    me = process_table.identify(os.getpid(), BOOT)
    assert me is not None
    reader = ProcUsageReader(BOOT)
    others = [
        Handle("earlier", ProcessId(BOOT, me.pid, me.start_time - 1), "", 0),
        Handle("other-boot", ProcessId("another", me.pid, me.start_time), "", 0),
        Handle("no-cgroup", me, "", 0, cgroup=str(tmp_path / "gone")),
    ]
    assert await reader.read(others) == {}
    reader.close()


@pytest.mark.parametrize(
    ("files", "reading"),
    [
        (
            {"cpu.stat": "usage_usec 12\nuser_usec 9\nsystem_usec 3\n", "memory.current": "4096\n"},
            InstanceReading(12_000, 4096),
        ),
        ({"cpu.stat": "nr_periods 0\nusage_usec 7\n", "memory.current": "1\n"}, InstanceReading(7_000, 1)),
        ({"cpu.stat": "", "memory.current": "0\n"}, InstanceReading(None, 0)),
        ({"cpu.stat": "usage_usec ?\n"}, InstanceReading(None, None)),
    ],
)
async def test_a_cgroups_files_as_kernels_write_them(
    tmp_path: Path, files: dict[str, str], reading: InstanceReading
) -> None:
    (tmp_path / "cgroup.procs").write_text("4194305\n")  # above the kernel's highest pid
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    reader = ProcUsageReader(BOOT)
    assert await reader.read([Handle("i-1", ProcessId(BOOT, 1, 1), "", 0, cgroup=str(tmp_path))]) == {"i-1": reading}
    reader.close()


async def test_hanging_read_delays_one_caller_only(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = ProcUsageReader(BOOT, deadline_s=0.01)
    hangs = threading.Event()
    monkeypatch.setattr(reader, "_read_all", lambda handles: hangs.wait(PATIENCE_S) and {})
    for _ in range(3):
        with pytest.raises(UnavailableError, match="overloaded"):
            await reader.read([])
    assert reader._thread._work_queue.qsize() == 0, "nothing queues up behind it"
    hangs.set()
    monkeypatch.undo()
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                assert await reader.read([]) == {}
                break
            except UnavailableError:
                await asyncio.sleep(0)
    reader.close()


async def test_reading_a_hundred_instances_is_cheap(slice_: CgroupSlice) -> None:
    """Once per second: 5 ms would be half a per cent of a core."""
    me = process_table.identify(os.getpid(), BOOT)
    assert me is not None
    handles = [Handle(f"i-{n}", me, "", 0, cgroup=str(slice_.create(f"i-{n}"))) for n in range(100)]
    reader = ProcUsageReader(BOOT)
    await reader.read(handles)
    spent = []
    for _ in range(5):
        began = process_time()
        await reader.read(handles)
        spent.append(process_time() - began)
    assert min(spent) < 0.05, f"{min(spent) * 1000:.1f} ms for 100 instances"
    reader.close()
