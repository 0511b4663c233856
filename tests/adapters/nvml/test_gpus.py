"""NVML that fails, hangs, and comes back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence

import pytest
from pynvml import NVML_ERROR_GPU_IS_LOST, NVMLError

from agent.adapters.nvml.gpus import NvmlGpus
from agent.adapters.nvml.session import NvmlSession
from agent.core.errors import UnavailableError
from agent.core.types import Gpu
from agent.ports import GpuProcesses


class MoodySession(NvmlSession):
    """Answers, hangs until `go`, or fails, as told."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.hung = threading.Event()
        self.threads: set[str] = set()

    def list_gpus(self) -> Sequence[Gpu]:
        self.threads.add(threading.current_thread().name)
        return ()

    def processes(self) -> GpuProcesses:
        self.hung.set()
        assert self.go.wait(20)
        return GpuProcesses()

    def reset(self) -> None:
        """Nothing to reset."""

    def memory_free(self) -> Mapping[str, int]:
        raise NVMLError(NVML_ERROR_GPU_IS_LOST)


async def test_all_calls_are_made_by_one_thread_that_is_not_the_loops() -> None:
    session = MoodySession()
    gpus = NvmlGpus(session=session)
    await asyncio.gather(*(gpus.list_gpus() for _ in range(10)))
    assert session.threads == {"nvml"}
    await gpus.close()


async def test_an_error_of_nvml_says_what_to_look_at() -> None:
    gpus = NvmlGpus(session=MoodySession())
    with pytest.raises(UnavailableError, match=r"NVML_UNAVAILABLE.*GPU is lost") as failure:
        await gpus.memory_free()
    assert failure.value.reason == "NVML_UNAVAILABLE"
    assert list(await gpus.list_gpus()) == []
    await gpus.close()


async def test_a_hang_costs_one_deadline_and_then_nobody_waits() -> None:
    session = MoodySession()
    gpus = NvmlGpus(deadline_s=0.05, session=session)
    with pytest.raises(UnavailableError, match="did not answer"):
        await gpus.processes()
    with pytest.raises(UnavailableError, match="has not returned"):
        await asyncio.wait_for(gpus.list_gpus(), 0.04)  # at once, not after another deadline
    session.go.set()
    async with asyncio.timeout(5):
        while True:  # until the loop has heard of the late answer
            try:
                await gpus.list_gpus()
                break
            except UnavailableError:
                await asyncio.sleep(0)
    await gpus.close()


async def test_a_cancelled_caller_does_not_disturb_the_next() -> None:
    session = MoodySession()
    gpus = NvmlGpus(session=session)
    hanging = asyncio.create_task(gpus.processes())
    await asyncio.to_thread(session.hung.wait, 5)
    hanging.cancel()
    await asyncio.wait([hanging])
    waiting = asyncio.create_task(gpus.list_gpus())
    session.go.set()
    assert list(await waiting) == []
    await gpus.close()


async def test_a_machine_without_the_library_is_told_so() -> None:
    # In a process of its own: this one may have the emulated library loaded.
    import subprocess
    import sys

    code = """
import asyncio
from agent.adapters.nvml.gpus import NvmlGpus
try:
    asyncio.run(NvmlGpus().driver())
except Exception as error:
    print(error)
"""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=subprocess.PIPE, env={"LD_LIBRARY_PATH": "/nonexistent", "PATH": "/usr/bin"}
    )
    out, _ = await process.communicate()
    if b"NVML_UNAVAILABLE" not in out:
        pytest.skip("this machine has an NVIDIA driver")
    assert b"is the NVIDIA driver healthy?" in out
