"""Watches the GPUs: samples once a second, XID events as they come. An unfit GPU is cordoned (core/gpus/health.py).

No failure of the driver ends the watch: a missing answer is a finding too.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import assert_never

from agent.core.errors import HibernodeError
from agent.core.gpus import health
from agent.core.gpus.health import Effect, LiftCordon, NoAnswer, PutCordon, Sampled
from agent.core.gpus.xid_codes import meaning_of
from agent.core.types import SECOND_NS, GpuSample, Xid
from agent.event_log import EventLog
from agent.host.gpus.broker import GpuBroker
from agent.log import get_logger
from agent.ports import Clock, GpuEvents, Gpus

PERIOD_S = 1.0
STALE_NS = 5 * SECOND_NS
"""Older samples are not shown: they may no longer be true."""
MAX_XID_COUNTERS = 1000


class GpuMonitor:
    """Samples and listens until `run` is cancelled. `xids` counts XID events by (GPU, code).

    - `after_sample`: runs after every sample that the driver answered (`GpuIsolation.check`); its failures are logged.
    - `persistence_is_off`: called at every sample in which a GPU has persistence mode off.
    """

    def __init__(
        self,
        gpus: Gpus,
        xid_events: GpuEvents,
        broker: GpuBroker,
        events: EventLog,
        clock: Clock,
        *,
        after_sample: Callable[[], Awaitable[None]] | None = None,
        persistence_is_off: Callable[[], None] = lambda: None,
        limits: health.HealthLimits | None = None,
        period_s: float = PERIOD_S,
    ) -> None:
        self.xids: Counter[tuple[str, int]] = Counter()
        self._gpus = gpus
        self._xid_events = xid_events
        self._broker = broker
        self._events = events
        self._clock = clock
        self._after_sample = after_sample
        self._persistence_is_off = persistence_is_off
        self._volatile: set[str] = set()
        self._period_s = period_s
        self._health = health.healthy(tuple(broker.inventory), clock.monotonic_ns(), limits)
        self._samples: Mapping[str, GpuSample] = {}
        self._read_ns = 0
        self._log = get_logger()

    def samples(self) -> Mapping[str, GpuSample]:
        """The newest samples by GPU; empty once they are older than `STALE_NS`."""
        return self._samples if self._clock.monotonic_ns() - self._read_ns <= STALE_NS else {}

    async def run(self) -> None:
        """Sample and listen. On a node without GPUs it only waits."""
        if not self._broker.inventory:
            await asyncio.Event().wait()
        async with asyncio.TaskGroup() as both:
            both.create_task(self._for_ever(self._poll_and_sleep), name="gpu samples")
            both.create_task(self._for_ever(self._next_xid), name="gpu xids")

    async def _for_ever(self, once: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await once()
            except Exception as error:  # a bug here must not end the daemon, and must show in the log
                self._log.error("gpu.watch_failed", error=type(error).__name__, exc_info=error)
                await asyncio.sleep(self._period_s)

    # ---- samples ----------------------------------------------------------------------------------------------------

    async def _poll_and_sleep(self) -> None:
        await self.poll()
        await asyncio.sleep(self._period_s)

    async def poll(self) -> None:
        """Sample all GPUs once and act on the answer."""
        try:
            samples = await self._gpus.samples()
        except HibernodeError as error:
            self._log.debug("gpu.sample_failed", reason=error.reason, message=error.message)
            self._step(NoAnswer())
            return
        self._samples, self._read_ns = {sample.uuid: sample for sample in samples}, self._clock.monotonic_ns()
        self._step(Sampled(tuple(samples)))
        self._note_persistence(samples)
        if self._after_sample is None:
            return
        try:
            await self._after_sample()
        except (HibernodeError, OSError) as error:
            self._log.debug("gpu.after_sample_failed", message=str(error))

    def _note_persistence(self, samples: Sequence[GpuSample]) -> None:
        """Report GPUs without persistence mode: a restore without an earlier cuInit kills its process there."""
        volatile = {sample.uuid for sample in samples if sample.persistence is False}
        if volatile:
            self._persistence_is_off()
        for uuid in volatile - self._volatile:
            text = "persistence mode is off: wakes may take seconds longer; run nvidia-smi -pm 1 or nvidia-persistenced"
            self._events.add("", "gpu.persistence_off", text, gpu=uuid)
        self._volatile = volatile

    # ---- XID events -------------------------------------------------------------------------------------------------

    async def _next_xid(self) -> None:
        self.record_xid(await self._xid_events.next_xid())

    def record_xid(self, xid: Xid) -> None:
        """Count and report an XID event, and cordon the GPU if it is fatal."""
        if len(self.xids) < MAX_XID_COUNTERS or (xid.gpu_uuid, xid.code) in self.xids:
            self.xids[xid.gpu_uuid, xid.code] += 1
        meaning = meaning_of(xid.code)
        text = f"XID {xid.code}: {meaning.text}"
        self._events.add("", "gpu.xid", text, gpu=xid.gpu_uuid, code=xid.code, fatal=str(meaning.fatal).lower())
        self._step(xid)

    def _step(self, event: health.Event) -> None:
        self._health, effects = health.step(self._health, event, self._clock.monotonic_ns())
        self._perform(effects)

    def _perform(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case PutCordon(uuids, reason, source, lasting):
                    self._broker.cordon("", uuids, reason, source=source, lasting=lasting)
                case LiftCordon(uuids, source):
                    self._broker.uncordon(uuids, source)
                case _:
                    assert_never(effect)
