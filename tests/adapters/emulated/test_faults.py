"""Every fault at every operation, seen by a caller of the real libcuda: the answer, the state, the memory.

The kind of a fault gives the answer. The tests also check the target: its state as another caller reads it, and that
its memory is bit-identical once it runs again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from agent.emulated.faults import FAILED, OPERATIONS, RESULTS, SLOW
from tests.adapters.emulated.conftest import StartDriver
from tests.adapters.emulated.harness import MIB, CudaProgram, RunningDriver, eventually

RUNNING, LOCKED, CHECKPOINTED, FAILED_STATE = range(4)
SUCCESS, OUT_OF_MEMORY, OPERATING_SYSTEM, ILLEGAL_STATE = 0, 2, 304, 401
CYCLE = ("lock", "checkpoint", "restore", "unlock")
BEFORE = {"lock": (), "state": (), "checkpoint": ("lock",), "unlock": ("lock",), "restore": ("lock", "checkpoint")}
FROM = {"lock": RUNNING, "state": RUNNING, "checkpoint": LOCKED, "unlock": LOCKED, "restore": CHECKPOINTED}
DONE = {"lock": LOCKED, "state": RUNNING, "checkpoint": CHECKPOINTED, "unlock": RUNNING, "restore": LOCKED}
SIZE = 3 * MIB

every_operation = pytest.mark.parametrize("operation", OPERATIONS)
every_change = pytest.mark.parametrize("operation", CYCLE)


@dataclass
class Target:
    """An application with memory on GPU 0, in the state that the operation needs."""

    driver: RunningDriver
    tool: CudaProgram
    app: CudaProgram
    address: int
    digest: str

    @property
    def pid(self) -> int:
        return self.app.pid

    def ask(self, operation: str) -> int:
        return int(self.tool.ask(operation, pid=self.pid)["rc"])

    def state(self) -> int:
        return int(self.tool.must("state", pid=self.pid)["state"])

    def finish_cycle(self) -> None:
        """Bring it back to RUNNING from any state and compare its memory."""
        rest = {CHECKPOINTED: ("restore", "unlock"), LOCKED: ("unlock",), RUNNING: ()}[self.state()]
        for operation in rest:
            self.tool.must(operation, pid=self.pid)
        assert self.app.must("read", address=self.address, size=SIZE)["digest"] == self.digest


def target_for(operation: str, driver: RunningDriver, tool: CudaProgram) -> Target:
    app = driver.application()
    address = app.must("alloc", size=SIZE)["address"]
    digest = app.must("write", address=address, size=SIZE, seed=11)["digest"]
    for step in BEFORE[operation]:
        tool.must(step, pid=app.pid)
    return Target(driver, tool, app, address, digest)


@every_operation
def test_result_instead_of_the_operation(driver: RunningDriver, tool: CudaProgram, operation: str) -> None:
    target = target_for(operation, driver, tool)
    for kind, code in RESULTS.items():
        driver.control.fault(operation, kind)
        assert target.ask(operation) == code, kind
        assert target.state() == FROM[operation], kind
    assert target.ask(operation) == SUCCESS  # every fault was planned once
    target.finish_cycle()


@every_operation
def test_result_after_the_operation(driver: RunningDriver, tool: CudaProgram, operation: str) -> None:
    """A lock that answers an error may still have locked (gpu-checkpoint.md, section 2), so callers must read the
    state."""
    target = target_for(operation, driver, tool)
    for kind, code in RESULTS.items():
        driver.control.fault(operation, kind, after=True)
        assert target.ask(operation) == code, kind
        assert target.state() == DONE[operation], kind
        assert driver.used_bytes() == (0 if operation == "checkpoint" else 4 * MIB), kind
        target.finish_cycle()
        for step in BEFORE[operation]:
            tool.must(step, pid=target.pid)


@pytest.mark.parametrize("after", [False, True], ids=["half-way", "afterwards"])
@every_operation
def test_target_dies_during_or_after_the_operation(
    driver: RunningDriver, tool: CudaProgram, operation: str, after: bool
) -> None:
    """NVIDIA/cuda-checkpoint issue 58. The caller is answered, and the driver frees everything."""
    target = target_for(operation, driver, tool)
    driver.control.fault(operation, "DEATH", after=after)
    assert target.ask(operation) == OPERATING_SYSTEM
    assert target.app.process.wait(10) == -signal.SIGSEGV
    assert [one.pid for one in driver.control.processes()] == [tool.pid]
    assert driver.used_bytes() == 0


def test_delayed_death_keeps_memory_until_then(driver: RunningDriver, tool: CudaProgram) -> None:
    target = target_for("checkpoint", driver, tool)
    driver.control.fault("checkpoint", "DEATH", delay_ms=60_000)
    tool.send("checkpoint", pid=target.pid)
    eventually(lambda: "checkpoint" in [one.operation for one in driver.control.processes()], "it is under way")
    assert driver.used_bytes() == 4 * MIB
    assert tool.is_waiting()
    os.kill(target.pid, signal.SIGKILL)
    assert tool.receive()["rc"] == OPERATING_SYSTEM


def hanging(driver: RunningDriver, target: Target, operation: str) -> CudaProgram:
    """A caller whose call on the target hangs."""
    driver.control.fault(operation, "HANG")
    caller = driver.tool()
    caller.send(operation, pid=target.pid)
    eventually(lambda: [one.hung for one in driver.control.processes() if one.hung] != [], "the call hangs")
    return caller


@every_operation
def test_hang_ends_with_the_plan_and_the_operation_runs(
    driver: RunningDriver, tool: CudaProgram, operation: str
) -> None:
    target = target_for(operation, driver, tool)
    doomed = hanging(driver, target, operation)
    assert target.state() == FROM[operation]  # unchanged, and other callers are served
    assert doomed.is_waiting()
    driver.control.clear_faults()
    assert doomed.receive()["rc"] == SUCCESS
    assert target.state() == DONE[operation]
    target.finish_cycle()


@every_change
def test_hung_operation_runs_after_its_caller_was_killed(
    driver: RunningDriver, tool: CudaProgram, operation: str
) -> None:
    """After killing a hung caller, the state may still change later and must be read again."""
    target = target_for(operation, driver, tool)
    doomed = hanging(driver, target, operation)
    doomed.close()
    assert target.state() == FROM[operation]
    driver.control.clear_faults()
    assert target.state() == DONE[operation]
    target.finish_cycle()


@every_operation
def test_hang_after_the_operation(driver: RunningDriver, tool: CudaProgram, operation: str) -> None:
    target = target_for(operation, driver, tool)
    driver.control.fault(operation, "HANG", after=True)
    doomed = driver.tool()
    doomed.send(operation, pid=target.pid)
    eventually(lambda: [one.hung for one in driver.control.processes() if one.hung] != [], "the answer is held back")
    assert target.state() == DONE[operation]
    assert doomed.is_waiting()
    driver.control.clear_faults()
    assert doomed.receive()["rc"] == SUCCESS
    target.finish_cycle()


def holds_back(pid: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    blocked = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk:")), 16)
    return bool(blocked >> (number - 1) & 1)


HANDLES_SIGTERM = """
import ctypes, signal, sys
signal.signal(signal.SIGTERM, lambda *_: print("asked to end", flush=True))
sys.exit(ctypes.CDLL("libcuda.so.1").cuCheckpointProcessLock(int(sys.argv[1]), None))
"""


@pytest.mark.parametrize("handler", [False, True], ids=["default", "handled"])
def test_only_sigkill_ends_a_hanging_caller(driver: RunningDriver, tool: CudaProgram, handler: bool) -> None:
    """Like a caller stuck in the kernel; also NVIDIA's own program, whose SIGTERM has its default action."""
    targets = [target_for("lock", driver, tool) for _ in range(2)]
    driver.control.fault("lock", "HANG", times=2)
    utility = [str(driver.directory / "bin" / "cuda-checkpoint"), "--action", "lock", "--pid"]
    program = [sys.executable, "-c", HANDLES_SIGTERM] if handler else utility
    killed, asked = callers = [
        subprocess.Popen([*program, str(one.pid)], env=driver.environment, stdout=subprocess.PIPE, text=True)
        for one in targets
    ]
    try:
        for caller in callers:
            eventually(partial(holds_back, caller.pid, signal.SIGTERM), "the call hangs")
            caller.terminate()
        assert [one.state() for one in targets] == [RUNNING, RUNNING]  # both still run after a round trip
        assert [caller.poll() for caller in callers] == [None, None]
        killed.kill()
        assert killed.wait(10) == -signal.SIGKILL
        driver.control.clear_faults()
        said, _ = asked.communicate(timeout=10)
        assert (asked.returncode, said) == ((0, "asked to end\n") if handler else (-signal.SIGTERM, ""))
    finally:
        for caller in callers:
            caller.kill()
            caller.communicate(timeout=10)
    assert [one.state() for one in targets] == [LOCKED, LOCKED]


def test_hung_call_is_answered_when_its_target_dies(driver: RunningDriver, tool: CudaProgram) -> None:
    target = target_for("lock", driver, tool)
    driver.control.fault("lock", "HANG")
    tool.send("lock", pid=target.pid)
    eventually(lambda: [one.hung for one in driver.control.processes() if one.hung] == [["lock"]], "the lock hangs")
    target.app.kill()
    assert tool.receive()["rc"] == OPERATING_SYSTEM


@every_change
def test_stale_success_changes_nothing(driver: RunningDriver, tool: CudaProgram, operation: str) -> None:
    target = target_for(operation, driver, tool)
    driver.control.fault(operation, "STALE")
    assert target.ask(operation) == SUCCESS
    assert target.state() == FROM[operation]
    target.finish_cycle()


def test_stale_state(driver: RunningDriver, tool: CudaProgram) -> None:
    target = target_for("checkpoint", driver, tool)
    driver.control.fault("state", "STALE")
    assert target.state() == RUNNING
    assert target.state() == LOCKED


@pytest.mark.parametrize(("kind", "state"), [("CHECKPOINTING", 4), ("RESTORING", 5)])
def test_state_of_an_operation_under_way(driver: RunningDriver, tool: CudaProgram, kind: str, state: int) -> None:
    target = target_for("checkpoint", driver, tool)
    driver.control.fault("state", kind)
    assert target.state() == state
    assert target.state() == LOCKED
    target.finish_cycle()


@every_operation
def test_failed_process_stays_failed(driver: RunningDriver, tool: CudaProgram, operation: str) -> None:
    target = target_for(operation, driver, tool)
    driver.control.fault(operation, FAILED)
    assert target.ask(operation) == OPERATING_SYSTEM
    assert target.state() == FAILED_STATE
    for further in CYCLE:
        assert target.ask(further) == ILLEGAL_STATE
    assert target.state() == FAILED_STATE
    target.app.kill()
    eventually(lambda: driver.used_bytes() == 0, "its memory is released")


@every_operation
def test_slow_operation(driver: RunningDriver, tool: CudaProgram, operation: str) -> None:
    target = target_for(operation, driver, tool)
    driver.control.fault(operation, SLOW, delay_ms=40)
    assert target.ask(operation) == SUCCESS
    assert driver.oplog()[-1].us >= 40_000
    assert target.state() == DONE[operation]
    target.finish_cycle()


@pytest.mark.parametrize("kind", ["NOT_SUPPORTED", FAILED, "OUT_OF_MEMORY"])
def test_delayed_refusal(driver: RunningDriver, tool: CudaProgram, kind: str) -> None:
    target = target_for("restore", driver, tool)
    driver.control.fault("restore", kind, delay_ms=40)
    began = time.monotonic()
    assert target.ask("restore") != SUCCESS
    assert time.monotonic() - began >= 0.04


@pytest.mark.parametrize("profile", ["570", "580"])
def test_planned_lack_of_memory_depends_on_the_driver(start_driver: StartDriver, profile: str) -> None:
    """580 refuses cleanly, and the caller may retry. 570 does not keep the state: 2, then 304, and 401 to an unlock.

    After a real lack of memory the process is stuck under both (test_states.py, issue 44)."""
    driver = start_driver("--profile", profile)
    tool = driver.tool()
    target = target_for("restore", driver, tool)
    driver.control.fault("restore", "OUT_OF_MEMORY")
    assert target.ask("restore") == OUT_OF_MEMORY
    assert target.state() == CHECKPOINTED
    if profile == "570":
        assert target.ask("restore") == OPERATING_SYSTEM
        assert target.ask("unlock") == ILLEGAL_STATE
    else:
        target.finish_cycle()


def test_one_of_two_processes_fails_during_its_checkpoint(driver: RunningDriver, tool: CudaProgram) -> None:
    """A freezer must roll back: one process is checkpointed, the other is not."""
    first, second = (target_for("checkpoint", driver, tool) for _ in range(2))
    driver.control.fault("checkpoint", "OPERATING_SYSTEM", pid=second.pid)
    assert first.ask("checkpoint") == SUCCESS
    assert second.ask("checkpoint") == OPERATING_SYSTEM
    assert (first.state(), second.state()) == (CHECKPOINTED, LOCKED)
    first.finish_cycle()
    second.finish_cycle()


def test_faults_apply_in_order_and_are_counted(driver: RunningDriver, tool: CudaProgram) -> None:
    target = target_for("lock", driver, tool)
    driver.control.fault("lock", "NOT_READY", skip=1, times=2)
    driver.control.fault("lock", "NOT_SUPPORTED", pid=target.pid)
    answers = [target.ask("lock") for _ in range(4)]
    assert answers == [801, 600, 600, 0]  # the first fault lets one call pass, which the second takes
    assert driver.control.faults() == []


def test_refused_call_uses_up_no_fault(driver: RunningDriver, tool: CudaProgram) -> None:
    target = target_for("lock", driver, tool)
    driver.control.fault("unlock", "NOT_SUPPORTED")
    assert target.ask("unlock") == ILLEGAL_STATE  # it is RUNNING
    assert [(one.seen, one.hits) for one in driver.control.faults()] == [(0, 0)]


def test_fault_of_one_gpu(driver: RunningDriver, tool: CudaProgram) -> None:
    first, second = (one.uuid for one in driver.control.devices())
    target, other = target_for("lock", driver, tool), driver.application(device=1)
    driver.control.fault("lock", "NOT_READY", gpu=second, times=0)
    assert target.ask("lock") == SUCCESS
    assert tool.ask("lock", pid=other.pid)["rc"] == 600
    driver.control.clear_faults()
    tool.must("checkpoint", pid=target.pid)

    driver.control.fault("restore", "OUT_OF_MEMORY", gpu=second, times=0)
    raw_first, raw_second = (uuid.removeprefix("GPU-").replace("-", "") for uuid in (first, second))
    swapped = [(raw_first, raw_second), (raw_second, raw_first)]
    assert tool.ask("restore", pid=target.pid, pairs=swapped)["rc"] == OUT_OF_MEMORY  # onto the second
    assert (driver.used_bytes(0), driver.used_bytes(1)) == (0, 0)
    assert target.ask("restore") == SUCCESS  # onto the first, which has no fault
    target.finish_cycle()


@pytest.mark.parametrize(("operation", "kind"), [("lock", "NOT_SUPPORTED"), ("checkpoint", "OUT_OF_MEMORY")])
def test_utility_meets_faults_too(driver: RunningDriver, tool: CudaProgram, operation: str, kind: str) -> None:
    target = target_for(operation, driver, tool)
    driver.control.fault(operation, kind)
    done = subprocess.run(
        [str(driver.directory / "bin" / "cuda-checkpoint"), "--action", operation, "--pid", str(target.pid)],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    text = {"NOT_SUPPORTED": "operation not supported", "OUT_OF_MEMORY": "out of memory"}[kind]
    assert (done.returncode, done.stderr) == (1, f'Could not {operation} on process ID {target.pid}: "{text}"\n')
