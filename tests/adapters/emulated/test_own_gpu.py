"""A program's view of its own GPU: CUDA_VISIBLE_DEVICES, pinned copies, compute mode, moves."""

from __future__ import annotations

from tests.adapters.emulated.harness import MIB, CudaProgram, RunningDriver, freeze, wake

INVALID_VALUE, OUT_OF_MEMORY, DEVICE_UNAVAILABLE = 1, 2, 46


def raw(uuid: str) -> str:
    return uuid.removeprefix("GPU-").replace("-", "")


def test_program_finds_its_only_gpu(driver: RunningDriver) -> None:
    second = driver.uuids()[1]
    app = driver.application(CUDA_VISIBLE_DEVICES=second)
    said = app.must("own_device")
    assert (said["device"], said["uuid"]) == (0, raw(second))
    assert (said["multiprocessors"], said["unified"], said["major"], said["compute_mode"]) == (40, 1, 7, 0)
    app.must("alloc", size=MIB)
    assert (driver.used_bytes(0), driver.used_bytes(1)) == (0, MIB)
    assert driver.nvml().must("ask", name="GetComputeRunningProcesses", gpu=1)["value"] != []


def test_map_includes_gpus_invisible_to_the_program(driver: RunningDriver, tool: CudaProgram) -> None:
    """The target's CUDA_VISIBLE_DEVICES does not shorten the map; after the move it sees the new GPU."""
    first, second = driver.uuids()
    nvml = driver.nvml()
    app = driver.application(CUDA_VISIBLE_DEVICES=first)
    address = app.must("alloc", size=MIB)["address"]
    digest = app.must("write", address=address, size=MIB, seed=3)["digest"]
    freeze(tool, app.pid)
    assert tool.ask("restore", pid=app.pid, pairs=[(raw(first), raw(second))])["rc"] == INVALID_VALUE
    tool.must("restore", pid=app.pid, pairs=[(raw(first), raw(second)), (raw(second), raw(first))])
    tool.must("unlock", pid=app.pid)
    assert app.must("own_device")["uuid"] == raw(second)
    assert [one["uuid"] for one in app.must("devices")["devices"]] == [raw(second)]
    assert app.must("read", address=address, size=MIB)["digest"] == digest
    assert nvml.must("ask", name="GetComputeRunningProcesses", gpu=0)["value"] == []
    assert [one[0] for one in nvml.must("ask", name="GetComputeRunningProcesses", gpu=1)["value"]] == [app.pid]


def test_copies_through_pinned_memory(driver: RunningDriver, tool: CudaProgram) -> None:
    app = driver.application()
    address = app.must("alloc", size=4 * MIB)["address"]
    pinned = app.must("pinned", size=4 * MIB)["address"]
    assert app.must("round_trip", address=address, pinned=pinned, size=4 * MIB, seed=1)["same"]
    freeze(tool, app.pid)
    wake(tool, app.pid)
    assert app.must("round_trip", address=address, pinned=pinned, size=4 * MIB, seed=2)["same"]
    app.must("free_pinned", address=pinned)
    assert app.ask("free_pinned", address=pinned)["rc"] == INVALID_VALUE
    assert app.ask("pinned", size=0)["rc"] == INVALID_VALUE


def test_exclusive_gpu_accepts_one_process(driver: RunningDriver, tool: CudaProgram) -> None:
    first = driver.uuids()[0]
    driver.control.set_device(first, compute_mode="EXCLUSIVE_PROCESS")
    holder, other = driver.application(), driver.program()
    assert holder.must("own_device")["compute_mode"] == 3
    other.must("init")
    assert other.ask("context")["rc"] == DEVICE_UNAVAILABLE
    other.must("context", device=1)
    freeze(tool, holder.pid)
    other.must("context", device=0)  # the holder is checkpointed


def test_prohibited_gpu_accepts_no_process(driver: RunningDriver) -> None:
    driver.control.set_device(driver.uuids()[0], compute_mode="PROHIBITED")
    app = driver.program()
    app.must("init")
    assert app.ask("context")["rc"] == DEVICE_UNAVAILABLE


def test_memory_reserved_from_outside(driver: RunningDriver, tool: CudaProgram) -> None:
    gib = 1024 * MIB
    first = driver.uuids()[0]
    app, nvml = driver.application(), driver.nvml()
    driver.control.reserve(first, gib - 8 * MIB)
    assert app.must("memory")["free"] == 8 * MIB
    assert nvml.must("ask", name="GetMemoryInfo")["value"] == [gib, 8 * MIB, gib - 8 * MIB]
    assert [one[1] for one in nvml.must("ask", name="GetComputeRunningProcesses")["value"]] == [0]
    assert app.ask("alloc", size=10 * MIB)["rc"] == OUT_OF_MEMORY
    app.must("alloc", size=6 * MIB)
    freeze(tool, app.pid)
    driver.control.reserve(first, gib - 2 * MIB)
    assert tool.ask("restore", pid=app.pid)["rc"] == OUT_OF_MEMORY
    driver.control.reserve(first, 0)
    assert driver.used_bytes() == 0
