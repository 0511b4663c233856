"""Reads what awake instances use, once a second: CPU time, host memory and GPU memory.

Frozen instances are not read: they use no CPU time, and a hundred of them must cost nothing. A value that could not be
read is None, not 0.
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
    """Polls until `run` is cancelled; `of` and `vram_of` give the latest readings."""

    def __init__(
        self,
        reader: UsageReader,
        actors: Mapping[str, Actor],
        vram: Callable[[], Mapping[str, int]] = dict,
        period_s: float = PERIOD_S,
    ) -> None:
        """`vram`: GPU memory by uid as of NVML's last answer; instances that it does not show are missing."""
        self._reader = reader
        self._actors = actors
        self._vram = vram
        self._period_s = period_s
        self._readings: dict[str, InstanceReading] = {}
        self._logged_reason = ""
        self._log = get_logger()

    def of(self, uid: str) -> InstanceReading:
        """The latest reading. Once the instance is no longer awake, only its CPU time is kept."""
        return self._readings.get(uid, InstanceReading())

    def vram_of(self, uid: str) -> int | None:
        """GPU memory of the instance's processes; None if NVML shows none of them."""
        return self._vram().get(uid)

    async def run(self) -> None:
        """Poll once per period, whatever fails."""
        while True:
            try:
                await self.poll()
                self._logged_reason = ""
            except HibernodeError as error:
                if error.reason != self._logged_reason:  # once per cause
                    self._log.warning("gauges.not_read", reason=error.reason, message=error.message)
                    self._logged_reason = error.reason
            except Exception:  # a bug here must not end the daemon, and must show in the log
                self._log.exception("gauges.crashed")
            await asyncio.sleep(self._period_s)

    async def poll(self) -> None:
        """Read all awake instances once. Raises HibernodeError; the readings of awake instances are then dropped."""
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
            not_awake = {
                uid: InstanceReading(cpu_ns=reading.cpu_ns)
                for uid, reading in self._readings.items()
                if uid in self._actors and uid not in awake
            }
            self._readings = {**not_awake, **{uid: self._not_less(uid, reading) for uid, reading in found.items()}}

    def _not_less(self, uid: str, reading: InstanceReading) -> InstanceReading:
        """Never let CPU time shrink: without a cgroup, the time of a process that no parent waited for is lost."""
        before = self.of(uid).cpu_ns
        if reading.cpu_ns is None or before is None or reading.cpu_ns >= before:
            return reading
        return InstanceReading(before, reading.memory_bytes)
