"""How containers end while the engine answers, is down, or lags: the kernel shows the end, the engine the exit code."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from agent.adapters.engine import exits
from agent.adapters.engine.exits import is_running, read_exit
from agent.adapters.kernel import cgroup
from agent.adapters.runtime.exits import Signs
from agent.core.errors import InstanceError, UnavailableError
from agent.core.types import Exit, Handle
from tests.adapters.engine.rig import EngineRig
from tests.adapters.engine.rig import rig as rig  # noqa: PLC0414 - pytest finds the fixture by this name
from tests.adapters.engine.stand_in import Refusal


async def start_obedient(rig: EngineRig) -> Handle:
    """Start a container that exits with 7 on SIGTERM and 9 on SIGUSR1."""
    ready = rig.folder / "ready"
    script = f"trap 'exit 7' TERM; trap 'exit 9' USR1; : > {ready}; while :; do sleep 0.02; done"
    handle = await rig.runtime.start(rig.spec("resize-a", "/bin/sh", "-c", script))
    assert await cgroup.poll_until(ready.exists, 10.0)
    return handle


async def ended(waiting: asyncio.Task[Exit]) -> Exit:
    async with asyncio.timeout(15):
        return await waiting


async def test_exit_code_comes_from_the_engine(rig: EngineRig) -> None:
    handle = await start_obedient(rig)
    first, second = asyncio.create_task(rig.runtime.wait(handle)), asyncio.create_task(rig.runtime.wait(handle))
    await rig.runtime.terminate(handle)
    assert await ended(first) == await ended(second) == Exit(7, message="exited with code 7")
    assert (await rig.runtime.wait(handle)).code == 7
    await rig.runtime.terminate(handle)  # no effect after the end


async def test_images_stop_signal_survives_a_restart(rig: EngineRig) -> None:
    rig.engine.stop_signal = "SIGUSR1"
    handle = await start_obedient(rig)
    await rig.runtime.close()
    runtime = rig.restart()
    waiting = asyncio.create_task(runtime.wait(handle))
    await runtime.terminate(handle)
    assert (await ended(waiting)).code == 9


async def test_exit_is_seen_without_the_engine(rig: EngineRig) -> None:
    handle = await rig.runtime.start(rig.spec("resize-a"))
    waiting = asyncio.create_task(rig.runtime.wait(handle))
    await rig.engine.down()
    os.kill(handle.process.pid, signal.SIGTERM)
    exit_ = await ended(waiting)
    assert (exit_.code, exit_.signal, exit_.oom_killed) == (-1, 0, False)
    assert "its exit code is unknown: the container engine" in exit_.message
    await rig.engine.up()


async def test_late_exit_report_is_awaited_until_a_deadline(rig: EngineRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exits, "INSPECT_DEADLINE_S", 0.2)
    handle = await rig.runtime.start(rig.spec("resize-a"))
    container = rig.container(handle)
    late = {"Status": "running", "Running": True, "Pid": handle.process.pid}
    monkeypatch.setattr(type(container), "state", lambda _self: late)
    waiting = asyncio.create_task(rig.runtime.wait(handle))
    await rig.runtime.kill(handle)
    exit_ = await ended(waiting)
    assert (exit_.code, exit_.signal) == (-1, signal.SIGKILL), "that much we know ourselves"


async def test_container_removed_from_outside(rig: EngineRig) -> None:
    handle = await rig.runtime.start(rig.spec("resize-a"))
    waiting = asyncio.create_task(rig.runtime.wait(handle))
    await asyncio.sleep(0)
    await rig.engine._end(rig.container(handle))
    assert "removed from outside" in (await ended(waiting)).message
    await rig.runtime.destroy(handle)
    assert rig.bundles.all() == []


# ---- killing needs no engine -----------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
async def test_kill_needs_no_engine(rig: EngineRig, frozen: bool) -> None:
    handle = await rig.runtime.start(rig.spec("resize-a", "/bin/sh", "-c", "trap '' TERM; sleep 1000 & wait"))
    waiting = asyncio.create_task(rig.runtime.wait(handle))
    await rig.engine.down()
    if frozen:
        cgroup.write_freeze(Path(handle.cgroup), True)
    await rig.runtime.kill(handle)
    assert list(await rig.runtime.pids(handle)) == []
    exit_ = await ended(waiting)
    assert (exit_.signal, exit_.oom_killed, exit_.message) == (9, False, "killed by signal 9 (Killed)")
    await rig.engine.up()


async def test_destroy_without_engine_is_completed_by_the_next_agent(rig: EngineRig) -> None:
    handle = await rig.runtime.start(rig.spec("resize-a"))
    await rig.engine.down()
    with pytest.raises(UnavailableError) as raised:
        await rig.runtime.destroy(handle)
    assert raised.value.reason == "ENGINE_UNAVAILABLE"
    assert not await rig.runtime.alive(handle), "killed all the same"
    await rig.runtime.close()
    runtime = rig.restart()
    assert list(await runtime.list_handles()) == [handle]
    await rig.engine.up()
    await runtime.destroy(handle)
    assert list(await runtime.list_handles()) == []
    assert rig.engine.containers == {}


async def test_busy_removal_is_retried(rig: EngineRig) -> None:
    handle = await rig.runtime.start(rig.spec("resize-a"))
    rig.engine.refusals["DELETE containers"] = Refusal(409, "removal of container is already in progress", times=2)
    await rig.runtime.destroy(handle)
    assert rig.engine.containers == {}
    assert rig.engine.calls["DELETE containers"] == 3


async def test_container_that_cannot_be_removed_stays_recorded(rig: EngineRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.adapters.engine.containers.REMOVE_PAUSES_S", (0.0,))
    handle = await rig.runtime.start(rig.spec("resize-a"))
    rig.engine.refusals["DELETE containers"] = Refusal(500, "unable to remove filesystem: device or resource busy")
    with pytest.raises(InstanceError, match="device or resource busy") as raised:
        await rig.runtime.destroy(handle)
    assert raised.value.reason == "REMOVE_FAILED"
    assert list(await rig.runtime.list_handles()) == [handle]


async def test_repeated_removals_keep_one_log(rig: EngineRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.adapters.engine.containers.REMOVE_PAUSES_S", ())
    rig.engine.logs = b"resized 17 pictures\n"
    handle = await rig.runtime.start(rig.spec("resize-a"))
    rig.engine.refusals["DELETE containers"] = Refusal(500, "unable to remove filesystem: device or resource busy")
    for _ in range(3):
        with pytest.raises(InstanceError):
            await rig.runtime.destroy(handle)
    assert rig.files.path("resize-a").read_bytes() == rig.engine.logs


async def test_log_outlives_the_container(rig: EngineRig) -> None:
    rig.engine.logs = b"listening\nresized 17 pictures\n"
    handle = await rig.runtime.start(rig.spec("resize-a"))
    assert await rig.runtime.read_log(handle, 9) == b"pictures\n"
    await rig.runtime.destroy(handle)
    assert await rig.runtime.read_log(handle, 9) == b"pictures\n"
    assert [part async for part in rig.runtime.follow_log(handle, 1000)] == [rig.engine.logs]
    assert os.stat(handle.log_path).st_mode & 0o777 == 0o600


async def test_stale_handle_has_no_effect(rig: EngineRig) -> None:
    first = await rig.runtime.start(rig.spec("resize-a"))
    second = await rig.runtime.start(rig.spec("resize-a"))
    await rig.runtime.terminate(first)
    await rig.runtime.kill(first)
    await rig.runtime.destroy(first)
    assert list(await rig.runtime.pids(first)) == []
    assert (await rig.runtime.wait(first)).code == -1
    assert await rig.runtime.alive(second)
    assert list(rig.engine.containers) == [second.container_id]


# ---- reading an exit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "signs", "expected"),
    [
        ({"ExitCode": 0}, Signs(), Exit(0, message="exited with code 0")),
        ({"ExitCode": 1}, Signs(), Exit(1, message="exited with code 1")),
        ({"ExitCode": 143}, Signs(), Exit(-1, 15, message="killed by signal 15 (Terminated)")),
        ({"ExitCode": 255}, Signs(), Exit(255, message="exited with code 255")),
        (
            {"ExitCode": 137, "OOMKilled": True},
            Signs(),
            Exit(-1, 9, oom_killed=True, message="killed by signal 9 (Killed), out of memory"),
        ),
        (
            {"ExitCode": 137, "OOMKilled": False},
            Signs(out_of_memory=True),
            Exit(-1, 9, oom_killed=True, message="killed by signal 9 (Killed), out of memory"),
        ),
        (
            {"ExitCode": 137, "OOMKilled": True},
            Signs(killed_by_us=True, out_of_memory=True),
            Exit(-1, 9, message="killed by signal 9 (Killed)"),
        ),
        (
            {"ExitCode": 1, "OOMKilled": True},
            Signs(),
            Exit(1, oom_killed=True, message="exited with code 1, after the OOM killer killed one of its processes"),
        ),
        ({"ExitCode": 0, "OOMKilled": True}, Signs(), Exit(0, message="exited with code 0")),
    ],
)
def test_out_of_memory_differs_from_exit_codes_and_own_kills(
    state: dict[str, object], signs: Signs, expected: Exit
) -> None:
    assert read_exit(state, signs) == expected


@pytest.mark.parametrize(
    ("status", "runs"), [("running", True), ("paused", True), ("exited", False), ("stopped", False), ("dead", False)]
)
def test_running_states(status: str, runs: bool) -> None:
    assert is_running({"Status": status, "Running": False}) is runs
