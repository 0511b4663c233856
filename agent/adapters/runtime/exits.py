"""Reports that a process ended, and how: a pidfd in the event loop, without a thread, polling or SIGCHLD.

A pidfd also works for children of an earlier agent; only the exit status does not (init reaps them).
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from agent.adapters.kernel import memory_cgroup, process_table
from agent.core.errors import DeadlineError
from agent.core.types import Exit, Handle

UNKNOWN_EXIT = Exit(code=-1, message="exit status unknown: started by an earlier agent")


@dataclass(slots=True)
class _Watched:
    handle: Handle
    ended: asyncio.Future[Exit]
    pidfd: int
    memory: memory_cgroup.MemoryCgroup | None
    oom_kills_before: int
    killed_by_us: bool = False
    out_of_memory: bool = False


@dataclass(frozen=True, slots=True)
class Signs:
    """What was seen of an end, apart from the exit status."""

    killed_by_us: bool = False  # the SIGKILL was ours
    out_of_memory: bool = False  # its memory cgroup counted an OOM kill since the watch began


class ExitWatch:
    """One pidfd per container, from its start (or its first `wait` after a restart) until `forget`."""

    def __init__(self, boot_id: str) -> None:
        self._boot_id = boot_id
        self._watched: dict[str, _Watched] = {}

    def handles(self) -> list[Handle]:
        return [watched.handle for watched in self._watched.values()]

    def watch(self, handle: Handle) -> asyncio.Future[Exit]:
        """The future of its end; done at once if it has ended. Reaps it if it is our child. Idempotent."""
        known = self._watched.get(handle.uid)
        if known and known.handle.process == handle.process:
            return known.ended
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Exit] = loop.create_future()
        pidfd = process_table.open_pidfd(handle.process, self._boot_id)
        if pidfd is None:  # also for a stale handle of a uid that runs again: the new one stays watched
            ended.set_result(UNKNOWN_EXIT)
            return ended
        self.forget(handle.uid)
        memory = memory_cgroup.find(handle.process.pid)
        kills = (memory.oom_kills() or 0) if memory else 0
        self._watched[handle.uid] = _Watched(handle, ended, pidfd, memory, kills)
        loop.add_reader(pidfd, self._on_end, handle.uid)
        return ended

    def expect_kill(self, uid: str) -> None:
        """We are about to SIGKILL it, so its end is not the OOM killer's doing."""
        if watched := self._watched.get(uid):
            watched.killed_by_us = True

    def signs(self, handle: Handle) -> Signs:
        """Signs of a watched end; none for any other."""
        watched = self._watched.get(handle.uid)
        if watched is None or watched.handle.process != handle.process:
            return Signs()
        return Signs(watched.killed_by_us, watched.out_of_memory)

    async def kill(self, handle: Handle, empty: Callable[[], Awaitable[None]], deadline_s: float) -> None:
        """SIGKILL the main process, let `empty` kill the rest, await the end. Raises DeadlineError KILL_TIMEOUT."""
        ended = self.watch(handle)
        self.expect_kill(handle.uid)
        process_table.send_signal(handle.process, self._boot_id, signal.SIGKILL)
        await empty()
        try:
            async with asyncio.timeout(deadline_s):
                await asyncio.shield(ended)
        except TimeoutError:
            raise kill_timeout(handle, deadline_s) from None

    async def kill_processes(
        self, handle: Handle, pids: Sequence[int], members: Callable[[], Awaitable[Sequence[int]]]
    ) -> None:
        """SIGKILL those of `pids` that are `members`. Pidfds are opened before membership is read: a pid reused in
        between is either no member, or its pidfd names a process that has ended."""
        with ExitStack() as opened:
            descriptors: dict[int, int] = {}
            for pid in set(pids):
                process = process_table.identify(pid, self._boot_id)
                pidfd = process_table.open_pidfd(process, self._boot_id) if process else None
                if pidfd is not None:
                    opened.callback(os.close, pidfd)
                    descriptors[pid] = pidfd
            for pid in descriptors.keys() & set(await members()):
                if pid == handle.process.pid:
                    self.expect_kill(handle.uid)
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(descriptors[pid], signal.SIGKILL)

    def forget(self, uid: str) -> None:
        """Stop watching; remaining waiters are cancelled. Idempotent."""
        if watched := self._watched.pop(uid, None):
            self._close(watched)
            watched.ended.cancel()

    def close(self) -> None:
        """Stop watching all; the containers live on."""
        for uid in list(self._watched):
            self.forget(uid)

    def _on_end(self, uid: str) -> None:
        watched = self._watched[uid]
        watched.out_of_memory = _oom_killed(watched)  # read now: an engine removes the cgroup soon
        exit_ = _reap(watched)
        self._close(watched)
        if not watched.ended.done():
            watched.ended.set_result(exit_)

    def _close(self, watched: _Watched) -> None:
        if watched.pidfd >= 0:
            watched.ended.get_loop().remove_reader(watched.pidfd)
            os.close(watched.pidfd)
            watched.pidfd = -1


def _reap(watched: _Watched) -> Exit:
    try:
        status = os.waitid(os.P_PIDFD, watched.pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return UNKNOWN_EXIT
    if status is None:  # readable but not reapable: should not happen, must not block
        return UNKNOWN_EXIT
    if status.si_code == os.CLD_EXITED:
        return Exit(code=status.si_status, message=f"exited with code {status.si_status}")
    number = status.si_status
    oom = number == signal.SIGKILL and not watched.killed_by_us and watched.out_of_memory
    message = f"killed by signal {number} ({signal.strsignal(number)})" + (", out of memory" if oom else "")
    return Exit(code=-1, signal=number, oom_killed=oom, message=message)


def _oom_killed(watched: _Watched) -> bool:
    """Whether its memory cgroup counted an OOM kill; in a shared cgroup the victim may be another process."""
    if watched.memory is None or not watched.memory.path.exists():
        return False
    kills = watched.memory.oom_kills()
    return kills is not None and kills > watched.oom_kills_before


def kill_timeout(handle: Handle, deadline_s: float) -> DeadlineError:
    return DeadlineError(
        "KILL_TIMEOUT",
        f"the process still exists {deadline_s:g} s after SIGKILL; it may be stuck in the driver: see `dmesg`",
        uid=handle.uid,
        pid=handle.process.pid,
    )
