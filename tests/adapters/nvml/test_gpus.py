"""Tests an NVML that fails, hangs, and returns."""

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


class ScriptedSession(NvmlSession):
    """Answers, hangs until `go`, or fails, as set."""

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


async def test_one_thread_beside_the_loop_makes_all_calls() -> None:
    session = ScriptedSession()
    gpus = NvmlGpus(session=session)
    await asyncio.gather(*(gpus.list_gpus() for _ in range(10)))
    assert session.threads == {"nvml"}
    await gpus.close()


async def test_nvml_error_names_what_to_check() -> None:
    gpus = NvmlGpus(session=ScriptedSession())
    with pytest.raises(UnavailableError, match=r"NVML_UNAVAILABLE.*GPU is lost") as failure:
        await gpus.memory_free()
    assert failure.value.reason == "NVML_UNAVAILABLE"
    assert list(await gpus.list_gpus()) == []
    await gpus.close()


async def test_calls_fail_at_once_after_a_hang() -> None:
    session = ScriptedSession()
    gpus = NvmlGpus(deadline_s=0.05, session=session)
    with pytest.raises(UnavailableError, match="did not answer"):
        await gpus.processes()
    with pytest.raises(UnavailableError, match="has not returned"):
        await asyncio.wait_for(gpus.list_gpus(), 0.04)  # at once, not after another deadline
    session.go.set()
    async with asyncio.timeout(5):
        while True:  # until the loop has received the late answer
            try:
                await gpus.list_gpus()
                break
            except UnavailableError:
                await asyncio.sleep(0)
    await gpus.close()


async def test_cancelled_caller_does_not_disturb_the_next() -> None:
    session = ScriptedSession()
    gpus = NvmlGpus(session=session)
    hanging = asyncio.create_task(gpus.processes())
    await asyncio.to_thread(session.hung.wait, 5)
    hanging.cancel()
    await asyncio.wait([hanging])
    waiting = asyncio.create_task(gpus.list_gpus())
    session.go.set()
    assert list(await waiting) == []
    await gpus.close()


async def test_missing_library_is_reported() -> None:
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
