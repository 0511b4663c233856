"""Kills processes that use a GPU which their instance does not hold (event gpu.isolation_violated).

CUDA_VISIBLE_DEVICES names an instance's GPUs. A process that unsets it can reach others (with `gpu.migrate`, or without
a container, every device is reachable) and takes memory from their holders. A single sample may be older than a grant
or a release, so two violations in a row are needed.
"""

from __future__ import annotations

from collections.abc import Mapping

from agent.core.types import MIB, GpuProcess, Handle
from agent.event_log import EventLog
from agent.host.gpus.broker import GpuBroker
from agent.host.instance.actor import Actor
from agent.ports import Gpus, Runtime

LEAST_BYTES = MIB
"""Smaller uses are ignored; memory that NVML does not know counts as smaller."""
VIOLATIONS_BEFORE_KILL = 2
MAX_REMEMBERED = 4096


class GpuIsolation:
    """`check` runs once per sample. It only ever touches processes of our own instances."""

    def __init__(
        self, gpus: Gpus, runtime: Runtime, broker: GpuBroker, actors: Mapping[str, Actor], events: EventLog
    ) -> None:
        self._gpus = gpus
        self._runtime = runtime
        self._broker = broker
        self._actors = actors
        self._events = events
        self._violations: dict[tuple[str, str, int], int] = {}  # in a row, by (instance, GPU, pid)
        self._uid_of: dict[int, str] = {}  # by pid, "" = no instance of ours; a cache, re-checked before a kill
        self._listed: set[str] = set()  # instances whose pids were listed when the cache was filled
        self.vram_bytes: Mapping[str, int] = {}  # GPU memory of instances as of the last check that saw all GPUs

    async def check(self) -> None:
        """Check all GPUs that answer, once. Raises UnavailableError NVML_UNAVAILABLE, OSError."""
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
        self._violations = {key: min(self._violations.get(key, 0) + 1, VIOLATIONS_BEFORE_KILL + 1) for key in found}
        for (_, gpu_uuid, pid), owner in found.items():
            await self._kill(owner, gpu_uuid, pid)

    def _add_up(self, used: list[GpuProcess]) -> None:
        sums: dict[str, int] = {}
        for process in used:
            if uid := self._uid_of[process.pid]:
                sums[uid] = sums.get(uid, 0) + process.used_bytes
        self.vram_bytes = sums

    def _may_use(self, owner: Actor, gpu_uuid: str) -> bool:
        held = self._broker.allocator.holders.get(owner.uid)
        return owner.state.terminal or (held is not None and gpu_uuid in held.gpus)

    async def _find_owners(self, pids: set[int]) -> None:
        """Fill `_uid_of`. Each pid is looked up once: without cgroups a look-up walks through every process of the
        host, and every awake instance appears here every second."""
        kept = {
            pid: uid
            for pid, uid in self._uid_of.items()
            if (uid in self._actors if uid else pid in pids)  # pids of no instance are forgotten when they go
        }
        containers = {actor.uid: handle for actor in self._actors.values() if (handle := actor.handle_of_container)}
        if containers.keys() - self._listed:  # a pid of no instance may be in a container not listed then
            kept = {pid: uid for pid, uid in kept.items() if uid}
        self._uid_of = kept if len(kept) <= MAX_REMEMBERED else {}
        unknown = pids - self._uid_of.keys()
        if unknown:
            self._listed = set()
            for uid, handle in containers.items():
                found = await self._pids(handle)
                self._uid_of.update((pid, uid) for pid in found or () if pid in unknown)
                if found is not None:
                    self._listed.add(uid)
        self._uid_of.update((pid, "") for pid in unknown - self._uid_of.keys())

    async def _pids(self, handle: Handle) -> list[int] | None:
        """None if they can't be read now."""
        try:
            return list(await self._runtime.pids(handle))
        except OSError:
            return None

    async def _kill(self, owner: Actor, gpu_uuid: str, pid: int) -> None:
        """After enough violations, re-check container and holder; kill. `kill_processes` guards against pid reuse."""
        violations = self._violations[owner.uid, gpu_uuid, pid]
        handle = owner.handle_of_container
        if violations < VIOLATIONS_BEFORE_KILL or handle is None:
            return
        if pid not in (await self._pids(handle) or ()):
            self._uid_of.pop(pid, None)
            return
        if self._may_use(owner, gpu_uuid):
            return
        if violations == VIOLATIONS_BEFORE_KILL:  # reported once, even if it does not die at once
            held = self._broker.allocator.holders.get(owner.uid)
            holds = ", ".join(held.gpus) if held is not None else "none now"
            text = f"process {pid} of {owner.uid} is on GPU {gpu_uuid}, but the instance holds {holds}: killed"
            self._events.add(owner.uid, "gpu.isolation_violated", text, gpu=gpu_uuid, pid=pid)
        await self._runtime.kill_processes(handle, [pid])
