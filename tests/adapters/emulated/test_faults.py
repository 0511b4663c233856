"""Every fault, at every operation, as a caller of the real libcuda meets it: the answer, the state, the memory.

A fault's name says what is answered; what the tests look at besides is what the target did: its state as a second
caller reads it, and whether its memory is bit-identical once it runs again.
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
class Patient:
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
        """From whatever state it is in: it runs again, and no byte differs."""
        rest = {CHECKPOINTED: ("restore", "unlock"), LOCKED: ("unlock",), RUNNING: ()}[self.state()]
        for operation in rest:
            self.tool.must(operation, pid=self.pid)
        assert self.app.must("read", address=self.address, size=SIZE)["digest"] == self.digest


def patient_for(operation: str, driver: RunningDriver, tool: CudaProgram) -> Patient:
    app = driver.application()
    address = app.must("alloc", size=SIZE)["address"]
    digest = app.must("write", address=address, size=SIZE, seed=11)["digest"]
    for step in BEFORE[operation]:
        tool.must(step, pid=app.pid)
    return Patient(driver, tool, app, address, digest)


@every_operation
def test_a_result_in_place_of_the_work(driver: RunningDriver, tool: CudaProgram, operation: str) -> None:
    patient = patient_for(operation, driver, tool)
    for kind, code in RESULTS.items():
        driver.control.fault(operation, kind)
        assert patient.ask(operation) == code, kind
        assert patient.state() == FROM[operation], kind
    assert patient.ask(operation) == SUCCESS  # each was planned once
    patient.finish_cycle()


@every_operation
def test_a_result_although_the_work_was_done(driver: RunningDriver, tool: CudaProgram, operation: str) -> None:
    """Facts 2: a lock that answers an error may have left the process locked, and so the state is read again."""
    patient = patient_for(operation, driver, tool)
    for kind, code in RESULTS.items():
        driver.control.fault(operation, kind, after=True)
        assert patient.ask(operation) == code, kind
        assert patient.state() == DONE[operation], kind
        assert driver.used_bytes() == (0 if operation == "checkpoint" else 4 * MIB), kind
        patient.finish_cycle()
        for step in BEFORE[operation]:
            tool.must(step, pid=patient.pid)


@pytest.mark.parametrize("after", [False, True], ids=["half-way", "afterwards"])
@every_operation
def test_the_target_dies_of_it(driver: RunningDriver, tool: CudaProgram, operation: str, after: bool) -> None:
    """NVIDIA/cuda-checkpoint issue 58. Whoever called is answered, and the driver takes everything back."""
    patient = patient_for(operation, driver, tool)
    driver.control.fault(operation, "DEATH", after=after)
    assert patient.ask(operation) == OPERATING_SYSTEM
    assert patient.app.process.wait(10) == -signal.SIGSEGV
    assert [one.pid for one in driver.control.processes()] == [tool.pid]
    assert driver.used_bytes() == 0


def test_death_can_be_late_and_nothing_is_given_back_before(driver: RunningDriver, tool: CudaProgram) -> None:
    patient = patient_for("checkpoint", driver, tool)
    driver.control.fault("checkpoint", "DEATH", delay_ms=60_000)
    tool.send("checkpoint", pid=patient.pid)
    eventually(lambda: "checkpoint" in [one.operation for one in driver.control.processes()], "it is under way")
    assert driver.used_bytes() == 4 * MIB
    assert tool.is_waiting()
    os.kill(patient.pid, signal.SIGKILL)
    assert tool.receive()["rc"] == OPERATING_SYSTEM


def hanging(driver: RunningDriver, patient: Patient, operation: str) -> CudaProgram:
    """A caller whose call on the patient hangs."""
    driver.control.fault(operation, "HANG")
    caller = driver.tool()
    caller.send(operation, pid=patient.pid)
    eventually(lambda: [one.hung for one in driver.control.processes() if one.hung] != [], "the call hangs")
    return caller


@every_operation
def test_a_hang_ends_with_the_plan_and_then_it_is_done(
    driver: RunningDriver, tool: CudaProgram, operation: str
) -> None:
    patient = patient_for(operation, driver, tool)
    doomed = hanging(driver, patient, operation)
    assert patient.state() == FROM[operation]  # nothing was done, and other callers are served
    assert doomed.is_waiting()
    driver.control.clear_faults()
    assert doomed.receive()["rc"] == SUCCESS
    assert patient.state() == DONE[operation]
    patient.finish_cycle()


@every_change
def test_a_hung_operation_runs_later_though_its_caller_was_killed(
    driver: RunningDriver, tool: CudaProgram, operation: str
) -> None:
    """The first pitfall of the study: who kills a hung caller reads the state again, and later again."""
    patient = patient_for(operation, driver, tool)
    doomed = hanging(driver, patient, operation)
    doomed.close()
    assert patient.state() == FROM[operation]
    driver.control.clear_faults()
    assert patient.state() == DONE[operation]
    patient.finish_cycle()


@every_operation
def test_a_hang_after_the_work(driver: RunningDriver, tool: CudaProgram, operation: str) -> None:
    patient = patient_for(operation, driver, tool)
    driver.control.fault(operation, "HANG", after=True)
    doomed = driver.tool()
    doomed.send(operation, pid=patient.pid)
    eventually(lambda: [one.hung for one in driver.control.processes() if one.hung] != [], "the answer is held back")
    assert patient.state() == DONE[operation]
    assert doomed.is_waiting()
    driver.control.clear_faults()
    assert doomed.receive()["rc"] == SUCCESS
    patient.finish_cycle()


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
def test_only_sigkill_ends_a_caller_that_hangs(driver: RunningDriver, tool: CudaProgram, handler: bool) -> None:
    """Like one stuck in the kernel: NVIDIA's own program too, whose SIGTERM has its default action."""
    patients = [patient_for("lock", driver, tool) for _ in range(2)]
    driver.control.fault("lock", "HANG", times=2)
    utility = [str(driver.directory / "bin" / "cuda-checkpoint"), "--action", "lock", "--pid"]
    program = [sys.executable, "-c", HANDLES_SIGTERM] if handler else utility
    killed, asked = callers = [
        subprocess.Popen([*program, str(one.pid)], env=driver.environment, stdout=subprocess.PIPE, text=True)
        for one in patients
    ]
    try:
        for caller in callers:
            eventually(partial(holds_back, caller.pid, signal.SIGTERM), "the call hangs")
            caller.terminate()
        assert [one.state() for one in patients] == [RUNNING, RUNNING]  # a round trip later both are still there
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
    assert [one.state() for one in patients] == [LOCKED, LOCKED]


def test_a_hung_call_is_answered_when_its_target_dies(driver: RunningDriver, tool: CudaProgram) -> None:
    patient = patient_for("lock", driver, tool)
    driver.control.fault("lock", "HANG")
    tool.send("lock", pid=patient.pid)
    eventually(lambda: [one.hung for one in driver.control.processes() if one.hung] == [["lock"]], "the lock hangs")
    patient.app.kill()
    assert tool.receive()["rc"] == OPERATING_SYSTEM


@every_change
def test_success_that_is_none(driver: RunningDriver, tool: CudaProgram, operation: str) -> None:
    patient = patient_for(operation, driver, tool)
    driver.control.fault(operation, "STALE")
    assert patient.ask(operation) == SUCCESS
    assert patient.state() == FROM[operation]
    patient.finish_cycle()


def test_a_state_that_is_out_of_date(driver: RunningDriver, tool: CudaProgram) -> None:
    patient = patient_for("checkpoint", driver, tool)
    driver.control.fault("state", "STALE")
    assert patient.state() == RUNNING
    assert patient.state() == LOCKED


@every_operation
def test_a_process_that_failed_stays_failed(driver: RunningDriver, tool: CudaProgram, operation: str) -> None:
    patient = patient_for(operation, driver, tool)
    driver.control.fault(operation, FAILED)
    assert patient.ask(operation) == OPERATING_SYSTEM
    assert patient.state() == FAILED_STATE
    for further in CYCLE:
        assert patient.ask(further) == ILLEGAL_STATE
    assert patient.state() == FAILED_STATE
    patient.app.kill()
    eventually(lambda: driver.used_bytes() == 0, "its memory is released")


@every_operation
def test_an_operation_that_takes_longer(driver: RunningDriver, tool: CudaProgram, operation: str) -> None:
    patient = patient_for(operation, driver, tool)
    driver.control.fault(operation, SLOW, delay_ms=40)
    assert patient.ask(operation) == SUCCESS
    assert driver.oplog()[-1].us >= 40_000
    assert patient.state() == DONE[operation]
    patient.finish_cycle()


@pytest.mark.parametrize("kind", ["NOT_SUPPORTED", FAILED, "OUT_OF_MEMORY"])
def test_a_refusal_can_be_late(driver: RunningDriver, tool: CudaProgram, kind: str) -> None:
    patient = patient_for("restore", driver, tool)
    driver.control.fault("restore", kind, delay_ms=40)
    began = time.monotonic()
    assert patient.ask("restore") != SUCCESS
    assert time.monotonic() - began >= 0.04


@pytest.mark.parametrize("profile", ["570", "580"])
def test_a_planned_lack_of_memory_depends_on_the_driver(start_driver: StartDriver, profile: str) -> None:
    """580 refuses cleanly, and the caller may try again; 570 keeps no good state: 2, then 304, and 401 to an unlock.

    A real one leaves the process stuck under either (test_states.py, issue 44).
    """
    driver = start_driver("--profile", profile)
    tool = driver.tool()
    patient = patient_for("restore", driver, tool)
    driver.control.fault("restore", "OUT_OF_MEMORY")
    assert patient.ask("restore") == OUT_OF_MEMORY
    assert patient.state() == CHECKPOINTED
    if profile == "570":
        assert patient.ask("restore") == OPERATING_SYSTEM
        assert patient.ask("unlock") == ILLEGAL_STATE
    else:
        patient.finish_cycle()


def test_one_of_two_processes_fails_in_mid_checkpoint(driver: RunningDriver, tool: CudaProgram) -> None:
    """What a freezer has to roll back: one is checkpointed, the other is not."""
    first, second = (patient_for("checkpoint", driver, tool) for _ in range(2))
    driver.control.fault("checkpoint", "OPERATING_SYSTEM", pid=second.pid)
    assert first.ask("checkpoint") == SUCCESS
    assert second.ask("checkpoint") == OPERATING_SYSTEM
    assert (first.state(), second.state()) == (CHECKPOINTED, LOCKED)
    first.finish_cycle()
    second.finish_cycle()


def test_faults_are_met_in_order_and_counted(driver: RunningDriver, tool: CudaProgram) -> None:
    patient = patient_for("lock", driver, tool)
    driver.control.fault("lock", "NOT_READY", skip=1, times=2)
    driver.control.fault("lock", "NOT_SUPPORTED", pid=patient.pid)
    answers = [patient.ask("lock") for _ in range(4)]
    assert answers == [801, 600, 600, 0]  # the first planned one lets one call pass: the second takes it
    assert driver.control.faults() == []


def test_a_call_that_is_refused_anyway_uses_no_fault_up(driver: RunningDriver, tool: CudaProgram) -> None:
    patient = patient_for("lock", driver, tool)
    driver.control.fault("unlock", "NOT_SUPPORTED")
    assert patient.ask("unlock") == ILLEGAL_STATE  # it is running
    assert [(one.seen, one.hits) for one in driver.control.faults()] == [(0, 0)]


def test_a_fault_of_one_gpu(driver: RunningDriver, tool: CudaProgram) -> None:
    first, second = (one.uuid for one in driver.control.devices())
    patient, other = patient_for("lock", driver, tool), driver.application(device=1)
    driver.control.fault("lock", "NOT_READY", gpu=second, times=0)
    assert patient.ask("lock") == SUCCESS
    assert tool.ask("lock", pid=other.pid)["rc"] == 600
    driver.control.clear_faults()
    tool.must("checkpoint", pid=patient.pid)

    driver.control.fault("restore", "OUT_OF_MEMORY", gpu=second, times=0)
    raw_first, raw_second = (uuid.removeprefix("GPU-").replace("-", "") for uuid in (first, second))
    swapped = [(raw_first, raw_second), (raw_second, raw_first)]
    assert tool.ask("restore", pid=patient.pid, pairs=swapped)["rc"] == OUT_OF_MEMORY  # onto the second
    assert (driver.used_bytes(0), driver.used_bytes(1)) == (0, 0)
    assert patient.ask("restore") == SUCCESS  # onto the first, which is sound
    patient.finish_cycle()


@pytest.mark.parametrize(("operation", "kind"), [("lock", "NOT_SUPPORTED"), ("checkpoint", "OUT_OF_MEMORY")])
def test_the_utility_meets_them_too(driver: RunningDriver, tool: CudaProgram, operation: str, kind: str) -> None:
    patient = patient_for(operation, driver, tool)
    driver.control.fault(operation, kind)
    done = subprocess.run(
        [str(driver.directory / "bin" / "cuda-checkpoint"), "--action", operation, "--pid", str(patient.pid)],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    text = {"NOT_SUPPORTED": "operation not supported", "OUT_OF_MEMORY": "out of memory"}[kind]
    assert (done.returncode, done.stderr) == (1, f'Could not {operation} on process ID {patient.pid}: "{text}"\n')
