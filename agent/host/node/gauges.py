"""What awake instances use now, once a second: CPU time, host memory and GPU memory.

Frozen instances are not read: they use nothing, and a hundred of them must cost nothing. What could not be read is not
known, which is not 0.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from agent.core.errors import HibernodeError
from agent.core.snapshots import InstanceReading
from agent.core.types import InstanceState
from agent.host.instance.actor import Actor
from agent.log import get_logger
from agent.ports import UsageReader

PERIOD_S = 1.0


class Gauges:
    """`run` until cancelled; `of` and `vram_of` for whoever shows an instance."""

    def __init__(
        self,
        reader: UsageReader,
        actors: Mapping[str, Actor],
        vram: Callable[[], Mapping[str, int]] = dict,
        period_s: float = PERIOD_S,
    ) -> None:
        """`vram`: GPU memory by uid as NVML showed it last, for those that it shows."""
        self._reader = reader
        self._actors = actors
        self._vram = vram
        self._period_s = period_s
        self._readings: dict[str, InstanceReading] = {}
        self._trouble = ""
        self._log = get_logger()

    def of(self, uid: str) -> InstanceReading:
        """What is known of it: CPU time as last read, also of one that sleeps since; memory only while it is awake."""
        return self._readings.get(uid, InstanceReading())

    def vram_of(self, uid: str) -> int | None:
        """GPU memory of its processes; None where NVML shows none of them."""
        return self._vram().get(uid)

    async def run(self) -> None:
        """Look every period, whatever happens."""
        while True:
            try:
                await self.poll()
                self._trouble = ""
            except HibernodeError as error:
                if error.reason != self._trouble:  # once for each cause
                    self._log.warning("gauges.not_read", reason=error.reason, message=error.message)
                    self._trouble = error.reason
            except Exception:  # a fault of ours must not end the daemon, and must be seen
                self._log.exception("gauges.crashed")
            await asyncio.sleep(self._period_s)

    async def poll(self) -> None:
        """Read all that are awake, once. Raises HibernodeError; then nothing of before counts any more."""
        awake = {
            actor.uid: handle
            for actor in self._actors.values()
            if actor.state is InstanceState.RUNNING and (handle := actor.handle_of_container) is not None
        }
        found: Mapping[str, InstanceReading] = {}
        try:
            if awake:
                found = await self._reader.read(list(awake.values()))
        finally:
            asleep = {
                uid: InstanceReading(cpu_ns=reading.cpu_ns)
                for uid, reading in self._readings.items()
                if uid in self._actors and uid not in awake
            }
            self._readings = {**asleep, **{uid: self._not_less(uid, reading) for uid, reading in found.items()}}

    def _not_less(self, uid: str, reading: InstanceReading) -> InstanceReading:
        """CPU time only grows: that of a process that nobody waited for goes with it where there is no cgroup."""
        before = self.of(uid).cpu_ns
        if reading.cpu_ns is None or before is None or reading.cpu_ns >= before:
            return reading
        return InstanceReading(before, reading.memory_bytes)
