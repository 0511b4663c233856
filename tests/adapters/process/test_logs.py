"""Tests logs of host processes: bounded on disk while they run, the newest kept after their end."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from agent.adapters.process.runtime import ProcessRuntime, ProcessRuntimeOptions
from agent.adapters.runtime.log_files import LogFiles
from agent.core.types import SECOND_NS
from tests.adapters.process.test_runtime import spec
from tests.contract.runtime_worlds import until_said
from tests.fakes.clock import FakeClock


def test_a_log_past_its_cap_keeps_its_newest_half(tmp_path: Path) -> None:
    logs = LogFiles(tmp_path, cap_bytes=1000, keep=5)
    log_fd = logs.open("resize-a", None)
    path = logs.path("resize-a")
    for number in range(150):
        os.write(log_fd, f"line {number:03}\n".encode())
    assert logs.trim(path)
    assert not logs.trim(path)
    os.write(log_fd, b"after\n")  # O_APPEND: goes on at the new end
    os.close(log_fd)
    assert path.read_bytes() == b"after\n"
    assert logs.read(path, 15) == b"line 149\nafter\n"
    assert len(logs.read(path, 100_000)) == 506
    assert logs.read(tmp_path / "logs/unknown.log", 10) == b""


async def test_running_logs_are_checked_every_five_seconds(tmp_path: Path) -> None:
    clock = FakeClock()
    runtime = ProcessRuntime(ProcessRuntimeOptions(tmp_path, str(uuid.uuid4()), None, log_cap_bytes=100), clock)
    handle = await runtime.start(spec("resize-a", "seq 1 1000; echo done; sleep 86390"))
    try:
        await until_said(runtime, handle, b"\ndone\n")
        clock.advance(5 * SECOND_NS)
        assert os.stat(handle.log_path).st_size == 0
        assert await runtime.read_log(handle, 5) == b"done\n"
        assert clock.next_timer_ns == clock.monotonic_ns() + 5 * SECOND_NS
    finally:
        await runtime.destroy(handle)
        clock.advance(5 * SECOND_NS)
        assert clock.next_timer_ns is None, "nothing runs, nothing to look at"
        runtime.close()


async def test_log_of_an_ended_instance_is_capped(tmp_path: Path) -> None:
    """A program can write gigabytes between two checks, and after its end there is no further check."""
    settings = ProcessRuntimeOptions(tmp_path, str(uuid.uuid4()), None, log_cap_bytes=100)
    runtime = ProcessRuntime(settings, FakeClock())
    handle = await runtime.start(spec("resize-a", "seq 1 1000; echo done; sleep 86390"))
    try:
        await until_said(runtime, handle, b"\ndone\n")
        await runtime.destroy(handle)
        assert sum(file.stat().st_size for file in (tmp_path / "logs").iterdir()) == 50
        assert await runtime.read_log(handle, 5) == b"done\n"
    finally:
        runtime.close()


def test_only_the_newest_logs_of_ended_instances_stay(tmp_path: Path) -> None:
    logs = LogFiles(tmp_path, cap_bytes=1000, keep=2)
    for age, uid in enumerate(["newest", "newer", "old", "older", "running"]):
        os.close(logs.open(uid, None))
        os.utime(logs.path(uid), ns=(0, (100 - age) * SECOND_NS))
    logs.prune({"running"})
    assert sorted(path.stem for path in (tmp_path / "logs").iterdir()) == ["newer", "newest", "running"]
