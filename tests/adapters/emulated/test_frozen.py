"""A frozen target answers nothing: calls hang, and take effect after the thaw."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.emulated.cgroups import find_v2_mount
from tests.adapters.emulated.harness import MIB, CudaProgram, RunningDriver, eventually, freeze, wake

pytestmark = pytest.mark.root


class Cgroup:
    """A v2 cgroup for one test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def add(self, pid: int) -> None:
        (self.path / "cgroup.procs").write_text(str(pid))

    def freeze(self, frozen: bool) -> None:
        (self.path / "cgroup.freeze").write_text("1" if frozen else "0")
        eventually(
            lambda: f"frozen {int(frozen)}" in (self.path / "cgroup.events").read_text(), f"cgroup frozen={frozen}"
        )

    def remove(self) -> None:
        self.freeze(False)
        (self.path / "cgroup.kill").write_text("1")
        end = time.monotonic() + 10
        while True:
            try:
                return self.path.rmdir()
            except OSError:
                assert time.monotonic() < end, "the test's cgroup can't be removed"
                time.sleep(0.01)


@pytest.fixture
def cgroup() -> Iterator[Cgroup]:
    mount = find_v2_mount(Path("/proc/self/mountinfo").read_text())
    if mount is None:
        pytest.skip("no cgroup v2 hierarchy is mounted here")
    try:
        made = Cgroup(mount / f"hibernode-test-{os.getpid()}-{time.monotonic_ns()}")
    except OSError as error:
        pytest.skip(f"the cgroup v2 hierarchy at {mount} is not writable: {error}")
    yield made
    made.remove()


def test_calls_on_a_frozen_target_hang_and_are_counted(
    driver: RunningDriver, tool: CudaProgram, cgroup: Cgroup
) -> None:
    app = driver.application()
    cgroup.add(app.pid)
    tool.must("state", pid=app.pid)
    assert driver.take_frozen_calls() == []

    cgroup.freeze(True)
    tool.send("state", pid=app.pid)
    eventually(lambda: driver.control.frozen_calls() == 1, "the call has reached the frozen target")
    assert tool.is_waiting()
    cgroup.freeze(False)
    assert tool.receive() == {"rc": 0, "state": 0}
    assert driver.take_frozen_calls() == [("get_state", app.pid)]
    assert driver.control.frozen_calls() == 0


def test_lock_of_a_killed_caller_happens_after_the_thaw(
    driver: RunningDriver, tool: CudaProgram, cgroup: Cgroup
) -> None:
    app = driver.application()
    cgroup.add(app.pid)
    cgroup.freeze(True)
    doomed = driver.tool()
    doomed.send("lock", pid=app.pid, timeout_ms=50)  # the timeout has no effect
    eventually(lambda: driver.control.frozen_calls() == 1, "the lock hangs")
    assert driver.take_frozen_calls() == [("lock", app.pid)]
    doomed.close()
    cgroup.freeze(False)
    assert tool.must("state", pid=app.pid)["state"] == 1
    tool.must("unlock", pid=app.pid)


def test_correct_freeze_and_wake_make_no_frozen_call(driver: RunningDriver, tool: CudaProgram, cgroup: Cgroup) -> None:
    app = driver.application()
    cgroup.add(app.pid)
    address = app.must("alloc", size=4 * MIB)["address"]
    digest = app.must("write", address=address, size=4 * MIB, seed=9)["digest"]
    for _ in range(3):
        freeze(tool, app.pid)
        cgroup.freeze(True)
        assert driver.used_bytes() == 0
        cgroup.freeze(False)
        wake(tool, app.pid)
    assert app.must("read", address=address, size=4 * MIB)["digest"] == digest
    assert driver.take_frozen_calls() == []


def test_hanging_restore_takes_no_vram_before_the_thaw(
    driver: RunningDriver, tool: CudaProgram, cgroup: Cgroup
) -> None:
    app = driver.application()
    cgroup.add(app.pid)
    app.must("alloc", size=4 * MIB)
    freeze(tool, app.pid)
    cgroup.freeze(True)
    tool.send("restore", pid=app.pid)
    eventually(lambda: driver.control.frozen_calls() == 1, "the restore hangs")
    assert driver.take_frozen_calls() == [("restore", app.pid)]
    assert driver.used_bytes() == 0
    cgroup.freeze(False)
    assert tool.receive()["rc"] == 0
    assert driver.used_bytes() == 4 * MIB


def test_byte_flipped_while_frozen_shows_after_the_wake(
    driver: RunningDriver, tool: CudaProgram, cgroup: Cgroup
) -> None:
    app = driver.application()
    cgroup.add(app.pid)
    address = app.must("alloc", size=4096)["address"]
    app.must("fill", address=address, size=4096, value=0x0F)
    freeze(tool, app.pid)
    cgroup.freeze(True)
    assert driver.control.flip_byte(offset=100) == app.pid
    cgroup.freeze(False)
    wake(tool, app.pid)
    assert app.must("read", address=address + 99, size=3, raw=True)["hex"] == "0ff00f"


def test_sigkill_ends_a_frozen_checkpointed_target(driver: RunningDriver, tool: CudaProgram, cgroup: Cgroup) -> None:
    app = driver.application()
    cgroup.add(app.pid)
    app.must("alloc", size=4 * MIB)
    freeze(tool, app.pid)
    cgroup.freeze(True)
    app.kill()
    eventually(lambda: app.pid not in [p.pid for p in driver.control.processes()], "the frozen process is released")
