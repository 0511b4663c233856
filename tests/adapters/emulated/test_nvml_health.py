"""Unhealthy GPUs (lost, silent, XID errors), modes and utilisation in NVML."""

from __future__ import annotations

import pytest

from agent.core.errors import PreconditionError
from tests.adapters.emulated.conftest import StartDriver
from tests.adapters.emulated.harness import MIB, CudaProgram, RunningDriver, eventually

INVALID_ARGUMENT, NOT_SUPPORTED, TIMEOUT, FUNCTION_NOT_FOUND, GPU_IS_LOST = 2, 3, 10, 13, 15
QUESTIONS = (
    *("GetUUID", "GetName", "GetCudaComputeCapability", "GetArchitecture", "GetPciInfo", "GetIndex"),
    *("GetMemoryInfo", "GetUtilizationRates", "GetEncoderUtilization", "GetDecoderUtilization", "GetPowerUsage"),
    *("GetPersistenceMode", "GetComputeMode", "GetVirtualizationMode", "GetComputeRunningProcesses"),
    *("GetSupportedEventTypes",),
)
HANGS_FOR_S = 0.15


@pytest.fixture
def nvml(driver: RunningDriver) -> CudaProgram:
    return driver.nvml()


def test_modes_follow_changes(start_driver: StartDriver) -> None:
    driver = start_driver("--model", "H100", "--gpus", "1")
    nvml, uuid = driver.nvml(), driver.uuids()[0]
    expected = {"GetPersistenceMode": 1, "GetComputeMode": 0, "GetVirtualizationMode": 0, "GetMigMode": [0, 0]}
    assert {name: nvml.must("ask", name=name)["value"] for name in expected} == expected
    driver.control.set_device(uuid, persistence=False, compute_mode="EXCLUSIVE_PROCESS", mig=True)
    expected |= {"GetPersistenceMode": 0, "GetComputeMode": 3, "GetMigMode": [1, 1]}
    assert {name: nvml.must("ask", name=name)["value"] for name in expected} == expected
    driver.control.set_device(uuid, compute_mode="PROHIBITED")
    assert nvml.must("ask", name="GetComputeMode")["value"] == 2


def test_mig_depends_on_the_model(driver: RunningDriver, nvml: CudaProgram) -> None:
    assert nvml.ask("ask", name="GetMigMode")["rc"] == NOT_SUPPORTED
    with pytest.raises(PreconditionError) as refused:
        driver.control.set_device(driver.uuids()[0], mig=True)
    assert refused.value.reason == "EMULATED_MIG_UNSUPPORTED"


def test_temperature_function_depends_on_the_driver(start_driver: StartDriver, nvml: CudaProgram) -> None:
    new = [nvml.must("ask", name=name, arguments=[0])["value"] for name in ("GetTemperature", "GetTemperatureV")]
    assert new[0] == new[1] > 0
    older = start_driver("--profile", "555").nvml()
    assert older.must("ask", name="GetTemperature", arguments=[0])["value"] == new[0]
    assert older.ask("ask", name="GetTemperatureV", arguments=[0])["rc"] == FUNCTION_NOT_FOUND


def test_lost_gpu_gives_no_other_answer(driver: RunningDriver, nvml: CudaProgram) -> None:
    first, second = driver.uuids()
    driver.control.set_device(second, nvml_error=GPU_IS_LOST)
    for name in QUESTIONS:
        said = nvml.ask("ask", name=name, gpu=1)
        assert said == {"rc": GPU_IS_LOST, "text": "GPU is lost"}, name
        nvml.must("ask", name=name, gpu=0)
    assert nvml.ask("handle", gpu=1)["rc"] == nvml.ask("handle", gpu=1, uuid=second)["rc"] == GPU_IS_LOST
    assert nvml.ask("watch", gpus=[0, 1])["rc"] == GPU_IS_LOST
    nvml.must("handle", gpu=0, uuid=first)
    driver.control.set_device(second, nvml_error=0)
    nvml.must("ask", name="GetUUID", gpu=1)


@pytest.mark.parametrize("name", ["GetMemoryInfo", "GetUUID"])
def test_silent_gpu_blocks_only_calls_about_it(driver: RunningDriver, nvml: CudaProgram, name: str) -> None:
    second, other = driver.uuids()[1], driver.nvml()
    driver.control.set_device(second, silent=True)
    nvml.must("begin", name=name, gpu=1)
    for _ in range(3):
        nvml.must("ask", name=name, gpu=0)  # another thread of the same program
    assert nvml.ask("end", timeout_s=HANGS_FOR_S) == {}
    other.must("ask", name=name, gpu=0)
    driver.control.set_device(second, silent=False)
    assert nvml.must("end", timeout_s=10)["value"]


def test_queries_of_disconnected_clients_are_dropped(driver: RunningDriver, nvml: CudaProgram) -> None:
    second = driver.uuids()[1]
    driver.control.set_device(second, silent=True)
    nvml.must("begin", name="GetName", gpu=1)
    nvml.close()
    driver.control.set_device(second, silent=False)
    assert driver.nvml().must("ask", name="GetName", gpu=1)["value"] == "Emulated T4"


def test_xid_reaches_every_event_set_of_its_device(driver: RunningDriver) -> None:
    first, second = driver.uuids()
    agent, other = driver.nvml(), driver.nvml()
    both = agent.must("watch", gpus=[0, 1])["set"]
    one = other.must("watch", gpus=[1, 1])["set"]  # registered twice, reported once
    again = other.must("watch", gpus=[1])["set"]
    driver.control.raise_xid(second, 79)
    event = {"rc": 0, "gpu": second, "type": 8, "data": 79}
    assert agent.must("wait", number=both, timeout_ms=5000) == event
    assert other.must("wait", number=one, timeout_ms=5000) == event
    assert other.must("wait", number=again, timeout_ms=5000) == event
    driver.control.raise_xid(first, 48)
    driver.control.raise_xid(second, 63)
    said = [agent.must("wait", number=both, timeout_ms=5000) for _ in range(2)]
    assert sorted((event["gpu"], event["data"]) for event in said) == sorted([(first, 48), (second, 63)])
    assert other.must("wait", number=one, timeout_ms=5000)["data"] == 63
    assert other.ask("wait", number=one, timeout_ms=20)["rc"] == TIMEOUT  # the first GPU's event is not for it


def test_xid_of_a_silent_gpu(driver: RunningDriver, nvml: CudaProgram) -> None:
    """The kernel reports it although other NVML calls hang."""
    second = driver.uuids()[1]
    number = nvml.must("watch", gpus=[1])["set"]
    driver.control.set_device(second, nvml_error=GPU_IS_LOST, silent=True)
    driver.control.raise_xid(second, 79)
    assert nvml.must("wait", number=number, timeout_ms=5000)["data"] == 79


def test_utilisation_is_the_time_of_copies_and_fills(driver: RunningDriver, nvml: CudaProgram) -> None:
    app = driver.application()
    address = app.must("alloc", size=8 * MIB)["address"]
    assert nvml.must("ask", name="GetUtilizationRates")["value"] == [0, 0]
    app.must("keep_busy", address=address, size=8 * MIB, seconds=0.6)
    busy = nvml.must("ask", name="GetUtilizationRates")["value"]
    assert 20 <= busy[0] == busy[1] <= 75
    assert nvml.must("ask", name="GetUtilizationRates", gpu=1)["value"] == [0, 0]
    for codec in ("GetEncoderUtilization", "GetDecoderUtilization"):
        assert nvml.must("ask", name=codec)["value"][0] == 0
    eventually(
        lambda: nvml.must("ask", name="GetUtilizationRates")["value"] == [0, 0], "a second later it has been idle"
    )
