"""The cuda-checkpoint program: its arguments, its texts, and a program that never ends."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from agent.adapters.checkpointer_utility import UtilityCheckpointer, arguments_of
from agent.core.errors import ConfigError
from agent.ports import CudaCall, CudaFault, CudaOp, CudaState

OLD, NEW = "GPU-00112233-4455-6677-8899-aabbccddeeff", "GPU-ffeeddcc-bbaa-9988-7766-554433221100"


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        (CudaCall(CudaOp.STATE, 71), "--get-state --pid 71"),
        (CudaCall(CudaOp.LOCK, 71, 2500), "--action lock --pid 71 --timeout 2500"),
        (CudaCall(CudaOp.CHECKPOINT, 71, 2500), "--action checkpoint --pid 71"),
        (CudaCall(CudaOp.RESTORE, 71), "--action restore --pid 71"),
        (CudaCall(CudaOp.RESTORE, 71, gpu_map=((OLD, NEW), (NEW, OLD))), None),
        (CudaCall(CudaOp.UNLOCK, 71), "--action unlock --pid 71"),
    ],
)
def test_arguments_are_actions_and_never_toggle(call: CudaCall, arguments: str | None) -> None:
    expected = arguments or f"--action restore --pid 71 --device-map {OLD}={NEW},{NEW}={OLD}"
    assert arguments_of(call) == expected.split()


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
    assert not [path for path in tmp_path.iterdir() if path.name == "started"]  # noqa: ASYNC240


def program(folder: Path, script: str) -> UtilityCheckpointer:
    path = folder / "cuda-checkpoint"
    path.write_text(f"#!/bin/sh\ncd {folder}\n{script}\n")
    path.chmod(0o700)
    return UtilityCheckpointer(path, {"PATH": "/usr/bin:/bin", "LD_PRELOAD": "/lib/noise.so"}, parallel=1)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('Could not lock on process ID 71: "device not ready"', 600),
        ('Could not lock on process ID 71: "operation not supported"', 801),
        ('Could not restore on process ID 71: "operation not permitted"', 800),
        ("Something new", 999),
    ],
)
async def test_texts_become_codes_and_the_state_is_read_again(tmp_path: Path, text: str, code: int) -> None:
    utility = program(tmp_path, f"[ $1 = --get-state ] && {{ echo locked; exit 0; }}; echo '{text}' >&2; exit 1")
    reply = await utility.run([CudaCall(CudaOp.LOCK, 71), CudaCall(CudaOp.UNLOCK, 71)], 5.0)
    assert [answer.code for answer in reply.answers] == [code]
    assert reply.answers[0].state is CudaState.LOCKED


async def test_preloaded_libraries_do_not_get_into_it(tmp_path: Path) -> None:
    utility = program(tmp_path, 'echo "${LD_PRELOAD-running}"')
    assert (await utility.run([CudaCall(CudaOp.STATE, 71)], 5.0)).answers[0].state is CudaState.RUNNING


async def test_one_that_does_not_end_is_killed(tmp_path: Path) -> None:
    utility = program(tmp_path, "trap '' TERM; exec sleep 600")
    reply = await utility.run([CudaCall(CudaOp.CHECKPOINT, 71)], 0.1)
    assert (reply.fault, reply.reason) == (CudaFault.LOST, "DRIVER_OPERATION_LOST")


async def test_one_that_was_removed_is_said_to_be_so(tmp_path: Path) -> None:
    utility = program(tmp_path, "exit 0")
    utility.path.unlink()
    reply = await utility.run([CudaCall(CudaOp.LOCK, 71)], 5.0)
    assert (reply.fault, reply.reason) == (CudaFault.NOT_BEGUN, "DRIVER_WORKERS_DOWN")


async def test_a_caller_that_goes_away_leaves_the_program_to_its_end(tmp_path: Path) -> None:
    for pid in (71, 72):
        os.mkfifo(tmp_path / f"go-{pid}")
    utility = program(tmp_path, "read line < go-$3; echo running")
    leaving = asyncio.create_task(utility.run([CudaCall(CudaOp.STATE, 71)], 10.0))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait([leaving])
    waiting = asyncio.create_task(utility.run([CudaCall(CudaOp.STATE, 72)], 10.0))
    for pid in (71, 72):  # to open it waits for the program that reads it
        await asyncio.to_thread((tmp_path / f"go-{pid}").write_text, "\n")
    assert (await waiting).answers[0].state is CudaState.RUNNING


@pytest.mark.parametrize("path", ["cuda-checkpoint", "/nonexistent/cuda-checkpoint"])
def test_its_path_is_absolute_and_executable(path: str) -> None:
    with pytest.raises(ConfigError, match="CHECKPOINT_UTILITY_INVALID"):
        UtilityCheckpointer(Path(path))
