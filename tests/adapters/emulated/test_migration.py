"""Driver 580 restores onto other GPUs; 570 does not."""

from __future__ import annotations

import pytest

from agent.emulated.env import attached
from tests.adapters.emulated.conftest import StartDriver
from tests.adapters.emulated.harness import MIB, CudaProgram, RunningDriver, freeze

INVALID_VALUE = 1


def uuids(driver: RunningDriver) -> list[str]:
    return [device.uuid.removeprefix("GPU-").replace("-", "") for device in driver.control.devices()]


def test_process_wakes_on_another_gpu_with_its_memory(driver: RunningDriver, tool: CudaProgram) -> None:
    app = driver.application()
    first, second = uuids(driver)
    address = app.must("alloc", size=3 * MIB)["address"]
    digest = app.must("write", address=address, size=3 * MIB, seed=4)["digest"]
    assert (driver.used_bytes(0), driver.used_bytes(1)) == (4 * MIB, 0)

    freeze(tool, app.pid)
    tool.must("restore", pid=app.pid, pairs=[(first, second), (second, first)])
    tool.must("unlock", pid=app.pid)
    assert (driver.used_bytes(0), driver.used_bytes(1)) == (0, 4 * MIB)
    assert app.must("read", address=address, size=3 * MIB)["digest"] == digest
    assert app.must("devices")["devices"][0]["uuid"] == second
    app.must("alloc", size=2 * MIB)  # new memory is on the new GPU
    assert (driver.used_bytes(0), driver.used_bytes(1)) == (0, 6 * MIB)

    freeze(tool, app.pid)  # it returns only with a map
    tool.must("restore", pid=app.pid)
    assert driver.used_bytes(1) == 6 * MIB


@pytest.mark.parametrize("wrong", ["incomplete", "unknown", "twice"])
def test_map_must_name_every_gpu_once(driver: RunningDriver, tool: CudaProgram, wrong: str) -> None:
    app = driver.application()
    first, second = uuids(driver)
    pairs = {
        "incomplete": [(first, second)],
        "unknown": [(first, "00" * 16), (second, first)],
        "twice": [(first, second), (second, second)],
    }[wrong]
    freeze(tool, app.pid)
    assert tool.ask("restore", pid=app.pid, pairs=pairs)["rc"] == INVALID_VALUE
    assert tool.must("state", pid=app.pid)["state"] == 2
    tool.must("restore", pid=app.pid, pairs=[(first, first), (second, second)])


def test_driver_570_accepts_no_map(start_driver: StartDriver) -> None:
    driver = start_driver("--profile", "570")
    app, tool = driver.application(), driver.tool()
    first, second = uuids(driver)
    freeze(tool, app.pid)
    assert tool.ask("restore", pid=app.pid, pairs=[(first, second), (second, first)])["rc"] == INVALID_VALUE
    tool.must("restore", pid=app.pid)


def test_visible_devices(start_driver: StartDriver) -> None:
    driver = start_driver("--gpus", "3")
    names = uuids(driver)
    texts = [device.uuid for device in driver.control.devices()]
    for value, expected in {
        "2,0": [2, 0],
        f"{texts[1]}": [1],
        f"{texts[1][:12]},{texts[2]}": [1, 2],
        "0,9,1": [0],
        "1,-1,0": [1],
        "2,GPU-nonsense,0": [2],
    }.items():
        app = driver.program(CUDA_VISIBLE_DEVICES=value)
        app.must("init")
        assert [d["uuid"] for d in app.must("devices")["devices"]] == [names[i] for i in expected], value
    for nothing in ("", "-1", "0,0", "3"):
        app = driver.program(CUDA_VISIBLE_DEVICES=nothing)
        assert app.ask("init")["rc"] == 100, nothing


def test_numbers_count_what_a_container_has(start_driver: StartDriver) -> None:
    """Its GPUs are 0 to n-1 whatever their place on the host; those of others have neither number nor UUID there."""
    driver = start_driver("--gpus", "3")
    names = uuids(driver)
    texts = [device.uuid for device in driver.control.devices()]
    only = dict(attached(texts[number]).split("=") for number in (1, 2))
    for value, expected in {None: [1, 2], "0": [1], "1,0": [2, 1], f"1,{texts[0]}": [2], "0,2": [1]}.items():
        app = driver.program(**only, **({} if value is None else {"CUDA_VISIBLE_DEVICES": value}))
        app.must("init")
        assert [d["uuid"] for d in app.must("devices")["devices"]] == [names[i] for i in expected], value
    assert driver.program(**only, CUDA_VISIBLE_DEVICES=texts[0]).ask("init")["rc"] == 100
