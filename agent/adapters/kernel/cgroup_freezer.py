"""Stops and continues an instance's threads: by cgroup v2, or by SIGSTOP where no cgroup can be written.

This is only the kernel's half of a freeze; `adapters/freezer` has the driver's half and the order of the two. The agent
never calls the driver for a process whose cgroup is not THAWED: a frozen target can't answer and the call hangs.
"""

from __future__ import annotations

import signal
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

from agent.adapters.kernel import cgroup, cgroup_v1_freezer, process_table
from agent.core.errors import DeadlineError, PreconditionError
from agent.core.instance_variables import INSTANCE_VARIABLE
from agent.core.types import Handle, ProcessId
from agent.ports import FREEZE_DEADLINE_S, FreezerState, ProcessFreezer

V1_PATHS_KEPT = 4096


class CgroupFreezer:
    """`cgroup.freeze` of the handle's own cgroup: takes about 100 us, threads need not cooperate, SIGKILL still works.

    On hybrid hosts an engine pauses containers by the v1 freezer: that counts as frozen too and is thawed as well.
    """

    name = "cgroup"

    def __init__(self) -> None:
        self._v1: OrderedDict[ProcessId, Path | None] = OrderedDict()

    async def freeze(self, handle: Handle, deadline_s: float = FREEZE_DEADLINE_S) -> None:
        path = self._path(handle)
        self._write(path, handle, frozen=True)
        # GONE ends the wait as well: nothing is left to stop.
        if not await cgroup.poll_until(lambda: self.state(handle) is not FreezerState.FREEZING, deadline_s):
            with suppress(OSError):
                cgroup.write_freeze(path, frozen=False)
            raise _freeze_timeout(handle, deadline_s)
        if self.state(handle) is FreezerState.GONE:
            raise _gone(handle)

    async def thaw(self, handle: Handle, deadline_s: float = FREEZE_DEADLINE_S) -> None:
        path = self._path(handle)
        self._write(path, handle, frozen=False)
        events: dict[str, int] | None = None

        def thawed() -> bool:
            # Part of every wake: one read shows both whether it runs and whether a process is left.
            nonlocal events
            events = cgroup.read_events(path)
            return events is None or not events["populated"] or not events["frozen"]

        if (v1 := self._v1_path(handle)) is not None and cgroup_v1_freezer.is_frozen(v1):
            cgroup_v1_freezer.thaw_cgroup(v1)
        if not await cgroup.poll_until(thawed, deadline_s):
            raise _thaw_timeout(handle, deadline_s)
        if events is None or not events["populated"]:
            raise _gone(handle)

    def state(self, handle: Handle) -> FreezerState:
        path = self._path(handle)
        events = cgroup.read_events(path)
        if events is None or events["populated"] == 0:
            return FreezerState.GONE
        if events["frozen"] or self._paused_by_v1(handle):
            return FreezerState.FROZEN
        return FreezerState.FREEZING if cgroup.freeze_requested(path) else FreezerState.THAWED

    def is_frozen(self, handle: Handle) -> bool:
        events = cgroup.read_events(self._path(handle))
        if events is None or not events["populated"]:
            return False
        return bool(events["frozen"]) or self._paused_by_v1(handle)

    def _paused_by_v1(self, handle: Handle) -> bool:
        path = self._v1_path(handle)
        return path is not None and cgroup_v1_freezer.is_frozen(path)

    def _v1_path(self, handle: Handle) -> Path | None:
        """The v1 freezer cgroup of a container; only engines freeze by it. Cached, because every wake needs it."""
        if not handle.container_id:
            return None
        if handle.process not in self._v1:
            self._v1[handle.process] = cgroup_v1_freezer.cgroup_of(handle.process.pid)
            if len(self._v1) > V1_PATHS_KEPT:
                self._v1.popitem(last=False)
        return self._v1[handle.process]

    def _path(self, handle: Handle) -> Path:
        if not handle.cgroup:
            raise PreconditionError("NO_CGROUP", "the instance has no cgroup of its own", uid=handle.uid)
        return Path(handle.cgroup)

    def _write(self, path: Path, handle: Handle, *, frozen: bool) -> None:
        try:
            cgroup.write_freeze(path, frozen)
        except OSError as error:
            raise PreconditionError(
                "INSTANCE_GONE", f"the instance's cgroup can't be written: {error.strerror}", uid=handle.uid
            ) from error


class SignalFreezer:
    """SIGSTOP and SIGCONT to every process of the instance: the fallback for hosts without a writable cgroup.

    Weaker than a cgroup: a parent sees its child stop; a process that clears its environment, leaves the session and
    loses its parent escapes; any process may send SIGCONT. `hibernode doctor` reports when it is in use.
    """

    name = "signal"

    def __init__(self, state_uuid: str, boot_id: str) -> None:
        self._state_uuid = state_uuid
        self._boot_id = boot_id

    async def freeze(self, handle: Handle, deadline_s: float = FREEZE_DEADLINE_S) -> None:
        seen = self._signal(handle, signal.SIGSTOP)
        if not seen:
            raise _gone(handle)

        def stopped() -> bool:
            # A fork may come between listing and signal: done when two listings agree and all have stopped.
            nonlocal seen
            found = self._signal(handle, signal.SIGSTOP)
            agreed, seen = found == seen, found
            return agreed and all(map(_all_stopped, found))

        if not await cgroup.poll_until(stopped, deadline_s):
            self._signal(handle, signal.SIGCONT)
            raise _freeze_timeout(handle, deadline_s)

    async def thaw(self, handle: Handle, deadline_s: float = FREEZE_DEADLINE_S) -> None:
        found = self._signal(handle, signal.SIGCONT)
        if not found:
            raise _gone(handle)

        def running() -> bool:
            nonlocal found
            if not any(map(_any_stopped, found)):
                return True
            found = self._signal(handle, signal.SIGCONT)
            return False

        if not await cgroup.poll_until(running, deadline_s):
            raise _thaw_timeout(handle, deadline_s)

    def state(self, handle: Handle) -> FreezerState:
        pids = self._members(handle)
        if not pids:
            return FreezerState.GONE
        if all(map(_all_stopped, pids)):
            return FreezerState.FROZEN
        return FreezerState.FREEZING if any(map(_any_stopped, pids)) else FreezerState.THAWED

    def is_frozen(self, handle: Handle) -> bool:
        main = process_table.read_stat(handle.process.pid)
        if main is not None and main.start_time == handle.process.start_time and main.state not in "TtZX":
            return False  # the main process runs: no need to read all of /proc
        return self.state(handle) is FreezerState.FROZEN

    def _members(self, handle: Handle) -> list[int]:
        mark = instance_mark(self._state_uuid, handle.uid)
        return [stat.pid for stat in process_table.members(handle.process, self._boot_id, mark)]

    def _signal(self, handle: Handle, number: signal.Signals) -> set[int]:
        mark = instance_mark(self._state_uuid, handle.uid)
        found = set()
        for stat in process_table.members(handle.process, self._boot_id, mark):
            process = ProcessId(self._boot_id, stat.pid, stat.start_time)
            if process_table.send_signal(process, self._boot_id, number):
                found.add(stat.pid)
        return found


def instance_mark(state_uuid: str, uid: str) -> str:
    """The environment variable that marks a process as ours: state directory and instance."""
    return f"{INSTANCE_VARIABLE}={state_uuid}/{uid}"


class FreezerByHandle:
    """Freezes each instance the way it was started. Between two starts of the agent cgroups may have become writable,
    or unwritable; and a frozen cgroup looks like running to `SignalFreezer`, so the driver would be called and hang."""

    def __init__(self, name: str, signals: SignalFreezer) -> None:
        """`name`: the freezer that new instances get."""
        self.name = name
        self._cgroups = CgroupFreezer()
        self._signals = signals

    async def freeze(self, handle: Handle, deadline_s: float = FREEZE_DEADLINE_S) -> None:
        await self._of(handle).freeze(handle, deadline_s)

    async def thaw(self, handle: Handle, deadline_s: float = FREEZE_DEADLINE_S) -> None:
        await self._of(handle).thaw(handle, deadline_s)

    def state(self, handle: Handle) -> FreezerState:
        return self._of(handle).state(handle)

    def is_frozen(self, handle: Handle) -> bool:
        return self._of(handle).is_frozen(handle)

    def _of(self, handle: Handle) -> ProcessFreezer:
        return self._cgroups if handle.cgroup else self._signals


def choose_freezer(slice_: cgroup.CgroupSlice | None, state_uuid: str, boot_id: str) -> ProcessFreezer:
    """By cgroup if one can be written, else by signals; an existing instance keeps the way it was started."""
    return FreezerByHandle(CgroupFreezer.name if slice_ else SignalFreezer.name, SignalFreezer(state_uuid, boot_id))


def _all_stopped(pid: int) -> bool:
    return all(state in "TtZX" for state in process_table.thread_states(pid))


def _any_stopped(pid: int) -> bool:
    return any(state == "T" for state in process_table.thread_states(pid))


def _gone(handle: Handle) -> PreconditionError:
    return PreconditionError("INSTANCE_GONE", "no process of the instance is left", uid=handle.uid)


def _freeze_timeout(handle: Handle, deadline_s: float) -> DeadlineError:
    return DeadlineError(
        "FREEZE_TIMEOUT",
        f"a thread did not stop within {deadline_s:g} s (uninterruptible I/O?); the instance was thawed again",
        uid=handle.uid,
    )


def _thaw_timeout(handle: Handle, deadline_s: float) -> DeadlineError:
    return DeadlineError(
        "THAW_TIMEOUT",
        f"still stopped {deadline_s:g} s after the thaw; is a parent cgroup frozen?",
        uid=handle.uid,
    )
