"""The control of faults and hardware: strict, bounded, and listed as planned."""

from __future__ import annotations

import pytest

from agent.core.errors import PreconditionError
from agent.emulated.control import FaultView
from agent.emulated.faults import MAX_FAULTS
from agent.emulated.oplog import MAX_FROZEN_CALLS, FrozenCall, FrozenCalls
from tests.adapters.emulated.conftest import StartDriver
from tests.adapters.emulated.harness import MIB, CudaProgram, RunningDriver
from tests.fakes.emulated_driver import assert_no_frozen_calls


def test_planned_faults_are_listed(driver: RunningDriver) -> None:
    gpu = driver.control.devices()[1].uuid
    first = driver.control.fault("restore", "OUT_OF_MEMORY", gpu=gpu, times=3, skip=1, delay_ms=20)
    second = driver.control.fault("lock", "HANG", pid=4242, after=True)
    assert driver.control.faults() == [
        FaultView(first, "restore", "OUT_OF_MEMORY", None, gpu, 3, 1, False, 20, 0, 0),
        FaultView(second, "lock", "HANG", 4242, None, 1, 0, True, 0, 0, 0),
    ]
    driver.control.clear_faults()
    assert driver.control.faults() == []


def test_unlimited_fault_counts_its_hits(driver: RunningDriver, tool: CudaProgram) -> None:
    app = driver.application()
    driver.control.fault("lock", "NOT_READY", times=0, skip=1)
    assert [tool.ask("lock", pid=app.pid)["rc"] for _ in range(1)] == [0]
    tool.must("unlock", pid=app.pid)
    assert [tool.ask("lock", pid=app.pid)["rc"] for _ in range(3)] == [600] * 3
    assert [(one.seen, one.hits) for one in driver.control.faults()] == [(4, 3)]


def test_number_of_faults_is_limited(driver: RunningDriver) -> None:
    for _ in range(MAX_FAULTS):
        driver.control.fault("lock", "NOT_READY")
    with pytest.raises(PreconditionError, match="clear them before you plan more"):
        driver.control.fault("lock", "NOT_READY")


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        ("fault", {"operation": "explode"}, "choose one of lock, checkpoint, restore, unlock, state"),
        ("fault", {"operation": 5}, "operation must be a string"),
        ("fault", {"kind": "BOOM"}, "choose one of NOT_READY, NOT_SUPPORTED"),
        ("fault", {"times": True}, "times must be a number"),
        ("fault", {"times": -1}, "times must be a number"),
        ("fault", {"pid": "7"}, "pid must be a number"),
        ("fault", {"after": 1}, "after must be true or false"),
        ("fault", {"gpu": "GPU-0"}, "no emulated GPU GPU-0"),
        ("fault", {"colour": "red"}, "fault has no argument 'colour'; it takes operation, kind"),
        ("set_device", {"uuid": "GPU-0"}, "no emulated GPU GPU-0"),
        ("set_device", {"persistence": "yes"}, "persistence must be true or false"),
        ("set_device", {"compute_mode": "SHARED"}, "use DEFAULT, EXCLUSIVE_PROCESS or PROHIBITED"),
        ("set_device", {"nvml_error": 5000}, "nvml_error must be a number of 0 to 999"),
        ("raise_xid", {"code": -1}, "code must be a number"),
        ("reserve", {"bytes": 1 << 50}, "are free"),
        ("reserve", {"size": 5}, "has no argument 'size'"),
    ],
)
def test_invalid_command_changes_nothing(
    driver: RunningDriver, command: str, arguments: dict[str, object], said: str
) -> None:
    before = driver.control.devices()
    uuid = before[0].uuid
    sound: dict[str, dict[str, object]] = {
        "fault": {"operation": "lock", "kind": "NOT_READY", "times": 1, "skip": 0, "after": False, "delay_ms": 0},
        "set_device": {"uuid": uuid, "persistence": False},
        "raise_xid": {"uuid": uuid, "code": 79},
        "reserve": {"uuid": uuid, "bytes": 0},
    }
    with pytest.raises(PreconditionError) as refused:
        driver.control._request(command, **{**sound[command], **arguments})
    assert said in refused.value.message
    assert driver.control.devices() == before
    assert driver.control.faults() == []


def test_only_the_given_values_of_a_gpu_change(start_driver: StartDriver) -> None:
    driver = start_driver("--model", "A100")
    first, second = driver.control.devices()
    driver.control.set_device(first.uuid, persistence=False, compute_mode="EXCLUSIVE_PROCESS", nvml_error=15)
    driver.control.set_device(first.uuid, mig=True, silent=True)
    changed, same = driver.control.devices()
    assert (changed.persistence, changed.mig, changed.compute_mode) == (False, True, "EXCLUSIVE_PROCESS")
    assert (changed.nvml_error, changed.silent) == (15, True)
    assert same == second
    driver.control.set_device(
        first.uuid, persistence=True, mig=False, compute_mode="DEFAULT", nvml_error=0, silent=False
    )
    assert driver.control.devices() == [first, second]


def test_reserved_memory_counts_as_used(driver: RunningDriver, tool: CudaProgram) -> None:
    uuid = driver.control.devices()[0].uuid
    app = driver.application()
    app.must("alloc", size=4 * MIB)
    for operation in ("lock", "checkpoint"):
        tool.must(operation, pid=app.pid)
    driver.control.reserve(uuid, 1022 * MIB)
    assert driver.used_bytes() == 1022 * MIB
    assert tool.ask("restore", pid=app.pid)["rc"] == 2
    driver.control.reserve(uuid, 0)
    assert driver.used_bytes() == 0


def test_newest_frozen_calls_are_kept_and_all_are_counted() -> None:
    calls = FrozenCalls()
    for pid in range(MAX_FROZEN_CALLS + 10):
        calls.add("lock", pid, 1000 + pid)
    assert calls.count == MAX_FROZEN_CALLS + 10
    taken = calls.take()
    assert (len(taken), taken[0], calls.count) == (MAX_FROZEN_CALLS, FrozenCall("lock", 10, 1010), 0)
    assert calls.take() == ()


def test_guard_fails_a_test_with_frozen_calls(driver: RunningDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other test relies on this guard."""
    assert_no_frozen_calls(driver.control)
    monkeypatch.setattr(driver.control, "take_frozen_calls", lambda: [FrozenCall("get_state", 4242, 1)])
    with pytest.raises(AssertionError, match="get_state of 4242"):
        assert_no_frozen_calls(driver.control)
    monkeypatch.undo()
