"""Tests driver workers with a libcuda that crashes, fails to initialise or counts, and with many deaths in a row."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from agent.adapters.cuda.driver_checkpointer import MAX_BATCH_BYTES, MAX_CALLS, DriverCheckpointer, PoolLimits
from agent.adapters.cuda.driver_worker_process import WorkerOptions
from agent.adapters.cuda.result_codes import explain
from agent.core.types import MIB
from agent.ports import CudaCall, CudaFault, CudaOp, CudaState
from tests.fakes.driver_callers import worker_pids

STATE, LOCK, CHECKPOINT, RESTORE, UNLOCK = CudaOp
CRASHES = 666

LIBCUDA = """
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static void note(const char *what)
{
    FILE *file = fopen(getenv("CALLS"), "a");
    fprintf(file, "%s ", what);
    fclose(file);
}
int cuDriverGetVersion(int *version) { *version = atoi(getenv("CUDA")); return 0; }
int cuInit(unsigned flags) { note("init"); return atoi(getenv("INIT")); }
static int get_state(int pid, int *state) { *state = 0; return 0; }
static int lock(int pid, void *args)
{
    char what[40] = "lock";
    if (pid == 666)
        *(volatile int *)0 = 1;
    if (*(unsigned *)args)
        sprintf(what, "lock:%u", *(unsigned *)args);
    note(what);
    return 0;
}
static int checkpoint(int pid, void *args) { note("checkpoint"); return 0; }
static int restore(int pid, void *args) { note("restore"); return 0; }
static int unlock(int pid, void *args) { note("unlock"); return 0; }
int cuGetProcAddress_v2(const char *name, void **found, int version, uint64_t flags, int *query)
{
    const char *verb = name + strlen("cuCheckpointProcess");
    *found = !strcmp(verb, "GetState") ? (void *)get_state : !strcmp(verb, "Lock") ? (void *)lock
           : !strcmp(verb, "Checkpoint") ? (void *)checkpoint : !strcmp(verb, "Restore") ? (void *)restore
           : (void *)unlock;
    return 0;
}
"""

Start = Callable[..., Awaitable[DriverCheckpointer]]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcuda.so.1 that records its calls."""
    folder = tmp_path_factory.mktemp("libcuda")
    (folder / "libcuda.c").write_text(LIBCUDA)
    target = str(folder / "libcuda.so.1")
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", target, str(folder / "libcuda.c")], check=True)
    return folder


@pytest.fixture
async def start(library: Path, tmp_path: Path) -> AsyncIterator[Start]:
    """Makes a started pool of one worker on that library; `cuda` is its version, `init` the result of cuInit."""
    pools: list[DriverCheckpointer] = []

    async def make(init_before_restore: bool = False, cuda: int = 13000, init: int = 0) -> DriverCheckpointer:
        environment = {
            "LD_LIBRARY_PATH": str(library),
            "CALLS": str(tmp_path / "calls"),
            "CUDA": str(cuda),
            "INIT": str(init),
        }
        options = WorkerOptions(environment=environment, init_before_restore=init_before_restore)
        pool = DriverCheckpointer(options, PoolLimits(workers=1, first_backoff_s=0.001))
        pools.append(pool)
        await pool.start()
        return pool

    yield make
    for pool in pools:
        await pool.close()


@pytest.fixture
def calls(tmp_path: Path) -> Callable[[], list[str]]:
    """The calls of libcuda without get-state."""
    return lambda: (tmp_path / "calls").read_text().split() if (tmp_path / "calls").exists() else []


def cycle(pid: int = 7) -> list[CudaCall]:
    return [CudaCall(op, pid) for op in (LOCK, CHECKPOINT, RESTORE, UNLOCK, STATE)]


async def test_under_persistence_mode_cuinit_is_never_called(start: Start, calls: Callable[[], list[str]]) -> None:
    """It would cost seconds on a host with several GPUs."""
    pool = await start()
    for _ in range(2):
        assert (await pool.run(cycle(), 5.0)).ok
    assert calls() == ["lock", "checkpoint", "restore", "unlock"] * 2


async def test_without_persistence_mode_cuinit_precedes_the_first_restore_once(
    start: Start, calls: Callable[[], list[str]]
) -> None:
    pool = await start(init_before_restore=True)
    assert (await pool.run([CudaCall(LOCK, 7), CudaCall(CHECKPOINT, 7), CudaCall(STATE, 7)], 5.0)).ok
    assert calls() == ["lock", "checkpoint"]
    for _ in range(2):
        assert (await pool.run([CudaCall(RESTORE, 7)], 5.0)).ok
    assert calls()[2:] == ["init", "restore", "restore"]


async def test_replacement_worker_calls_cuinit_itself(start: Start, calls: Callable[[], list[str]]) -> None:
    pool = await start(init_before_restore=True)
    assert (await pool.run([CudaCall(RESTORE, 7)], 5.0)).ok
    assert (await pool.run([CudaCall(LOCK, CRASHES)], 5.0)).fault is CudaFault.LOST
    assert (await pool.run([CudaCall(RESTORE, 7)], 5.0)).ok
    assert calls() == ["init", "restore"] * 2


async def test_failed_cuinit_restores_nothing_and_is_retried(start: Start, calls: Callable[[], list[str]]) -> None:
    """Without it the driver would kill the target."""
    pool = await start(init_before_restore=True, init=802)
    for _ in range(2):
        reply = await pool.run([CudaCall(RESTORE, 7), CudaCall(UNLOCK, 7)], 5.0)
        assert [(answer.code, answer.state) for answer in reply.answers] == [(802, CudaState.RUNNING)]
        assert "nvidia-fabricmanager" in explain(reply.answers[0])[1]
    assert calls() == ["init", "init"]


@pytest.mark.parametrize(("cuda", "code"), [(12080, 801), (13000, 0)])
async def test_gpu_map_is_passed_only_to_drivers_that_read_it(
    start: Start, calls: Callable[[], list[str]], cuda: int, code: int
) -> None:
    """Before CUDA 13.0 the field is reserved: the instance would wake on the GPU that it has released."""
    pool = await start(cuda=cuda)
    uuid = "GPU-00112233-4455-6677-8899-aabbccddeeff"
    reply = await pool.run([CudaCall(RESTORE, 7, gpu_map=((uuid, uuid),))], 5.0)
    assert [answer.code for answer in reply.answers] == [code]
    assert calls() == ([] if code else ["restore"])


async def test_lock_timeout_reaches_the_driver(start: Start, calls: Callable[[], list[str]]) -> None:
    """In milliseconds; the driver takes 0 as for ever."""
    pool = await start()
    assert (await pool.run([CudaCall(LOCK, 7, timeout_ms=2500), CudaCall(LOCK, 8)], 5.0)).ok
    assert calls() == ["lock:2500", "lock"]


async def test_crash_inside_libcuda_loses_the_worker_and_is_reported(start: Start) -> None:
    pool = await start()
    first = worker_pids()[0]
    reply = await pool.run([CudaCall(STATE, 7), CudaCall(LOCK, CRASHES)], 5.0)
    assert (reply.fault, reply.reason) == (CudaFault.LOST, "DRIVER_OPERATION_LOST")
    assert "SIGSEGV" in reply.message
    assert (await pool.run(cycle(), 5.0)).ok
    assert worker_pids()[0] != first


async def test_crash_leaves_no_core_in_the_root_directory(start: Start) -> None:
    """A worker's working directory is /, and it may crash repeatedly."""
    await start()
    limits = Path(f"/proc/{worker_pids()[0]}/limits").read_text()  # noqa: ASYNC240
    (line,) = [line for line in limits.splitlines() if line.startswith("Max core file size")]
    assert line.split()[4:6] == ["0", "0"]


async def test_worker_uses_little_memory(start: Start) -> None:
    pool = await start()
    assert (await pool.run(cycle(), 5.0)).ok
    assert psutil.Process(worker_pids()[0]).memory_info().rss < 24 * MIB


@pytest.mark.slow
async def test_200_worker_deaths_leak_nothing(start: Start) -> None:
    pool = await start()
    await die(pool, 5)
    gc.collect()
    before, children = open_descriptors(), own_children()
    memory = psutil.Process().memory_info().rss
    await die(pool, 200)
    gc.collect()
    assert open_descriptors() == before
    assert own_children() == children
    assert psutil.Process().memory_info().rss - memory < 8 * MIB


async def die(pool: DriverCheckpointer, times: int) -> None:
    """Kill half of them from outside while idle, the other half by a crash in an operation."""
    for turn in range(times):
        assert (await pool.run([CudaCall(STATE, 7)], 10.0)).ok
        if turn % 2:
            kill_dead(worker_pids()[0])
        else:
            assert (await pool.run([CudaCall(LOCK, CRASHES)], 10.0)).fault is CudaFault.LOST
    assert (await pool.run([CudaCall(STATE, 7)], 10.0)).ok


def kill_dead(pid: int) -> None:
    """Kill it and wait until it is dead, before the loop sees its end."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def own_children() -> int:
    return len(psutil.Process().children())


async def test_more_processes_than_fit_into_a_message(start: Start) -> None:
    """An instance may have hundreds of processes, all of which are queried."""
    pool = await start()
    count = MAX_CALLS * 2 + 3
    reply = await pool.run([CudaCall(STATE, pid) for pid in range(1, count + 1)], 10.0)
    assert reply.ok
    assert [answer.call.pid for answer in reply.answers] == list(range(1, count + 1))


async def test_maps_of_many_gpus_fit_into_their_messages(start: Start, calls: Callable[[], list[str]]) -> None:
    pool = await start()
    pairs = tuple((f"GPU-{one:032x}", f"GPU-{one:032x}") for one in range(16))
    restores = [CudaCall(RESTORE, pid, gpu_map=pairs) for pid in range(1, 121)]
    assert sum(len(str(call.gpu_map)) for call in restores) > MAX_BATCH_BYTES
    reply = await pool.run(restores, 10.0)
    assert (reply.ok, len(reply.answers)) == (True, 120)
    assert calls() == ["restore"] * 120


async def test_large_batch_ends_at_its_first_failure(start: Start) -> None:
    pool = await start(cuda=12080)
    uuid = "GPU-00112233-4455-6677-8899-aabbccddeeff"
    states = [CudaCall(STATE, pid) for pid in range(1, MAX_CALLS + 10)]
    reply = await pool.run([*states, CudaCall(RESTORE, 7, gpu_map=((uuid, uuid),)), *states], 10.0)
    assert len(reply.answers) == len(states) + 1
    assert reply.answers[-1].code == 801


async def test_large_batch_with_unstarted_second_half_is_lost(start: Start) -> None:
    pool = await start()
    large = [*(CudaCall(STATE, pid) for pid in range(1, MAX_CALLS + 1)), CudaCall(LOCK, CRASHES)]
    assert (await pool.run(large, 10.0)).fault is CudaFault.LOST
    running = asyncio.create_task(pool.run([CudaCall(LOCK, 7)] * (MAX_CALLS + 1), 10.0))
    await asyncio.sleep(0)
    await pool.close()
    assert (await running).fault is not CudaFault.NONE
