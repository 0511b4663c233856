"""Tests the checkpointer on the cuda-checkpoint program, with misbehaving shell scripts in its place."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from agent.adapters.cuda import program_runner, utility_checkpointer
from agent.adapters.cuda.utility_checkpointer import UtilityCheckpointer
from agent.core.errors import ConfigError, UnavailableError
from agent.ports import CudaCall, CudaFault, CudaOp, CudaState
from tests.adapters.cuda.test_utility_program import HELP, NEW, NOISE, OLD


@pytest.mark.parametrize(
    "call",
    [
        CudaCall(CudaOp.STATE, 0),
        CudaCall(CudaOp.STATE, -5),
        CudaCall(CudaOp.LOCK, 71, -1),
        CudaCall(CudaOp.LOCK, 71, 2**31),
        CudaCall(CudaOp.RESTORE, 71, gpu_map=(("GPU-1", NEW),)),
        CudaCall(CudaOp.RESTORE, 71, gpu_map=((OLD, f"{NEW} --toggle"),)),
    ],
)
async def test_bad_arguments_never_reach_the_program(tmp_path: Path, call: CudaCall) -> None:
    utility = program(tmp_path, "touch started")
    with pytest.raises(ValueError, match=r"range|uuid"):
        await utility.run([CudaCall(CudaOp.STATE, 71), call], 5.0)
    assert not (tmp_path / "started").exists()


def program(folder: Path, script: str, **options: object) -> UtilityCheckpointer:
    """A shell script as cuda-checkpoint in `folder`, its working directory; $1 is the first argument."""
    path = folder / "cuda-checkpoint"
    path.write_text(f"#!/bin/sh\ncd {folder}\n{script}\n")
    path.chmod(0o700)
    environment = {"PATH": "/usr/bin:/bin", "LD_PRELOAD": "/lib/noise.so"}
    return UtilityCheckpointer(path, environment, **{"parallel": 1, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("noise", ["", NOISE])
@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('Could not lock on process ID 71: "device not ready"', 600),
        ('Could not lock on process ID 71: "operation not supported"', 801),
        ('Could not restore on process ID 71: "operation not permitted"', 800),
        ('Could not restore on process ID 71: "invalid argument"', 1),
        ('Could not checkpoint on process ID 71: "out of memory"', 2),
        ('Could not unlock on process ID 71: "the operation cannot be performed in the present state"', 401),
        ('Could not checkpoint on process ID 71: "OS call failed or operation not supported on this OS"', 304),
        ('Could not restore on process ID 71: "something of a newer driver"', 999),
        ("Insufficient driver", 801),
        ("Invalid option(s) or option(s) not supported by this CUDA Driver\n" + HELP, 801),
        ("Something new", 999),
        ("", 999),
    ],
)
async def test_error_texts_become_codes_and_the_state_is_read(tmp_path: Path, text: str, code: int, noise: str) -> None:
    (tmp_path / "said").write_text(noise + text + "\n" + noise)
    utility = program(tmp_path, "[ $1 = --get-state ] && { echo locked; exit 0; }; cat said >&2; exit 1")
    reply = await utility.run([CudaCall(CudaOp.LOCK, 71), CudaCall(CudaOp.UNLOCK, 71)], 5.0)
    assert [answer.code for answer in reply.answers] == [code]
    assert reply.answers[0].state is CudaState.LOCKED


@pytest.mark.parametrize("op", [CudaOp.STATE, CudaOp.LOCK])
async def test_failed_cuinit_says_nothing_about_the_process(tmp_path: Path, op: CudaOp) -> None:
    """The text equals that for a process without CUDA; mistaken for it, its memory would be given to another
    instance."""
    utility = program(tmp_path, "echo 'Error initializing CUDA: \"initialization error\"' >&2; exit 1")
    reply = await utility.run([CudaCall(op, 71)], 5.0)
    assert (reply.fault, reply.reason, reply.answers) == (CudaFault.NOT_BEGUN, "CUDA_INIT_FAILED", ())


async def test_batch_that_fails_to_start_midway_is_lost(tmp_path: Path) -> None:
    script = "[ $2 = lock ] && exit 0; echo 'Error initializing CUDA: \"unknown error\"' >&2; exit 1"
    reply = await program(tmp_path, script).run([CudaCall(op, 71) for op in (CudaOp.LOCK, CudaOp.CHECKPOINT)], 5.0)
    assert (reply.fault, reply.reason) == (CudaFault.LOST, "CUDA_INIT_FAILED")


async def test_program_runs_without_ld_preload(tmp_path: Path) -> None:
    utility = program(tmp_path, 'echo "${LD_PRELOAD-running}"')
    assert (await utility.run([CudaCall(CudaOp.STATE, 71)], 5.0)).answers[0].state is CudaState.RUNNING


@pytest.mark.parametrize(
    "script",
    ["trap '' TERM; exec sleep 600", "exec yes", "sleep 600 & echo $! > pid; wait"],
    ids=["hangs", "prints without end", "waits for a child"],
)
async def test_program_that_does_not_end_is_killed(tmp_path: Path, script: str) -> None:
    utility = program(tmp_path, f"echo $$ > pid; {script}")
    reply = await utility.run([CudaCall(CudaOp.CHECKPOINT, 71)], 0.2)
    assert (reply.fault, reply.reason) == (CudaFault.LOST, "DRIVER_OPERATION_LOST")
    await assert_gone(tmp_path)


async def assert_gone(folder: Path) -> None:
    """It ends; a grandchild may wait for init to reap it."""
    pid = int((folder / "pid").read_text())
    with suppress(psutil.NoSuchProcess):
        async with asyncio.timeout(5.0):
            while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:  # noqa: ASYNC110
                await asyncio.sleep(0.005)


async def test_child_that_keeps_the_pipe_open_is_not_waited_for(tmp_path: Path) -> None:
    """Reading to the end would hang the whole agent."""
    utility = program(tmp_path, "sleep 600 & echo $! > pid; echo running")
    async with asyncio.timeout(5.0):
        reply = await utility.run([CudaCall(CudaOp.STATE, 71)], 4.0)
    assert reply.answers[0].state is CudaState.RUNNING
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


async def test_crashed_program_has_failed_and_the_state_is_read(tmp_path: Path) -> None:
    utility = program(tmp_path, "[ $1 = --get-state ] && { echo checkpointed; exit 0; }; kill -SEGV $$")
    reply = await utility.run([CudaCall(CudaOp.CHECKPOINT, 71)], 5.0)
    assert [(answer.code, answer.state) for answer in reply.answers] == [(999, CudaState.CHECKPOINTED)]


async def test_program_stuck_in_the_kernel_is_abandoned_and_its_gpus_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[tuple[str, ...]] = []
    monkeypatch.setattr(program_runner, "KILL_TIMEOUT_S", 0.05)
    # A signal that does nothing stands for SIGKILL on a process stuck in the kernel.
    spawn = program_runner.BoundedProgram.__init__
    monkeypatch.setattr(
        program_runner.BoundedProgram,
        "__init__",
        lambda self, command, environment: spawn(self, command, environment, kill_signal=signal.SIGURG),
    )
    utility = program(tmp_path, "echo $$ > pid; exec sleep 600", on_stuck=lambda uuids: reported.append(tuple(uuids)))
    reply = await utility.run([CudaCall(CudaOp.RESTORE, 71)], 0.2, [OLD])
    assert (reply.fault, reported) == (CudaFault.STUCK, [(OLD,)])
    pid = int((tmp_path / "pid").read_text())
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(5.0):  # it dies after all and is reaped
        while os.path.exists(f"/proc/{pid}"):  # noqa: ASYNC110, ASYNC240
            await asyncio.sleep(0.005)


async def test_close_ends_running_programs_and_takes_no_more(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "begun")
    utility = program(tmp_path, "echo $$ > pid; echo > begun; exec sleep 600")
    running = asyncio.create_task(utility.run([CudaCall(CudaOp.LOCK, 71), CudaCall(CudaOp.STATE, 71)], 60.0))
    await asyncio.to_thread((tmp_path / "begun").read_text)
    await utility.close()
    assert (await running).fault is CudaFault.LOST
    await assert_gone(tmp_path)
    assert (await utility.run([CudaCall(CudaOp.STATE, 71)], 5.0)).reason == "DRIVER_WORKERS_DOWN"


async def test_batch_waits_for_its_turn_until_a_timeout(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    utility = program(tmp_path, "[ $3 = 71 ] && read line < go; echo running", queue_timeout_s=0.05)
    first = asyncio.create_task(utility.run([CudaCall(CudaOp.STATE, 71)], 10.0))
    await asyncio.sleep(0)
    late = await utility.run([CudaCall(CudaOp.STATE, 72)], 10.0)
    assert (late.fault, late.reason) == (CudaFault.NOT_BEGUN, "DRIVER_BUSY")
    await asyncio.to_thread((tmp_path / "go").write_text, "\n")
    assert (await first).ok


async def test_cancelled_caller_leaves_the_program_running_to_its_end(tmp_path: Path) -> None:
    for pid in (71, 72):
        os.mkfifo(tmp_path / f"go-{pid}")
    utility = program(tmp_path, "read line < go-$3; echo running")
    leaving = asyncio.create_task(utility.run([CudaCall(CudaOp.STATE, 71)], 10.0))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait([leaving])
    waiting = asyncio.create_task(utility.run([CudaCall(CudaOp.STATE, 72)], 10.0))
    for pid in (71, 72):  # opening it waits for the program that reads it
        await asyncio.to_thread((tmp_path / f"go-{pid}").write_text, "\n")
    assert (await waiting).answers[0].state is CudaState.RUNNING


async def test_no_descriptor_is_left_behind(tmp_path: Path) -> None:
    utility = program(tmp_path, "[ $1 = --get-state ] && echo running; [ $1 = --get-state ]", parallel=2)
    await utility.run([CudaCall(CudaOp.STATE, 71)], 5.0)
    gc.collect()  # garbage of earlier tests must not go during this one
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        await utility.run([CudaCall(CudaOp.STATE, 71), CudaCall(CudaOp.LOCK, 71)], 5.0)
    assert len(os.listdir("/proc/self/fd")) == before


async def test_start_succeeds_with_separate_actions(tmp_path: Path) -> None:
    (tmp_path / "help").write_text(NOISE + HELP)
    utility = program(tmp_path, "[ $1 = --help ] && cat help")
    await utility.start()
    await utility.close()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo '--toggle --pid N'; exit 255", "no separate actions here (exit code 255)"),  # driver 550
        ("echo 'Insufficient driver' >&2; exit 255", "exit code 255"),
        ("kill -SEGV $$", "exit code -11"),
        ("exec sleep 600", "did not end"),
    ],
)
async def test_program_without_separate_actions_is_refused_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    monkeypatch.setattr(utility_checkpointer, "HELP_DEADLINE_S", 0.5)
    with pytest.raises(UnavailableError) as refused:
        await program(tmp_path, script).start()
    assert refused.value.reason == "CHECKPOINT_UTILITY_UNAVAILABLE"
    assert said in refused.value.message


async def test_removed_program_is_reported(tmp_path: Path) -> None:
    utility = program(tmp_path, "exit 0")
    (tmp_path / "cuda-checkpoint").unlink()
    reply = await utility.run([CudaCall(CudaOp.LOCK, 71)], 5.0)
    assert (reply.fault, reply.reason) == (CudaFault.NOT_BEGUN, "DRIVER_WORKERS_DOWN")
    with pytest.raises(ConfigError, match="there is no program"):
        await utility.start()


async def test_program_for_another_machine_is_reported(tmp_path: Path) -> None:
    (tmp_path / "cuda-checkpoint").write_bytes(b"\x7fELF\x02\x01\x01" + b"\0" * 57)
    (tmp_path / "cuda-checkpoint").chmod(0o700)
    with pytest.raises(ConfigError, match=r"CHECKPOINT_UTILITY_INVALID.*does not run"):
        await UtilityCheckpointer(tmp_path / "cuda-checkpoint").start()
