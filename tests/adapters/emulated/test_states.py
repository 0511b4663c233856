"""The state machine of cuCheckpointProcess*, its results, and the application's view."""

from __future__ import annotations

import pytest

from tests.adapters.emulated.conftest import StartDriver
from tests.adapters.emulated.harness import MIB, CudaProgram, RunningDriver, freeze, wake

RUNNING, LOCKED, CHECKPOINTED = 0, 1, 2
INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED, OPERATING_SYSTEM = 1, 2, 3, 304
ILLEGAL_STATE, NOT_READY, NOT_PERMITTED = 401, 600, 800


def test_memory_is_bit_identical_at_the_same_address(driver: RunningDriver, tool: CudaProgram) -> None:
    app = driver.application()
    sizes = [1, 4096, 100_000, 3 * MIB + 17, 8 * MIB]
    blocks = [(app.must("alloc", size=size)["address"], size) for size in sizes]
    written = [app.must("write", address=a, size=s, seed=s)["digest"] for a, s in blocks]
    used = driver.used_bytes()
    assert used >= sum(sizes)

    for _ in range(3):
        freeze(tool, app.pid)
        assert driver.used_bytes() == 0
        wake(tool, app.pid)
        assert driver.used_bytes() == used
        assert [app.must("read", address=a, size=s)["digest"] for a, s in blocks] == written

    assert app.must("free", address=blocks[2][0])
    assert app.must("alloc", size=5 * MIB)


def test_each_operation_needs_its_state(driver: RunningDriver, tool: CudaProgram) -> None:
    app = driver.application()
    steps = {RUNNING: "lock", LOCKED: "checkpoint", CHECKPOINTED: "restore"}
    allowed = {RUNNING: {"lock"}, LOCKED: {"checkpoint", "unlock"}, CHECKPOINTED: {"restore"}}
    for state in (RUNNING, LOCKED, CHECKPOINTED):
        for operation in ("lock", "checkpoint", "restore", "unlock"):
            if operation not in allowed[state]:
                assert tool.ask(operation, pid=app.pid)["rc"] == ILLEGAL_STATE, (state, operation)
        assert tool.must("state", pid=app.pid)["state"] == state
        tool.must(steps[state], pid=app.pid)
    assert tool.must("state", pid=app.pid)["state"] == LOCKED  # a restore ends locked
    tool.must("unlock", pid=app.pid)
    assert tool.must("state", pid=app.pid)["state"] == RUNNING


def test_calls_of_a_locked_process_wait_for_the_unlock(driver: RunningDriver, tool: CudaProgram) -> None:
    app = driver.application()
    freeze(tool, app.pid)
    app.send("synchronize")
    tool.must("state", pid=app.pid)  # the application is alive, and its restore thread answers
    assert app.is_waiting()
    tool.must("restore", pid=app.pid)
    assert app.is_waiting()  # restored, but not yet unlocked
    tool.must("unlock", pid=app.pid)
    assert app.receive()["rc"] == 0


def test_lock_times_out_and_the_process_stays_running(driver: RunningDriver, tool: CudaProgram) -> None:
    app = driver.application()
    app.must("begin_work")
    assert tool.ask("lock", pid=app.pid, timeout_ms=30)["rc"] == NOT_READY
    assert tool.must("state", pid=app.pid)["state"] == RUNNING
    app.must("synchronize")  # new calls enter again
    app.must("end_work")
    tool.must("lock", pid=app.pid, timeout_ms=5000)


def test_lock_without_timeout_waits_for_work_in_a_stream(driver: RunningDriver, tool: CudaProgram) -> None:
    app = driver.application()
    app.must("begin_work")
    tool.send("lock", pid=app.pid)
    app.must("end_work")
    assert tool.receive()["rc"] == 0
    assert tool.must("state", pid=app.pid)["state"] == LOCKED


def test_processes_without_cuda(driver: RunningDriver, tool: CudaProgram) -> None:
    bystander = driver.program()  # has loaded libcuda without calling cuInit
    assert tool.ask("state", pid=bystander.pid)["rc"] == NOT_INITIALIZED
    assert tool.ask("restore_thread", pid=bystander.pid)["rc"] == NOT_INITIALIZED
    assert tool.ask("lock", pid=bystander.pid)["rc"] == NOT_INITIALIZED
    assert tool.ask("state", pid=2**22 + 1)["rc"] == INVALID_VALUE
    assert tool.ask("state", pid=-1)["rc"] == INVALID_VALUE
    bystander.must("init")
    assert tool.must("state", pid=bystander.pid)["state"] == RUNNING


def test_caller_without_cuinit_may_restore_in_persistence_mode(driver: RunningDriver) -> None:
    app = driver.application()
    caller = driver.program()
    freeze(caller, app.pid)
    wake(caller, app.pid)


def test_restore_without_persistence_mode_or_cuinit_kills_the_target(
    start_driver: StartDriver,
) -> None:
    driver = start_driver("--no-persistence")
    saved, lost = driver.application(), driver.application()
    tool, stranger = driver.tool(), driver.program()
    for app in (saved, lost):
        freeze(stranger, app.pid)
    wake(tool, saved.pid)
    saved.must("synchronize")
    assert stranger.ask("restore", pid=lost.pid)["rc"] == NOT_PERMITTED
    assert lost.process.wait(10) == -9


@pytest.mark.parametrize("profile", ["570", "580"])
def test_restore_without_room_on_the_gpu(start_driver: StartDriver, profile: str) -> None:
    """Issue 44, seen on 580.95.05: 2, then 304 for good, unlock 401; only a kill helps."""
    driver = start_driver("--profile", profile, "--gib", "0.03125")
    sleeper, rival, tool = driver.application(), driver.application(), driver.tool()
    sleeper.must("alloc", size=16 * MIB)
    freeze(tool, sleeper.pid)
    taken = rival.must("alloc", size=24 * MIB)["address"]
    assert tool.ask("restore", pid=sleeper.pid)["rc"] == OUT_OF_MEMORY
    assert tool.must("state", pid=sleeper.pid)["state"] == CHECKPOINTED
    assert driver.used_bytes() == 24 * MIB  # the attempt has left nothing
    rival.must("free", address=taken)
    assert tool.ask("restore", pid=sleeper.pid)["rc"] == OPERATING_SYSTEM
    assert tool.ask("unlock", pid=sleeper.pid)["rc"] == ILLEGAL_STATE
    assert tool.must("state", pid=sleeper.pid)["state"] == CHECKPOINTED


def test_thread_id_as_pid_kills_the_process(driver: RunningDriver, tool: CudaProgram) -> None:
    """NVIDIA/cuda-checkpoint issue 41: any tid is accepted as a pid, and the target dies."""
    app = driver.application()
    tid = tool.must("restore_thread", pid=app.pid)["tid"]
    assert tid != app.pid
    assert tool.ask("lock", pid=tid)["rc"] == OPERATING_SYSTEM
    assert app.process.wait(10) == -9


def test_target_pays_for_host_memory_while_checkpointed(driver: RunningDriver, tool: CudaProgram) -> None:
    app = driver.application()
    address = app.must("alloc", size=32 * MIB)["address"]
    app.must("fill", address=address, size=32 * MIB, value=7)
    before = app.must("resident_bytes")
    freeze(tool, app.pid)
    frozen = app.ask("resident_bytes")  # not a CUDA call, so it is answered
    wake(tool, app.pid)
    after = app.must("resident_bytes")
    assert frozen["private"] - before["private"] >= 30 * MIB
    assert before["shared"] - frozen["shared"] >= 30 * MIB
    assert abs(after["private"] - before["private"]) <= 2 * MIB
