"""The program cuda-checkpoint: flags, texts and exit codes of its driver version."""

from __future__ import annotations

import os
import subprocess

from tests.adapters.emulated.conftest import StartDriver
from tests.adapters.emulated.harness import MIB, RunningDriver


def utility(driver: RunningDriver, *arguments: str) -> tuple[int, str, str]:
    """Run the program by its path alone, without LD_LIBRARY_PATH, like an agent."""
    done = subprocess.run(
        [str(driver.directory / "bin" / "cuda-checkpoint"), *arguments],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_four_actions_and_their_states(driver: RunningDriver) -> None:
    app = driver.application()
    address = app.must("alloc", size=MIB)["address"]
    digest = app.must("write", address=address, size=MIB, seed=5)["digest"]
    pid = str(app.pid)
    states = []
    for action in ("lock", "checkpoint", "restore", "unlock"):
        states.append(utility(driver, "--get-state", "--pid", pid))
        assert utility(driver, "--action", action, "--pid", pid) == (0, "", "")
    states.append(utility(driver, "--get-state", "-p", pid))
    assert states == [(0, f"{name}\n", "") for name in ("running", "locked", "checkpointed", "locked", "running")]
    code, tid, _ = utility(driver, "--get-restore-tid", "--pid", pid)
    assert code == 0
    assert os.path.isdir(f"/proc/{pid}/task/{tid.strip()}")
    for state in ("checkpointed\n", "running\n"):
        assert utility(driver, "--toggle", "--pid", pid)[0] == 0
        assert utility(driver, "--get-state", "--pid", pid)[1] == state
    assert app.must("read", address=address, size=MIB)["digest"] == digest


def test_texts_of_refusals(driver: RunningDriver) -> None:
    app, bystander = driver.application(), driver.program()
    own, other = str(app.pid), str(bystander.pid)
    assert utility(driver, "--action", "unlock", "--pid", own)[::2] == (
        1,
        f'Could not unlock on process ID {own}: "the operation cannot be performed in the present state"\n',
    )
    assert utility(driver, "--get-state", "--pid", other)[::2] == (
        1,
        f'Error getting process state for process ID {other}: "initialization error"\n',
    )
    assert utility(driver, "--action", "lock", "--pid", other)[2] == (
        f'Could not lock on process ID {other}: "initialization error"\n'
    )
    assert utility(driver, "--toggle", "--pid", other)[2] == (
        f'Error toggling CUDA in process ID {other}: "initialization error"\n'
    )
    assert utility(driver, "--get-restore-tid", "--pid", other)[2] == (
        f"Could not find restore thread for process ID {other}\n"
    )
    app.must("begin_work")
    code, _, said = utility(driver, "--action", "lock", "--timeout", "20", "--pid", own)
    assert (code, said) == (1, f'Could not lock on process ID {own}: "device not ready"\n')
    app.must("end_work")


def test_device_map_from_580_on(start_driver: StartDriver) -> None:
    new, old = start_driver("--profile", "580"), start_driver("--profile", "570")
    for driver, arguments in ((new, ("restore",)), (old, ("restore",))):
        app = driver.application()
        app.must("alloc", size=MIB)
        pid = str(app.pid)
        for action in ("lock", "checkpoint"):
            assert utility(driver, "--action", action, "--pid", pid)[0] == 0
        first, second = (device.uuid for device in driver.control.devices())
        mapping = f"{first}={second},{second}={first}"
        code, _, said = utility(driver, "--action", *arguments, "--pid", pid, "--device-map", mapping)
        if driver is new:
            assert (code, said) == (0, "")
            assert driver.used_bytes(1) == MIB
        else:
            assert code == 1
            assert said.startswith("Invalid option(s) or option(s) not supported by this CUDA Driver\n")
    assert "--device-map" not in utility(old, "--help")[1]


def test_wrong_device_map(driver: RunningDriver) -> None:
    app = driver.application()
    pid = str(app.pid)
    for action in ("lock", "checkpoint"):
        utility(driver, "--action", action, "--pid", pid)
    first, second = (device.uuid for device in driver.control.devices())
    for mapping in (f"{first}={second}", "nonsense", f"{first}={second},"):
        code, _, said = utility(driver, "--action", "restore", "--pid", pid, "-d", mapping)
        assert (code, said) == (1, f'Could not restore on process ID {pid}: "invalid argument"\n')
