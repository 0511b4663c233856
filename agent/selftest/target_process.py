"""The selftest's CUDA program, seen from its parent: started in a cgroup of its own, asked, and ended whatever happens.

It is treated as an instance is: the same kind of cgroup, the same handle, the same SIGSTOP fall-back.
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
from agent.adapters.kernel.cgroup_freezer import INSTANCE_VARIABLE, instance_mark
from agent.core.errors import DeadlineError, InstanceError, UnavailableError
from agent.core.types import Handle, ProcessId

TARGET_SCRIPT = Path(__file__).with_name("target.py")
SLICE_NAME = "selftest"
"""In place of a state directory's UUID: all selftests share the cgroup `hibernode-selftest`, so that one finds what
another that was killed with all its kin left there."""

START_DEADLINE_S = 30.0
QUIT_DEADLINE_S = 20.0
KILL_DEADLINE_S = 10.0
MAX_MESSAGE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class TargetPlace:
    """Where the program lives. `slice_` None: no cgroup can be written, its processes are stopped by signals."""

    slice_: cgroup.CgroupSlice | None
    uid: str
    boot_id: str

    @property
    def path(self) -> Path | None:
        """Its cgroup."""
        return self.slice_.path_of(self.uid) if self.slice_ else None


def find_place(boot_id: str) -> TargetPlace:
    """A place for this process's program; what earlier selftests left behind is removed."""
    slice_ = cgroup.open_slice(SLICE_NAME)
    own = process_table.identify(os.getpid(), boot_id)
    assert own is not None
    if slice_ is not None:
        for uid in slice_.uids():
            if not _has_owner(uid, boot_id):
                with suppress(OSError):  # an empty one; one with a process in it is not ours to end
                    slice_.path_of(uid).rmdir()
    return TargetPlace(slice_, f"{own.pid}-{own.start_time}", boot_id)


def _has_owner(uid: str, boot_id: str) -> bool:
    pid, _, start_time = uid.partition("-")
    if not (pid.isdecimal() and start_time.isdecimal()):
        return False
    return process_table.is_alive(ProcessId(boot_id, int(pid), int(start_time)), boot_id)


def _make_cgroup(place: TargetPlace) -> None:
    """Raises UnavailableError CGROUP_UNUSABLE."""
    for attempt in range(3):
        try:
            if place.slice_ is not None:
                place.slice_.create(place.uid)
            return
        except OSError as error:  # ENOENT: another selftest that ended took the empty parent away
            if attempt == 2 or not isinstance(error, FileNotFoundError):
                raise UnavailableError("CGROUP_UNUSABLE", f"no cgroup can be made at {place.path}: {error}") from error


class SelftestProcess:
    """The running program. Use `start`; then `ask`; then `end`, always."""

    def __init__(self, place: TargetPlace, process: subprocess.Popen[bytes], channel: socket.socket) -> None:
        self._place = place
        self._process = process
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self._mark = instance_mark(SLICE_NAME, place.uid)
        identity = process_table.identify(process.pid, place.boot_id)
        assert identity is not None  # it is our child and nobody has waited for it
        self.handle = Handle(place.uid, identity, "127.0.0.1", 0, cgroup=str(place.path or ""))

    @classmethod
    async def start(cls, place: TargetPlace, gpu_uuid: str) -> SelftestProcess:
        """Start it on one GPU, from the loop's thread (PDEATHSIG follows the thread that spawns).

        Raises InstanceError SELFTEST_TARGET_ENDED, DeadlineError SELFTEST_TIMEOUT, UnavailableError CGROUP_UNUSABLE.
        Leaves nothing behind on failure.
        """
        _make_cgroup(place)
        ours, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        name, _, value = instance_mark(SLICE_NAME, place.uid).partition("=")
        assert name == INSTANCE_VARIABLE
        with other:
            process = subprocess.Popen(  # noqa: ASYNC220 - uvloop's own prints fork warnings
                [
                    sys.executable, "-I", "-S", str(TARGET_SCRIPT),
                    str(other.fileno()), str(os.getpid()), str(place.path or ""),
                ],
                pass_fds=(other.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu_uuid, name: value},
                cwd="/",
                start_new_session=True,
            )  # fmt: skip
        made = cls(place, process, ours)
        try:
            await made._receive("start", START_DEADLINE_S)
        except BaseException:
            await made.end()
            raise
        return made

    async def pids(self, handle: Handle) -> list[int]:
        """`Runtime.pids`."""
        if handle.cgroup:
            return cgroup.procs(Path(handle.cgroup))
        return [stat.pid for stat in process_table.members(handle.process, self._place.boot_id, self._mark)]

    async def ask(self, verb: str, deadline_s: float, **arguments: object) -> dict[str, Any]:
        """One verb of `selftest_target.py`; its answer, in which "error" tells of a failed CUDA call.

        Raises InstanceError SELFTEST_TARGET_ENDED, DeadlineError SELFTEST_TIMEOUT.
        """
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
        """It frees its memory and ends by itself; its answer as of `ask`. Raises what `ask` raises; `end` it after."""
        answer = await self.ask("quit", QUIT_DEADLINE_S)
        if not await cgroup.poll_until(lambda: self._process.poll() is not None, QUIT_DEADLINE_S):
            raise DeadlineError("SELFTEST_TIMEOUT", f"the CUDA program did not end within {QUIT_DEADLINE_S:.0f} s")
        return answer

    async def end(self) -> None:
        """Kill it, if it has not left, and remove its cgroup. Idempotent.

        Raises DeadlineError KILL_TIMEOUT: it survives SIGKILL.
        """
        self._channel.close()
        self._process.kill()
        if self._place.slice_ is not None and self._place.path is not None:
            await cgroup.remove(self._place.path, KILL_DEADLINE_S)
            self._place.slice_.remove_if_empty()
        if not await cgroup.poll_until(lambda: self._process.poll() is not None, KILL_DEADLINE_S):
            raise DeadlineError(
                "KILL_TIMEOUT",
                f"process {self._process.pid} survives SIGKILL: it is stuck in the driver, see `dmesg`",
            )
