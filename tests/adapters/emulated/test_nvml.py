"""Unmodified nvidia-ml-py reads the emulated libnvidia-ml."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.emulated.conftest import StartDriver
from tests.adapters.emulated.harness import MIB, RunningDriver, freeze, wake

READER = Path(__file__).with_name("nvml_reader.py")
GIB = 1024 * MIB


def read(driver: RunningDriver) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(READER)], env=driver.environment, capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.parametrize(
    ("profile", "version", "cuda", "model", "mig"),
    [("570", "570.172.08", 12080, "T4", None), ("580", "580.65.06", 13000, "H100", [0, 0])],
)
def test_idle_gpus(
    start_driver: StartDriver, profile: str, version: str, cuda: int, model: str, mig: list[int] | None
) -> None:
    said = read(start_driver("--profile", profile, "--model", model, "--gpus", "2"))
    assert said["driver"] == version
    assert said["nvml"] == f"{cuda // 1000}.{version}"
    assert said["cuda"] == cuda
    assert said["wait"] == "timeout"
    assert len({device["uuid"] for device in said["devices"]}) == 2
    for device in said["devices"]:
        assert device["uuid"].startswith("GPU-")
        assert device["same_by_uuid"]
        assert device["name"] == f"Emulated {model}"
        assert device["memory"] == device["memory_v2"] == [GIB, GIB, 0]
        assert device["utilization"] == [0, 0]
        assert device["persistence"] == 1
        assert device["mig"] == mig
        assert device["temperatures"][0] == device["temperatures"][1] > 0
        assert device["power"] > 0
        assert device["capability"] == ([7, 5] if model == "T4" else [9, 0])
        assert device["architecture"] == (6 if model == "T4" else 9)
        assert device["processes"] == []
        assert device["events"] == 8


def test_checkpointed_processes_have_no_memory(driver: RunningDriver) -> None:
    app, tool = driver.application(device=1), driver.tool()
    app.must("alloc", size=4 * MIB)
    first, second = read(driver)["devices"]
    assert (first["processes"], first["memory"][2]) == ([], 0)
    assert (second["processes"], second["memory"][2]) == ([[app.pid, 4 * MIB]], 4 * MIB)
    freeze(tool, app.pid)
    second = read(driver)["devices"][1]
    assert (second["processes"], second["memory"][2]) == ([], 0)
    wake(tool, app.pid)
    assert read(driver)["devices"][1]["processes"] == [[app.pid, 4 * MIB]]


def test_many_processes_on_one_gpu(driver: RunningDriver) -> None:
    apps = [driver.application() for _ in range(6)]
    assert sorted(pid for pid, _ in read(driver)["devices"][0]["processes"]) == sorted(app.pid for app in apps)


def test_missing_driver_process_is_driver_not_loaded(start_driver: StartDriver) -> None:
    driver = start_driver()
    driver.process.terminate()
    driver.process.wait(10)
    code = "import pynvml\ntry: pynvml.nvmlInit()\nexcept pynvml.NVMLError_DriverNotLoaded: print('not loaded')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=driver.environment, capture_output=True, text=True, timeout=20, check=True
    )
    assert done.stdout == "not loaded\n"
