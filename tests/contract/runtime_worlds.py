"""Set-ups of the runtime contract: the fake, and the real process runtime with and without cgroups.

Each can start a workload and then make it print, exit, ignore SIGTERM or leave a stray child behind.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from agent.adapters.kernel import cgroup, process_table
from agent.adapters.kernel.clock import SystemClock
from agent.adapters.process.runtime import ProcessRuntime, ProcessRuntimeOptions
from agent.core.types import Exit, FunctionSpec, Handle, InstanceSpec
from agent.ports import Runtime, StartSpec
from tests.fakes.runtime import FakeRuntime

# It prints hello, then runs each line of its fifo as a shell command.
OBEDIENT = 'exec 3<"$FIFO"; echo "hello from $HIBERNODE_INSTANCE"; while read -r line <&3; do eval "$line"; done'
STUBBORN = "trap '' TERM; echo stubborn; " + OBEDIENT


async def until_said(runtime: Runtime, handle: Handle, text: bytes, deadline_s: float = 20.0) -> None:
    """Returns when the end of the log shows it."""
    async with asyncio.timeout(deadline_s):
        while text not in await runtime.read_log(handle, 65536):  # noqa: ASYNC110 - a log has no event
            await asyncio.sleep(0.005)


class World(ABC):
    """One runtime and the power over its workloads."""

    runtime: Runtime
    foreign_image = "registry.example/resize:1"
    foreign_reason = "IMAGE_RUNTIME_UNAVAILABLE"
    """An image that this runtime does not run, and how it says so."""
    breakable_reason = "START_FAILED"
    strays_outlive = True
    """Does what the main process has left behind go on when it ends? In a pid namespace nothing does."""
    limits_memory = False
    executes = False

    def spec(self, uid: str, *, image: str = "host", stubborn: bool = False) -> StartSpec:
        """A workload that runs until it is told to exit."""
        script = STUBBORN if stubborn else OBEDIENT
        function = FunctionSpec(name="resize", image=image, entrypoint=("/bin/sh",), command=("-c", script))
        return StartSpec(InstanceSpec(uid, f"resize/1/{uid}", function), self.environment(uid), ("GPU-1111",))

    def environment(self, uid: str) -> dict[str, str]:
        return {}

    async def until_said(self, handle: Handle, text: bytes) -> None:
        await until_said(self.runtime, handle, text)

    @abstractmethod
    async def settled(self, handle: Handle, *, stubborn: bool = False) -> None:
        """Returns when the workload has come up (its traps are set)."""

    @abstractmethod
    async def exit_now(self, handle: Handle, code: int) -> None: ...

    @abstractmethod
    async def speak(self, handle: Handle, text: str) -> None: ...

    @abstractmethod
    async def fork_stray(self, handle: Handle) -> None:
        """The workload starts a child in a session of its own that outlives it."""

    async def run_out_of_memory(self, handle: Handle) -> None:
        """Where `limits_memory`: it takes more than it may."""
        raise NotImplementedError

    def reachable_at(self, handle: Handle) -> bool:
        """Does the handle say where the workload can be asked?"""
        return handle.host == "127.0.0.1" and 0 < handle.port < 65536

    def open_files(self) -> int:
        return len(os.listdir("/proc/self/fd"))

    @abstractmethod
    def breakable(self, uid: str) -> StartSpec:
        """A workload whose start fails."""

    @abstractmethod
    async def restart_agent(self) -> None:
        """The agent died and comes up again: `runtime` is a new one over the same containers."""

    @abstractmethod
    def traces(self, uid: str) -> list[str]:
        """What is left of an instance on this host, its log apart."""

    async def close(self) -> None:  # noqa: B027 - the fake has nothing to close
        """Leave the host as it was."""


class FakeWorld(World):
    def __init__(self) -> None:
        self.fake = FakeRuntime()
        self.runtime: Runtime = self.fake

    async def settled(self, handle: Handle, *, stubborn: bool = False) -> None:
        self.fake.containers[handle.uid].heeds_term = not stubborn
        self.fake.print(handle.uid, f"hello from {handle.uid}\n".encode())

    async def exit_now(self, handle: Handle, code: int) -> None:
        self.fake.exit(handle.uid, Exit(code=code, message=f"exited with code {code}"))

    async def speak(self, handle: Handle, text: str) -> None:
        self.fake.print(handle.uid, f"{text}\n".encode())

    async def fork_stray(self, handle: Handle) -> None:
        self.fake.containers[handle.uid].extra_pids.append(handle.process.pid + 1)

    def breakable(self, uid: str) -> StartSpec:
        from agent.core.errors import InstanceError

        self.fake.start_error = InstanceError("START_FAILED", "cannot execute '/nowhere': No such file or directory")
        return self.spec(uid)

    async def restart_agent(self) -> None:
        self.fake.start_error = None

    def traces(self, uid: str) -> list[str]:
        return [uid] if uid in self.fake.containers else []


class ProcessWorld(World):
    """`user`: "" or a name. `fenced`: with a cgroup, or by process trees alone."""

    def __init__(self, *, fenced: bool, user: str = "") -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hibernode-contract-"))
        self.folder.chmod(0o711)
        self.state_uuid = str(uuid.uuid4())
        self.slice = cgroup.open_slice(self.state_uuid) if fenced else None
        self.user = user
        self._fifos: dict[str, int] = {}
        self.runtime = self.process_runtime = self._new_runtime()

    def _new_runtime(self) -> ProcessRuntime:
        settings = ProcessRuntimeOptions(self.folder / "state", self.state_uuid, self.slice, user=self.user)
        return ProcessRuntime(settings, SystemClock())

    def environment(self, uid: str) -> dict[str, str]:
        fifo = self.folder / f"{uid}.fifo"
        if uid not in self._fifos:
            os.mkfifo(fifo)
            fifo.chmod(0o666)
            # Open on both ends here, so that no command is lost while the workload does not read.
            self._fifos[uid] = os.open(fifo, os.O_RDWR)
        return {"FIFO": str(fifo)}

    async def settled(self, handle: Handle, *, stubborn: bool = False) -> None:
        await self.until_said(handle, b"hello from")

    def _tell(self, handle: Handle, line: str) -> None:
        os.write(self._fifos[handle.uid], line.encode() + b"\n")

    async def exit_now(self, handle: Handle, code: int) -> None:
        self._tell(handle, f"exit {code}")

    async def speak(self, handle: Handle, text: str) -> None:
        self._tell(handle, f"echo {text}")
        await self.until_said(handle, text.encode())

    async def fork_stray(self, handle: Handle) -> None:
        self._tell(handle, "setsid sleep 86399 & echo stray $!")
        await self.until_said(handle, b"stray")

    def breakable(self, uid: str) -> StartSpec:
        function = FunctionSpec(name="resize", entrypoint=("/nowhere/at-all",))
        return StartSpec(InstanceSpec(uid, f"resize/1/{uid}", function), {}, ())

    async def restart_agent(self) -> None:
        self.process_runtime.close()
        self.runtime = self.process_runtime = self._new_runtime()

    def traces(self, uid: str) -> list[str]:
        found = [f"process {pid}" for pid in self.pids_marked(uid)]
        bundle = self.folder / "state/instances" / uid
        found += [str(bundle)] if bundle.exists() else []
        if self.slice and self.slice.path_of(uid).exists():
            found.append(str(self.slice.path_of(uid)))
        return found

    def pids_marked(self, uid: str) -> list[int]:
        """Every process of the host that carries the instance's mark or, before its exec, names it."""
        mark, argument = f"{self.state_uuid}/{uid}".encode(), f"\0{uid}\0".encode()
        return [pid for pid, text in _identifying_texts() if mark in text or argument in text]

    async def close(self) -> None:
        self.process_runtime.close()
        for pid, text in _identifying_texts():
            if self.state_uuid.encode() in text:
                os.kill(pid, signal.SIGKILL)
        if self.slice:
            for uid in self.slice.uids():
                await cgroup.remove(self.slice.path_of(uid), 10.0)
            self.slice.remove_if_empty()
        for fd in self._fifos.values():
            os.close(fd)
        shutil.rmtree(self.folder, ignore_errors=True)


def _identifying_texts() -> Iterator[tuple[int, bytes]]:
    """(pid, environment and arguments) of every other process of the host."""
    for stat in process_table.processes():
        folder = Path("/proc") / str(stat.pid)
        with suppress(OSError):
            if stat.pid != os.getpid():
                yield stat.pid, (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes()
