"""The agent's link to the central scheduler: the load stream and the upload of usage windows (`usage_upload.py`).

Lifecycle changes are sent at once (changes within 5 ms share a message), gauges with a heartbeat per second. The
scheduler knows from its own leases when an instance becomes busy or idle, so that is sent a few times per second. After
a gap, or on a new stream, everything is sent again. Without the scheduler the node serves on.
"""

from __future__ import annotations

import asyncio
import random

from agent.adapters.daemon.usage_upload import UsageUpload
from agent.core.errors import ConfigError, HibernodeError, PermissionDeniedError, UnauthenticatedError
from agent.core.types import InstanceState
from agent.host.instance.actor import Actor
from agent.host.node.observer import Observer
from agent.log import get_logger
from agent.ports import LedgerStore
from agent.v1.scheduler_service_pb2 import ReportLoadRequest
from agent.wire.clients import DaemonChannel, LoadStream
from agent.wire.convert_snapshot import instance_load, node_load, registration

COALESCE_S = 0.005
WAKE_REPORT_DELAY_S = 0.05
"""Reports of WAITING_GPU and RESTORING are delayed by this much unless another report is sent before, so that a short
wake is one message, after the response (saves 0.5 ms of the median wake on the emulated driver)."""
LOAD_REPORT_DELAY_S = 0.25
"""Delay of busy and idle reports: each request makes two such changes, and a message costs as much as a request."""
HEARTBEAT_S = 1.0
BACK_OFF_MIN_S = 0.1
BACK_OFF_MAX_S = 0.5
"""With the channel's own pause of half a second, a returning scheduler is reached well within two seconds."""
BACK_OFF_REFUSED_S = 10.0
"""Longest pause after a refusal that only an operator ends: a wrong token, an address that may not be registered."""
_REFUSALS = (UnauthenticatedError, PermissionDeniedError, ConfigError)


class SchedulerLink:
    """A `StateListener` that reports to the scheduler. `run` goes on until cancelled, through every outage."""

    def __init__(
        self,
        channel: DaemonChannel,
        observer: Observer,
        instances: dict[str, Actor],
        store: LedgerStore,
        upload_interval_s: float,
    ) -> None:
        self._channel = channel
        self._observer = observer
        self._instances = instances
        self.usage = UsageUpload(channel, store, upload_interval_s)
        self._changed: dict[str, Actor] = {}
        self._reported_in_flight: dict[str, int] = {}  # requests inside each instance, as last reported
        self._load_timer: asyncio.TimerHandle | None = None
        self._load_due = 0.0
        self._send_now = asyncio.Event()
        self._snapshot_due = True
        self._sequence = 0
        self._log = get_logger()
        self.connected = False
        self._last_error = ""

    def state_changed(self, actor: Actor, old: InstanceState, new: InstanceState, at: int) -> None:
        """Report a lifecycle change at once, or after WAKE_REPORT_DELAY_S."""
        if new in (InstanceState.WAITING_GPU, InstanceState.RESTORING):
            self._changed[actor.uid] = actor
            asyncio.get_running_loop().call_later(WAKE_REPORT_DELAY_S, self._send_pending)
        else:
            self.fitness_changed(actor)

    def fitness_changed(self, actor: Actor) -> None:
        """Report it at once."""
        self._changed[actor.uid] = actor
        self._send_now.set()

    def load_changed(self, actor: Actor) -> None:
        """Report it within LOAD_REPORT_DELAY_S."""
        self._changed[actor.uid] = actor
        if self._load_timer is None:
            self._load_timer = asyncio.get_running_loop().call_later(LOAD_REPORT_DELAY_S, self._send_load)

    def _send_load(self) -> None:
        self._load_timer = None
        self._send_pending()

    def _send_pending(self) -> None:
        if self._changed:
            self._send_now.set()

    async def run(self) -> None:
        """Report and upload until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._report(), name="report load")
            tasks.create_task(self.usage.run(), name="upload usage")

    async def _report(self) -> None:
        pause = BACK_OFF_MIN_S
        while True:
            longest = BACK_OFF_MAX_S
            stream = self._channel.report_load()
            try:
                reader = asyncio.create_task(self._read(stream), name="read load answers")
                try:
                    await self._write(stream, reader)
                finally:
                    reader.cancel()
                    await asyncio.gather(reader, return_exceptions=True)
            except HibernodeError as error:
                longest = BACK_OFF_REFUSED_S if isinstance(error, _REFUSALS) else BACK_OFF_MAX_S
                # Once per cause, not per attempt. STREAM_ENDED is none: it hides the cause that another attempt found.
                known = error.reason == self._last_error or (self._last_error and error.reason == "STREAM_ENDED")
                if self.connected or not known:
                    event = "scheduler.lost" if self.connected else "scheduler.not_connected"
                    self._log.warning(event, reason=error.reason, message=error.message)
                    self._last_error = error.reason
            except Exception:  # a bug must not end the reports: the next stream sends everything again
                self._log.exception("scheduler.report_crashed")
            finally:
                stream.close()
            pause = BACK_OFF_MIN_S if self.connected else min(pause * 2, longest)
            self.connected = False
            await asyncio.sleep(pause * (0.5 + random.random()))

    async def _write(self, stream: LoadStream, reader: asyncio.Task[None]) -> None:
        self._snapshot_due = True
        self._sequence = 0
        now = asyncio.get_running_loop().time
        while not reader.done():
            await stream.send(self._message(now()))
            try:
                async with asyncio.timeout_at(self._load_due):
                    await self._send_now.wait()
                    await asyncio.sleep(COALESCE_S)
            except TimeoutError:
                self._load_due = 0.0  # timers may be early by their resolution
        reader.result()

    async def _read(self, stream: LoadStream) -> None:
        while (answer := await stream.receive()) is not None:
            if not self.connected:
                self.connected, self._last_error = True, ""
                self._log.info("scheduler.connected", node=answer.node)
                name, self.usage.node_name = self._observer.identity.name, answer.node
                if answer.node != name:
                    self._log.warning("scheduler.name_differs", node_name=name, registered_as=answer.node)
            if answer.resync:
                self._snapshot_due = True
                self._send_now.set()

    def _message(self, now: float) -> ReportLoadRequest:
        self._send_now.clear()
        self._sequence += 1
        message = ReportLoadRequest(
            epoch=self._observer.identity.epoch,
            sequence=self._sequence,
            monotonic_ns=self._observer.monotonic_ns(),
        )
        if self._snapshot_due or now >= self._load_due:
            self._load_due = now + HEARTBEAT_S
            self._changed.update(self._load_differences())
            node = self._observer.node()
            message.load.CopyFrom(node_load(node, self._observer.awake()))
            if self._sequence == 1:
                message.registration.CopyFrom(registration(node))
        if self._snapshot_due:
            self._snapshot_due = False
            message.snapshot = True
            reported = list(self._instances.values())
        else:
            # Gone ones too: one that fails and is cleaned up within COALESCE_S still reports why.
            reported = list(self._changed.values())
            message.removed_uids.extend(uid for uid in self._changed if uid not in self._instances)
        self._changed.clear()
        message.instances.extend(instance_load(self._observer.instance(actor)) for actor in reported)
        self._reported_in_flight = {
            uid: self._reported_in_flight[uid] for uid in self._instances if uid in self._reported_in_flight
        }
        self._reported_in_flight.update((actor.uid, actor.gate.in_flight) for actor in reported)
        return message

    def _load_differences(self) -> dict[str, Actor]:
        """Instances whose number of requests is not the reported one: only the first and the last request trigger a
        report."""
        reported = self._reported_in_flight
        return {uid: actor for uid, actor in self._instances.items() if actor.gate.in_flight != reported.get(uid, 0)}
