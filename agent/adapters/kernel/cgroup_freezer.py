"""Stopping and continuing an instance's threads: by cgroup v2, or by SIGSTOP where no cgroup can be written.

Only this half of a freeze lives here; the driver's half and the order of the two are in `freezer.py`. The agent never
asks the driver about a process whose cgroup is not THAWED: a frozen target can't answer and the call hangs.
"""

from __future__ import annotations

import signal
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

from agent.adapters.kernel import cgroup, cgroup_v1_freezer, process_table
from agent.core.errors import DeadlineError, PreconditionError
from agent.core.types import Handle, ProcessId
from agent.ports import FREEZE_DEADLINE_S as FREEZE_DEADLINE_S  # noqa: PLC0414 (re-exported)
from agent.ports import FreezerState as FreezerState  # noqa: PLC0414 (re-exported)
from agent.ports import ProcessFreezer as ProcessFreezer  # noqa: PLC0414 (re-exported)

V1_PATHS_KEPT = 4096


class CgroupFreezer:
    """`cgroup.freeze` of the handle's own cgroup: about 100 us, threads need not cooperate, SIGKILL still works.

    On hybrid hosts an engine pauses containers by v1's freezer: seen here as frozen too, and thawed with the rest."""

    name = "cgroup"

    def __init__(self) -> None:
        self._v1: OrderedDict[ProcessId, Path | None] = OrderedDict()

    async def freeze(self, handle: Handle, deadline_s: float = FREEZE_DEADLINE_S) -> None:
        path = self._path(handle)
        self._write(path, handle, frozen=True)
        # GONE ends the wait as well: nobody is left to stop.
        if not await cgroup.reread(lambda: self.state(handle) is not FreezerState.FREEZING, deadline_s):
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
            # Part of every wake: one read tells both what runs and whether anybody is left.
            nonlocal events
            events = cgroup.read_events(path)
            return events is None or not events["populated"] or not events["frozen"]

        if (v1 := self._v1_path(handle)) is not None and cgroup_v1_freezer.is_frozen(v1):
            cgroup_v1_freezer.thaw_cgroup(v1)
        if not await cgroup.reread(thawed, deadline_s):
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
        """Only engines freeze by it. Where it is is looked up once: this is part of every wake."""
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
                "INSTANCE_GONE", f"its cgroup can't be written: {error.strerror}", uid=handle.uid
            ) from error


class SignalFreezer:
    """SIGSTOP and SIGCONT to every process of the instance: the fall-back for hosts without a writable cgroup.

    Weaker than a cgroup: a parent sees its child stop, a process that clears its environment, leaves the session and
    loses its parent escapes, and anyone may send SIGCONT. `hibernode doctor` says when it is in use.
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
            # A fork may happen between the listing and the signal: done when two listings agree and all stand.
            nonlocal seen
            found = self._signal(handle, signal.SIGSTOP)
            agreed, seen = found == seen, found
            return agreed and all(map(_all_stopped, found))

        if not await cgroup.reread(stopped, deadline_s):
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

        if not await cgroup.reread(running, deadline_s):
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
            return False  # the main process runs: no need to look at all of /proc
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


INSTANCE_VARIABLE = "HIBERNODE_INSTANCE"


def instance_mark(state_uuid: str, uid: str) -> str:
    """The environment variable by which a process is known to be ours: state directory and instance."""
    return f"{INSTANCE_VARIABLE}={state_uuid}/{uid}"


class FreezerByHandle:
    """Each instance by what it was started with. Between two starts of the agent cgroups may have become writable, or
    not be any more; and to SIGSTOP's eyes a frozen cgroup runs, so the driver would be asked and hang."""

    def __init__(self, name: str, signals: SignalFreezer) -> None:
        """`name` of the one that new instances get."""
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
    """By cgroup where we can write one, else by signals; an instance that lives already by what it has."""
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
        f"still stopped {deadline_s:g} s after the thaw; is a parent cgroup frozen by somebody else?",
        uid=handle.uid,
    )
