"""The end of a CUDA process by exit, SIGKILL or exec; and forked children."""

from __future__ import annotations

import os
import signal

import pytest

from tests.adapters.emulated.conftest import StartDriver
from tests.adapters.emulated.harness import MIB, CudaProgram, RunningDriver, eventually, freeze

NOT_INITIALIZED, OPERATING_SYSTEM = 3, 304


@pytest.mark.parametrize("checkpointed", [False, True])
def test_sigkill_releases_vram_and_host_copy(driver: RunningDriver, tool: CudaProgram, checkpointed: bool) -> None:
    app = driver.application()
    app.must("alloc", size=16 * MIB)
    if checkpointed:
        freeze(tool, app.pid)
        assert driver.control.processes()[-1].image_bytes == 16 * MIB
    else:
        assert driver.used_bytes() == 16 * MIB
    app.kill()
    eventually(lambda: app.pid not in [p.pid for p in driver.control.processes()], "the process is released")
    assert driver.used_bytes() == 0
    assert sum(p.image_bytes for p in driver.control.processes()) == 0


def test_death_during_an_operation_answers_operating_system(driver: RunningDriver, tool: CudaProgram) -> None:
    app = driver.application()
    app.must("alloc", size=2 * MIB)
    driver.control.set_latency(fixed_us=60_000_000)
    tool.send("lock", pid=app.pid)
    eventually(lambda: "lock" in [p.operation for p in driver.control.processes()], "the lock is under way")
    os.kill(app.pid, signal.SIGKILL)
    assert tool.receive()["rc"] == OPERATING_SYSTEM
    assert driver.used_bytes() == 0


def test_forked_child_has_no_cuda_and_keeps_no_resources(driver: RunningDriver) -> None:
    app = driver.application()
    app.must("alloc", size=2 * MIB)
    child = app.ask("fork")
    assert child["rc"] == NOT_INITIALIZED
    assert child["init"] == NOT_INITIALIZED
    assert (child["sockets"], child["memfds"], child["mapped"]) == (0, 0, 0)
    app.must("synchronize")  # the parent is unaffected


def test_forked_child_does_not_keep_vram_of_its_dead_parent(driver: RunningDriver) -> None:
    app = driver.application()
    app.must("alloc", size=4 * MIB)
    child = app.must("fork_sleeper")["pid"]
    os.kill(app.pid, signal.SIGKILL)
    try:
        eventually(lambda: driver.used_bytes() == 0, "VRAM is released though a child lives")
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)


def test_child_forked_while_checkpointed_keeps_no_image(driver: RunningDriver, tool: CudaProgram) -> None:
    app = driver.application()
    app.must("alloc", size=32 * MIB)
    freeze(tool, app.pid)
    child = app.must("fork_sleeper")["pid"]
    try:
        with open(f"/proc/{child}/statm") as statm:
            assert int(statm.read().split()[1]) * 4096 < 32 * MIB
    finally:
        os.kill(child, signal.SIGKILL)


def test_exec_ends_cuda_and_the_same_pid_may_start_again(driver: RunningDriver, tool: CudaProgram) -> None:
    app = driver.application()
    app.must("alloc", size=4 * MIB)
    app.must("exec_sleeper")
    assert app.receive()["pid"] == app.pid
    eventually(lambda: driver.used_bytes() == 0, "the exec released its VRAM")
    assert tool.ask("state", pid=app.pid)["rc"] == NOT_INITIALIZED
    app.must("init")
    app.must("context")
    app.must("alloc", size=2 * MIB)
    freeze(tool, app.pid)
    assert driver.used_bytes() == 0


def test_destroyed_context_frees_its_memory(driver: RunningDriver) -> None:
    app = driver.application()
    app.must("alloc", size=4 * MIB)
    app.must("release_context")
    assert driver.used_bytes() == 0


def test_end_of_the_driver_process_fails_calls(start_driver: StartDriver) -> None:
    driver = start_driver()
    app = driver.application()
    driver.process.send_signal(signal.SIGTERM)
    driver.process.wait(10)
    eventually(lambda: app.ask("synchronize")["rc"] == 999, "a CUDA call fails")
