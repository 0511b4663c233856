"""Tests the pool of driver workers with scripted workers that hang, die or send garbage."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from agent.adapters.cuda.driver_checkpointer import DriverCheckpointer, PoolLimits
from agent.adapters.cuda.driver_worker_process import WorkerOptions
from agent.core.errors import UnavailableError
from agent.ports import CudaCall, CudaFault, CudaOp, CudaReply, CudaState
from tests.fakes.driver_callers import worker_pids

# What each pid makes the worker do that is called for it.
FINE, REFUSES, HANGS, ENDS_WORKER, TALKS_NONSENSE, WAITS, IS_FORGOTTEN = 1, 2, 3, 4, 5, 6, 7

SCRIPTED_WORKER = """
import json, os, socket, sys, time
channel = socket.socket(fileno=int(sys.argv[1]))
assert int(sys.argv[2]) == os.getppid()
mode = os.environ.get("WORKER_MODE", "")
flaky = os.environ.get("WORKER_FAILS_UNTIL", "")
if mode == "silent":
    time.sleep(600)
if mode == "no-driver" or (flaky and not os.path.exists(flaky)):
    channel.send(json.dumps({"hello": 0, "error": "libcuda.so.1 can't be loaded"}).encode())
    sys.exit(1)
channel.send(json.dumps({"hello": 13000, "error": ""}).encode())
while message := channel.recv(1 << 17):
    request = json.loads(message)
    answers = []
    for op, pid, timeout_ms, pairs in request["calls"]:
        if pid == 3:
            time.sleep(600)
        if pid == 4:
            sys.exit(9)
        if pid == 5:
            channel.send(b"{nonsense")
            time.sleep(600)
        if pid == 6:
            open(os.environ["WORKER_FIFO"]).read()
        if pid == 7:
            continue
        answers.append([304, 0, 1, 7] if pid == 2 else [0, 0, 0, 250])
        if pid == 2:
            break
    channel.send(json.dumps({"id": request["id"], "answers": answers}).encode())
"""

Start = Callable[..., Awaitable[DriverCheckpointer]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Makes a started pool of scripted workers; takes the constructors' parameters."""
    script = tmp_path / "worker.py"
    script.write_text(SCRIPTED_WORKER)
    pools: list[DriverCheckpointer] = []

    async def make(
        environment: dict[str, str] | None = None,
        limits: PoolLimits | None = None,
        kill_signal: int = signal.SIGKILL,
        start_timeout_s: float = 10.0,
        on_stuck: Callable[[Sequence[str]], None] | None = None,
    ) -> DriverCheckpointer:
        options = WorkerOptions(
            environment=environment or {},
            script=script,
            kill_signal=kill_signal,
            kill_timeout_s=0.2,
            start_timeout_s=start_timeout_s,
        )
        pool = DriverCheckpointer(options, limits or PoolLimits(workers=1, first_backoff_s=0.001), on_stuck)
        pools.append(pool)
        await pool.start()
        return pool

    yield make
    for pool in pools:
        await pool.close()


def states(*pids: int) -> list[CudaCall]:
    return [CudaCall(CudaOp.STATE, pid) for pid in pids]


async def test_batch_is_answered_in_order_with_state_and_time(start: Start) -> None:
    pool = await start()
    reply = await pool.run(states(FINE, FINE), 5)
    assert reply.ok
    assert [(answer.state, answer.elapsed_us) for answer in reply.answers] == [(CudaState.RUNNING, 250)] * 2
    assert reply.driver_ns == 500_000


async def test_batch_ends_at_its_first_failure(start: Start) -> None:
    pool = await start()
    reply = await pool.run([CudaCall(CudaOp.LOCK, pid) for pid in (FINE, REFUSES, FINE)], 5)
    assert not reply.ok
    assert [answer.code for answer in reply.answers] == [0, 304]
    assert reply.answers[-1].state is CudaState.LOCKED
    assert reply.fault is CudaFault.NONE


@pytest.mark.parametrize("pid", [HANGS, ENDS_WORKER, TALKS_NONSENSE, IS_FORGOTTEN])
async def test_lost_worker_fails_its_batch_and_is_replaced(start: Start, pid: int) -> None:
    pool = await start()
    first = worker_pids()[0]
    reply = await pool.run(states(pid), 0.1)
    assert (reply.fault, reply.reason) == (CudaFault.LOST, "DRIVER_OPERATION_LOST")
    assert (await pool.run(states(FINE), 5)).ok
    assert worker_pids()[0] != first
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


async def test_fewer_answers_than_calls_are_a_failure(start: Start) -> None:
    """Without a failure at their end, a call was not made, or made and not reported."""
    pool = await start()
    assert (await pool.run(states(FINE, IS_FORGOTTEN), 5)).fault is CudaFault.LOST


async def test_batch_of_a_worker_killed_while_idle_goes_to_its_replacement(start: Start) -> None:
    pool = await start()
    kill_dead(worker_pids()[0])
    assert (await pool.run(states(FINE), 5)).ok


def kill_dead(pid: int) -> None:
    """Kill it and wait until it is dead, before the loop sees its end."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


async def test_hang_in_one_worker_does_not_block_the_other(start: Start) -> None:
    pool = await start(limits=PoolLimits(workers=2, first_backoff_s=0.001))
    hung = asyncio.create_task(pool.run(states(HANGS), 0.3))
    await asyncio.sleep(0)
    assert all([(await pool.run(states(FINE), 5)).ok for _ in range(20)])
    assert not hung.done()
    assert (await hung).fault is CudaFault.LOST


async def test_worker_that_survives_sigkill_is_abandoned_and_its_gpus_reported(start: Start) -> None:
    reported: list[tuple[str, ...]] = []
    # A signal that does nothing stands for SIGKILL on a process stuck in the kernel.
    pool = await start(kill_signal=signal.SIGURG, on_stuck=lambda uuids: reported.append(tuple(uuids)))
    stuck = worker_pids()[0]
    reply = await pool.run(states(HANGS), 0.05, ["GPU-a"])
    assert reply.fault is CudaFault.STUCK
    assert reported == [("GPU-a",)]
    assert (await pool.run(states(FINE), 5)).ok
    assert set(worker_pids()) > {stuck}
    await end_and_collect(stuck)


async def end_and_collect(pid: int) -> None:
    """Let the abandoned worker die; the loop reaps it."""
    loop = asyncio.get_running_loop()
    pidfd = os.pidfd_open(pid)
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    os.kill(pid, signal.SIGKILL)
    await asyncio.wait_for(ended.wait(), 5)
    loop.remove_reader(pidfd)
    os.close(pidfd)
    await asyncio.sleep(0)


async def test_queue_is_bounded_in_length_and_time(start: Start, tmp_path: Path) -> None:
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    limits = PoolLimits(workers=1, queue_length=1, queue_timeout_s=0.05)
    pool = await start({"WORKER_FIFO": str(fifo)}, limits)
    working = asyncio.create_task(pool.run(states(WAITS), 10))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(pool.run(states(FINE), 10))
    await asyncio.sleep(0)
    full = await pool.run(states(FINE), 10)
    assert (full.fault, full.reason) == (CudaFault.NOT_BEGUN, "DRIVER_QUEUE_FULL")
    late = await waiting
    assert (late.fault, late.reason) == (CudaFault.NOT_BEGUN, "DRIVER_BUSY")
    await asyncio.to_thread(fifo.write_text, "go")
    assert (await working).ok


async def test_cancelled_caller_leaves_the_queue(start: Start, tmp_path: Path) -> None:
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    pool = await start({"WORKER_FIFO": str(fifo)}, PoolLimits(workers=1, queue_length=1))
    working = asyncio.create_task(pool.run(states(WAITS), 10))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(pool.run(states(HANGS), 10))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    replacement = asyncio.create_task(pool.run(states(FINE), 10))
    await asyncio.to_thread(fifo.write_text, "go")
    assert (await working).ok
    assert (await replacement).ok


async def test_cancelled_caller_of_a_running_batch_does_not_disturb_the_next(start: Start, tmp_path: Path) -> None:
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    pool = await start({"WORKER_FIFO": str(fifo)})
    working = asyncio.create_task(pool.run(states(WAITS), 10))
    await asyncio.sleep(0)
    working.cancel()
    await asyncio.wait([working])
    await asyncio.to_thread(fifo.write_text, "go")
    reply: CudaReply = await pool.run(states(FINE), 10)
    assert [answer.call.pid for answer in reply.answers] == [FINE]


@pytest.mark.parametrize(("mode", "message"), [("no-driver", "can't be loaded"), ("silent", "not ready within")])
async def test_host_without_the_api_fails_at_start(start: Start, mode: str, message: str) -> None:
    with pytest.raises(UnavailableError, match=message) as failure:
        await start({"WORKER_MODE": mode}, start_timeout_s=0.2 if mode == "silent" else 10.0)
    assert failure.value.reason == "CHECKPOINT_API_UNAVAILABLE"


async def test_without_a_driver_batches_fail_at_once(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(SCRIPTED_WORKER)
    options = WorkerOptions(environment={"WORKER_MODE": "no-driver"}, script=script)
    pool = DriverCheckpointer(options, PoolLimits(workers=2, first_backoff_s=30.0))  # never started
    reply = await asyncio.wait_for(pool.run(states(FINE), 5), 20)
    assert (reply.fault, reply.reason) == (CudaFault.NOT_BEGUN, "DRIVER_WORKERS_DOWN")
    await pool.close()


async def test_workers_that_keep_failing_rest_until_there_is_work(start: Start, tmp_path: Path) -> None:
    driver_is_back = tmp_path / "driver"
    driver_is_back.touch()
    limits = PoolLimits(workers=1, first_backoff_s=0.001, last_backoff_s=0.001, max_failures=2)
    pool = await start({"WORKER_FAILS_UNTIL": str(driver_is_back)}, limits)
    driver_is_back.unlink()
    assert (await pool.run(states(ENDS_WORKER), 5)).fault is CudaFault.LOST
    down = await pool.run(states(FINE), 5)
    assert (down.fault, down.reason) == (CudaFault.NOT_BEGUN, "DRIVER_WORKERS_DOWN")
    assert "libcuda.so.1" in down.message
    assert worker_pids() == []
    driver_is_back.touch()
    assert (await pool.run(states(FINE), 5)).ok


async def test_closed_pool_takes_no_work_and_leaves_no_process(start: Start) -> None:
    pool = await start(limits=PoolLimits(workers=3))
    pids = worker_pids()
    await pool.close()
    assert (await pool.run(states(FINE), 5)).reason == "DRIVER_WORKERS_DOWN"
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
