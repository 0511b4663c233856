"""Kills what uses a GPU that its instance does not hold (event GPU_TRESPASS).

An instance is told its GPUs by CUDA_VISIBLE_DEVICES; a process that takes that away can reach the others (with
`gpu.migrate` and on plain hosts all devices are within reach), and would take memory from whoever holds them. One look
may fall between a grant and what NVML shows, so two in a row count.
"""

from __future__ import annotations

from collections.abc import Mapping

from agent.core.types import MIB, GpuProcess, Handle
from agent.host.gpus.broker import GpuBroker
from agent.host.instance.actor import Actor
from agent.host.instance.events import EventLog
from agent.ports import Gpus, Runtime

LEAST_BYTES = MIB
"""Less is none of our business, and memory that NVML can't tell counts as less."""
LOOKS = 2
MAX_REMEMBERED = 4096


class GpuIsolation:
    """`look` once a sample. Only processes of our own instances are ever touched."""

    def __init__(
        self, gpus: Gpus, runtime: Runtime, desk: GpuBroker, actors: Mapping[str, Actor], events: EventLog
    ) -> None:
        self._gpus = gpus
        self._runtime = runtime
        self._desk = desk
        self._actors = actors
        self._events = events
        self._seen: dict[tuple[str, str, int], int] = {}
        # What was found out about a pid ("" = none of ours); never believed for a kill.
        self._uid_of: dict[int, str] = {}
        self.vram_bytes: Mapping[str, int] = {}  # GPU memory of instances as of the last look that saw all GPUs
        self._asked: set[str] = set()  # whose containers a stranger is known not to be in

    async def look(self) -> None:
        """One look at all GPUs that answer. Raises UnavailableError NVML_UNAVAILABLE, OSError."""
        shown = await self._gpus.processes()
        used = [process for process in shown if process.used_bytes >= LEAST_BYTES]
        await self._find_owners({process.pid for process in used})
        if not shown.unanswered:
            self._add_up(used)
        found = {
            (owner.uid, process.gpu_uuid, process.pid): owner
            for process in used
            if (owner := self._actors.get(self._uid_of[process.pid])) is not None
            and not self._may_use(owner, process.gpu_uuid)
        }
        self._seen = {place: min(self._seen.get(place, 0) + 1, LOOKS + 1) for place in found}
        for (_, gpu_uuid, pid), owner in found.items():
            await self._kill(owner, gpu_uuid, pid)

    def _add_up(self, used: list[GpuProcess]) -> None:
        sums: dict[str, int] = {}
        for process in used:
            if uid := self._uid_of[process.pid]:
                sums[uid] = sums.get(uid, 0) + process.used_bytes
        self.vram_bytes = sums

    def _may_use(self, owner: Actor, gpu_uuid: str) -> bool:
        held = self._desk.book.holders.get(owner.uid)
        return owner.state.terminal or (held is not None and gpu_uuid in held.gpus)

    async def _find_owners(self, pids: set[int]) -> None:
        """Whose container each process is in. Asked once about each pid: without cgroups an answer is a walk through
        all processes of the host, and every awake instance shows here every second."""
        kept = {
            pid: uid
            for pid, uid in self._uid_of.items()
            if (uid in self._actors if uid else pid in pids)  # a stranger's number is forgotten when it goes
        }
        containers = {actor.uid: handle for actor in self._actors.values() if (handle := actor.handle_of_container)}
        if containers.keys() - self._asked:  # who was taken for a stranger may be in one that could not be asked then
            kept = {pid: uid for pid, uid in kept.items() if uid}
        self._uid_of = kept if len(kept) <= MAX_REMEMBERED else {}
        unknown = pids - self._uid_of.keys()
        if unknown:
            self._asked = set()
            for uid, handle in containers.items():
                found = await self._pids(handle)
                self._uid_of.update((pid, uid) for pid in found or () if pid in unknown)
                if found is not None:
                    self._asked.add(uid)
        self._uid_of.update((pid, "") for pid in unknown - self._uid_of.keys())

    async def _pids(self, handle: Handle) -> list[int] | None:
        """None if they can't be told now."""
        try:
            return list(await self._runtime.pids(handle))
        except OSError:
            return None

    async def _kill(self, owner: Actor, gpu_uuid: str, pid: int) -> None:
        """What may have changed meanwhile is asked again: the container first, then the book. That the pid is not used
        again before the signal is `kill_processes`'s own rule."""
        looks = self._seen[owner.uid, gpu_uuid, pid]
        handle = owner.handle_of_container
        if looks < LOOKS or handle is None:
            return
        if pid not in (await self._pids(handle) or ()):
            self._uid_of.pop(pid, None)
            return
        if self._may_use(owner, gpu_uuid):
            return
        if looks == LOOKS:  # once told is enough, should it not die at once
            held = self._desk.book.holders.get(owner.uid)
            holds = ", ".join(held.gpus) if held is not None else "none now"
            text = f"process {pid} of {owner.uid} is on GPU {gpu_uuid}, it holds {holds}: killed"
            self._events.add(owner.uid, "GPU_TRESPASS", text, gpu=gpu_uuid, pid=pid)
        await self._runtime.kill_processes(handle, [pid])
