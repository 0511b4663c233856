"""NVIDIA's cuda.core.checkpoint, an independent client, uses the emulated libcuda."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

from tests.adapters.emulated.conftest import StartDriver
from tests.adapters.emulated.harness import MIB, RunningDriver

pytestmark = pytest.mark.skipif(
    find_spec("cuda.bindings") is None or find_spec("cuda.core") is None,
    reason="needs cuda-core and cuda-bindings >= 13.0.2 (pip install cuda-core cuda-bindings)",
)

ORACLE = """
import json, sys
from cuda.bindings import driver
from cuda.core.checkpoint import Process
driver.cuInit(0)
process = Process(int(sys.argv[1]))
mapping = json.loads(sys.argv[2])
said = [process.state, process.restore_thread_id]
process.lock(timeout_ms=5000)
said.append(process.state)
process.checkpoint()
said.append(process.state)
print(json.dumps(said), flush=True)
sys.stdin.readline()
try:
    process.unlock()
except Exception as error:
    wrong = str(error)
process.restore(mapping or None)
said = [wrong, process.state]
process.unlock()
print(json.dumps([*said, process.state]), flush=True)
"""


def oracle(driver: RunningDriver, pid: int, mapping: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ORACLE, str(pid), json.dumps(mapping)],
        env=driver.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("profile", "migrate"), [("570", False), ("580", False), ("580", True)])
def test_process_is_bit_identical_after_freeze_and_wake(start_driver: StartDriver, profile: str, migrate: bool) -> None:
    driver = start_driver("--profile", profile)
    app = driver.application()
    address = app.must("alloc", size=5 * MIB)["address"]
    digest = app.must("write", address=address, size=5 * MIB, seed=3)["digest"]
    first, second = (device.uuid.removeprefix("GPU-") for device in driver.control.devices())
    with oracle(driver, app.pid, {first: second, second: first} if migrate else {}) as process:
        assert process.stdout is not None
        said: list[Any] = json.loads(process.stdout.readline())
        assert said[0] == "running"
        assert said[1] != app.pid
        assert said[2:] == ["locked", "checkpointed"]
        assert driver.used_bytes(0) == 0
        out, _ = process.communicate("\n", timeout=20)
    assert process.returncode == 0
    wrong, restored, unlocked = json.loads(out)
    assert "CUDA_ERROR_ILLEGAL_STATE" in wrong
    assert (restored, unlocked) == ("locked", "running")
    assert app.must("read", address=address, size=5 * MIB)["digest"] == digest
    assert driver.used_bytes(int(migrate)) == 6 * MIB
