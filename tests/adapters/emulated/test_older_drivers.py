"""Drivers before the public checkpoint API: 535 and 550 can't freeze, 555 only with its utility."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.adapters.emulated.conftest import StartDriver
from tests.adapters.emulated.harness import MIB, CudaProgram, RunningDriver

NOT_FOUND, ILLEGAL_STATE = 500, 401
CHECKPOINT_CALLS = ("GetState", "GetRestoreThreadId", "Lock", "Checkpoint", "Restore", "Unlock")


def utility(driver: RunningDriver, *arguments: str) -> tuple[int, str]:
    """Exit code and output."""
    done = subprocess.run(
        [str(driver.directory / "bin" / "cuda-checkpoint"), *arguments],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def act(driver: RunningDriver, app: CudaProgram, *actions: str) -> None:
    for action in actions:
        assert utility(driver, "--action", action, "--pid", str(app.pid)) == (0, ""), action


@pytest.mark.parametrize(("profile", "cuda"), [("535", 12020), ("555", 12050)])
def test_old_drivers_have_no_checkpoint_api(start_driver: StartDriver, profile: str, cuda: int) -> None:
    driver = start_driver("--profile", profile)
    app = driver.application()
    assert app.must("driver_version")["version"] == cuda
    for call in CHECKPOINT_CALLS:
        name = f"cuCheckpointProcess{call}"
        unknown = {"rc": 0, "found": False, "status": 1}
        assert app.ask("get_proc_address", symbol=name, version=12080) == unknown
        assert not app.ask("exports", symbol=name)["found"]
    assert app.ask("export_table") == {"rc": NOT_FOUND, "table": None}
    address = app.must("alloc", size=MIB)["address"]
    digest = app.must("write", address=address, size=MIB, seed=8)["digest"]
    assert app.must("read", address=address, size=MIB)["digest"] == digest


def test_550_only_toggles(start_driver: StartDriver) -> None:
    driver = start_driver("--profile", "550")
    app = driver.application()
    app.must("alloc", size=2 * MIB)
    pid = str(app.pid)
    assert utility(driver, "--get-state", "--pid", pid)[0] == 255
    assert utility(driver, "--toggle", "--pid", pid) == (0, "")
    assert driver.used_bytes() == 0
    assert utility(driver, "--toggle", "--pid", pid) == (0, "")
    assert driver.used_bytes() == 2 * MIB
    bystander = driver.program()
    said = f'Error toggling CUDA in process ID {bystander.pid}: "initialization error"\n'
    assert utility(driver, "--toggle", "--pid", str(bystander.pid)) == (255, said)


def test_555_freezes_and_wakes_by_the_utility(start_driver: StartDriver) -> None:
    driver = start_driver("--profile", "555")
    app = driver.application()
    address = app.must("alloc", size=3 * MIB)["address"]
    digest = app.must("write", address=address, size=3 * MIB, seed=9)["digest"]
    act(driver, app, "lock", "checkpoint")
    assert driver.used_bytes() == 0
    assert utility(driver, "--get-state", "--pid", str(app.pid)) == (0, "checkpointed\n")
    act(driver, app, "restore", "unlock")
    assert app.must("read", address=address, size=3 * MIB)["digest"] == digest


@pytest.mark.parametrize(("profile", "lives"), [("555", False), ("580", True)])
def test_utility_restore_without_persistence_mode(start_driver: StartDriver, profile: str, lives: bool) -> None:
    """Issue 25. From 570 on the caller's cuInit suffices, which the utility always calls."""
    driver = start_driver("--profile", profile, "--no-persistence")
    app = driver.application()
    act(driver, app, "lock", "checkpoint")
    said = utility(driver, "--action", "restore", "--pid", str(app.pid))
    if lives:
        assert said == (0, "")
        act(driver, app, "unlock")
        app.must("synchronize")
    else:
        assert said == (1, f'Could not restore on process ID {app.pid}: "operation not permitted"\n')
        assert app.process.wait(10) == -9


def test_mig_allows_a_lock_but_no_checkpoint(start_driver: StartDriver) -> None:
    """Issue 42."""
    driver = start_driver("--model", "A100", "--mig")
    app = driver.application()
    pid = str(app.pid)
    act(driver, app, "lock")
    said = utility(driver, "--action", "checkpoint", "--pid", pid)
    assert said == (1, f'Could not checkpoint on process ID {pid}: "out of memory"\n')
    assert utility(driver, "--get-state", "--pid", pid) == (0, "locked\n")
    act(driver, app, "unlock")
    app.must("synchronize")
