"""Many processes at once, and processes of other users."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adapters.emulated.conftest import StartDriver
from tests.adapters.emulated.harness import MIB, CudaProgram, RunningDriver, eventually, freeze, wake

INVALID_VALUE, NOT_INITIALIZED, OPERATING_SYSTEM = 1, 3, 304
NOBODY = 65534


def test_processes_take_turns_on_one_gpu_and_keep_their_memory(start_driver: StartDriver) -> None:
    """Four processes of 8 MiB on a GPU of 12 MiB: one is awake at a time, in random order."""
    driver = start_driver("--gib", str(12 / 1024), "--gpus", "1")
    tool, chance = driver.tool(), random.Random(7)
    images: dict[CudaProgram, tuple[int, str]] = {}
    for seed in range(4):
        app = driver.application()
        address = app.must("alloc", size=8 * MIB)["address"]
        images[app] = (address, app.must("write", address=address, size=8 * MIB, seed=seed)["digest"])
        freeze(tool, app.pid)
    for _ in range(12):
        app = chance.choice(list(images))
        wake(tool, app.pid)
        address, digest = images[app]
        assert app.must("read", address=address, size=8 * MIB)["digest"] == digest
        assert driver.used_bytes() == 8 * MIB
        freeze(tool, app.pid)
    assert driver.used_bytes() == 0


def test_kills_at_random_moments_leak_nothing(start_driver: StartDriver) -> None:
    driver = start_driver("--gib", "0.0625", "--gpus", "1")
    tool, chance = driver.tool(), random.Random(11)
    for round_ in range(8):
        app = driver.application()
        for _ in range(3):
            app.must("alloc", size=chance.choice([100, MIB, 4 * MIB]))
        app.send("alloc", size=16 * MIB)  # in flight when it dies
        if round_ % 2:
            tool.send("lock", pid=app.pid)
        app.kill()
        if round_ % 2:
            # Locked in time, died during the lock, gone, or dead and not yet reaped by its parent.
            assert tool.receive()["rc"] in (0, OPERATING_SYSTEM, INVALID_VALUE, NOT_INITIALIZED)
    eventually(lambda: len(driver.control.processes()) == 1, "all but the tool are released")
    eventually(lambda: driver.used_bytes() == 0, "what was being allocated is given back")
    driver.application().must("alloc", size=64 * MIB)


def test_callers_are_answered_concurrently(driver: RunningDriver) -> None:
    pairs = [(driver.application(), driver.tool()) for _ in range(4)]
    driver.control.set_latency(fixed_us=300_000)
    for app, tool in pairs:
        tool.send("lock", pid=app.pid)
    for _, tool in pairs:
        assert tool.receive()["rc"] == 0
    locks = driver.oplog()
    assert len(locks) == 4
    assert max(lock.at_ns for lock in locks) < min(lock.at_ns + lock.us * 1000 for lock in locks)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that other users can reach, unlike pytest's own."""
    made = Path(tempfile.mkdtemp())
    made.chmod(0o755)
    yield made / "driver"
    shutil.rmtree(made)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_only_root_and_the_owner_may_checkpoint_a_process(open_directory: Path, start_driver: StartDriver) -> None:
    driver = start_driver(directory=open_directory)
    roots, nobodys, nobody, root = (driver.program() for _ in range(4))
    for program in (nobodys, nobody):
        program.must("become", uid=NOBODY)
    for program in (roots, nobodys, nobody):
        program.must("init")
        program.must("context")
    assert nobody.ask("state", pid=roots.pid)["rc"] == OPERATING_SYSTEM
    assert nobody.ask("lock", pid=roots.pid)["rc"] == OPERATING_SYSTEM
    freeze(nobody, nobodys.pid)
    wake(root, nobodys.pid)
