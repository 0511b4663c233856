"""Runs the selftest's CUDA program from its parent: start in a cgroup, send verbs, always end.

The program is treated like an instance: same kind of cgroup, same handle, same SIGSTOP fallback.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.adapters.kernel import cgroup, process_table
from agent.adapters.kernel.cgroup_freezer import instance_mark
from agent.core.errors import DeadlineError, InstanceError, UnavailableError
from agent.core.instance_variables import INSTANCE_VARIABLE
from agent.core.types import Handle, ProcessId

TARGET_SCRIPT = Path(__file__).with_name("target.py")
SLICE_NAME = "selftest"
"""Replaces the state directory's UUID: all selftests share cgroup `hibernode-selftest`, so each one can remove what a
killed one left there."""

START_DEADLINE_S = 30.0
QUIT_DEADLINE_S = 20.0
KILL_DEADLINE_S = 10.0
MAX_MESSAGE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class TargetLocation:
    """Location of the program. `slice_` None: no cgroup is writable, so its processes are stopped by signals."""

    slice_: cgroup.CgroupSlice | None
    uid: str
    boot_id: str

    @property
    def path(self) -> Path | None:
        return self.slice_.path_of(self.uid) if self.slice_ else None


def find_location(boot_id: str) -> TargetLocation:
    """The location for this process's program. Removes what earlier selftests left."""
    slice_ = cgroup.open_slice(SLICE_NAME)
    own = process_table.identify(os.getpid(), boot_id)
    assert own is not None
    if slice_ is not None:
        for uid in slice_.uids():
            if not _has_owner(uid, boot_id):
                with suppress(OSError):  # only empty ones: a process in it is not ours to end
                    slice_.path_of(uid).rmdir()
    return TargetLocation(slice_, f"{own.pid}-{own.start_time}", boot_id)


def _has_owner(uid: str, boot_id: str) -> bool:
    pid, _, start_time = uid.partition("-")
    if not (pid.isdecimal() and start_time.isdecimal()):
        return False
    return process_table.is_alive(ProcessId(boot_id, int(pid), int(start_time)), boot_id)


def _create_cgroup(location: TargetLocation) -> None:
    """Raises UnavailableError CGROUP_UNUSABLE."""
    for attempt in range(3):
        try:
            if location.slice_ is not None:
                location.slice_.create(location.uid)
            return
        except OSError as error:  # ENOENT: another selftest has just removed the empty parent
            if attempt == 2 or not isinstance(error, FileNotFoundError):
                raise UnavailableError(
                    "CGROUP_UNUSABLE", f"no cgroup can be made at {location.path}: {error}"
                ) from error


class SelftestProcess:
    """The running program. Call `start`, then `ask`, and always `end`."""

    def __init__(self, location: TargetLocation, process: subprocess.Popen[bytes], channel: socket.socket) -> None:
        self._location = location
        self._process = process
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self._mark = instance_mark(SLICE_NAME, location.uid)
        identity = process_table.identify(process.pid, location.boot_id)
        assert identity is not None  # an unreaped child keeps its pid
        self.handle = Handle(location.uid, identity, "127.0.0.1", 0, cgroup=str(location.path or ""))

    @classmethod
    async def start(cls, location: TargetLocation, gpu_uuid: str) -> SelftestProcess:
        """Start the program on one GPU. Call from the loop's thread: PDEATHSIG follows the spawning thread.

        Raises InstanceError SELFTEST_TARGET_ENDED, DeadlineError SELFTEST_TIMEOUT, UnavailableError CGROUP_UNUSABLE.
        Leaves nothing behind on failure."""
        _create_cgroup(location)
        parent_end, child_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent_end.setblocking(False)
        name, _, value = instance_mark(SLICE_NAME, location.uid).partition("=")
        assert name == INSTANCE_VARIABLE
        with child_end:
            process = subprocess.Popen(  # noqa: ASYNC220 - uvloop's own prints fork warnings
                [
                    sys.executable, "-I", "-S", str(TARGET_SCRIPT),
                    str(child_end.fileno()), str(os.getpid()), str(location.path or ""),
                ],
                pass_fds=(child_end.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu_uuid, name: value},
                cwd="/",
                start_new_session=True,
            )  # fmt: skip
        target = cls(location, process, parent_end)
        try:
            await target._receive("start", START_DEADLINE_S)
        except BaseException:
            await target.end()
            raise
        return target

    async def pids(self, handle: Handle) -> list[int]:
        """`Runtime.pids`."""
        if handle.cgroup:
            return cgroup.procs(Path(handle.cgroup))
        return [stat.pid for stat in process_table.members(handle.process, self._location.boot_id, self._mark)]

    async def ask(self, verb: str, deadline_s: float, **arguments: object) -> dict[str, Any]:
        """Send one verb of `target.py` and return its answer; "error" in it reports a failed CUDA call.

        Raises InstanceError SELFTEST_TARGET_ENDED, DeadlineError SELFTEST_TIMEOUT."""
        try:
            self._channel.send(json.dumps({"do": verb, **arguments}).encode())
        except OSError as error:
            raise await self._ended(verb) from error
        return await self._receive(verb, deadline_s)

    async def _receive(self, verb: str, deadline_s: float) -> dict[str, Any]:
        try:
            async with asyncio.timeout(deadline_s):
                message = await self._loop.sock_recv(self._channel, MAX_MESSAGE_BYTES)
        except TimeoutError:
            raise DeadlineError(
                "SELFTEST_TIMEOUT", f"the CUDA program did not finish `{verb}` within {deadline_s:.0f} s"
            ) from None
        except OSError:
            message = b""
        if not message:
            raise await self._ended(verb)
        answer: dict[str, Any] = json.loads(message)
        return answer

    async def _ended(self, verb: str) -> InstanceError:
        await cgroup.poll_until(lambda: self._process.poll() is not None, KILL_DEADLINE_S)
        code = self._process.returncode
        how = "closed its socket" if code is None else f"was killed by signal {-code}" if code < 0 else f"exited {code}"
        return InstanceError("SELFTEST_TARGET_ENDED", f"the CUDA program {how} during `{verb}`")

    async def leave(self) -> dict[str, Any]:
        """Let the program free its memory and exit; returns its answer. Raises what `ask` raises. Call `end`
        afterwards."""
        answer = await self.ask("quit", QUIT_DEADLINE_S)
        if not await cgroup.poll_until(lambda: self._process.poll() is not None, QUIT_DEADLINE_S):
            raise DeadlineError("SELFTEST_TIMEOUT", f"the CUDA program did not end within {QUIT_DEADLINE_S:.0f} s")
        return answer

    async def end(self) -> None:
        """Kill the program if it still runs, and remove its cgroup. Idempotent.

        Raises DeadlineError KILL_TIMEOUT if it survives SIGKILL."""
        self._channel.close()
        self._process.kill()
        if self._location.slice_ is not None and self._location.path is not None:
            await cgroup.remove(self._location.path, KILL_DEADLINE_S)
            self._location.slice_.remove_if_empty()
        if not await cgroup.poll_until(lambda: self._process.poll() is not None, KILL_DEADLINE_S):
            raise DeadlineError(
                "KILL_TIMEOUT",
                f"process {self._process.pid} survives SIGKILL: it is stuck in the driver, see `dmesg`",
            )
