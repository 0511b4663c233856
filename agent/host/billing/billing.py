"""Runs the meters: reads the clock, seals windows, and writes the ledger once a second without blocking requests.

Every flush is one transaction: sealed windows in order, then a snapshot of every open one. A kill -9 loses only what
happened since the last flush. If the store fails, requests and wakes go on: windows stay in memory, bounded
(core/billing/unwritten.py), the write is retried with back-off, and windows are no longer sealed by age.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from agent.core.billing.meter import BillingPolicy, Meter, Placement, Subject
from agent.core.billing.recovery import resume
from agent.core.billing.unwritten import UnwrittenWindows
from agent.core.billing.window import UsageWindow
from agent.core.errors import HibernodeError
from agent.core.types import SECOND_NS, FunctionSpec, InstanceState
from agent.log import get_logger
from agent.ports import Clock, LedgerStore, Timer

MAX_BACKOFF_NS = 30 * SECOND_NS
REMEMBERED_ENDS = 1_000


@dataclass(frozen=True, slots=True)
class BillingOptions:
    """How windows are cut and written.

    - `window_ns`: an open window is sealed at this age; of a time without an agent, no more than this is billed.
    - `backlog`: sealed windows kept in memory before they are merged.
    - `batch`: most sealed windows in one transaction.
    - `write_timeout_s`: deadline of one write.
    """

    policy: BillingPolicy = field(default_factory=BillingPolicy)
    window_ns: int = 60 * SECOND_NS
    flush_interval_ns: int = SECOND_NS
    backlog: int = 20_000
    batch: int = 2_000
    write_timeout_s: float = 10.0


@dataclass(frozen=True, slots=True)
class BillingHealth:
    """How the ledger reaches the disk. `failures`: failed writes in a row, the last for `reason`; `pending`: sealed
    windows only in memory; `merged`: windows merged to bound memory; `unmatched_ends`: not 0 is a bug."""

    failures: int
    reason: str
    pending: int
    merged: int
    unmatched_ends: int

    @property
    def healthy(self) -> bool:
        return self.failures == 0


class Billing:
    """All meters of a node. Everything runs on the loop's thread; only `load`, `flush` and `stop` wait, each with a
    deadline. At start: `load`, then `open` for each instance found alive, then `complete_ended`, then `start`.
    """

    def __init__(
        self,
        clock: Clock,
        store: LedgerStore,
        *,
        node: str,
        boot_id: str,
        settings: BillingOptions | None = None,
        card_bytes: Mapping[str, int] | None = None,
        on_written: Callable[[], None] = lambda: None,
    ) -> None:
        """`card_bytes`: memory of each GPU by uuid. `on_written`: called when sealed windows have reached the store, so
        that an uploader need not poll."""
        self._clock = clock
        self._store = store
        self._node = node
        self._boot_id = boot_id
        self._settings = settings or BillingOptions()
        self._card_bytes = card_bytes or {}
        self._on_written = on_written
        self._meters: dict[str, Meter] = {}
        self._last_windows: dict[str, UsageWindow] = {}
        self._sums: OrderedDict[str, tuple[int, int, int]] = OrderedDict()
        self._backlog = UnwrittenWindows(self._settings.backlog)
        self._timer: Timer | None = None
        self._flushing: asyncio.Task[bool] | None = None
        self._retry_at = 0
        self._failures = 0
        self._reason = ""
        self._unmatched_ends = 0
        self._log = get_logger()

    # ---- recovery ------------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Read each ledger's last window. Raises UnavailableError STORE_FAILED, TimeoutError: then open no meter."""
        async with asyncio.timeout(self._settings.write_timeout_s):
            self._last_windows = {window.instance_uid: window for window in await self._store.last_windows()}

    def complete_ended(self) -> None:
        """Complete the ledgers of instances that are gone. Call it once all living ones are open."""
        now = self._clock.monotonic_ns()
        for window in self._last_windows.values():
            self._complete(window, now, same_process=False)
        self._last_windows.clear()

    def _complete(self, last: UsageWindow, now: int, *, same_process: bool, goes_on: bool = False) -> int:
        recovered = resume(
            last,
            boot_id=self._boot_id,
            now_mono_ns=now,
            same_process=same_process,
            policy=self._settings.policy,
            most_idle_ns=self._settings.window_ns,
            goes_on=goes_on,
        )
        for window in recovered.windows:
            self._keep(window)
        return recovered.next_seq

    # ---- from the node -------------------------------------------------------------------------------------

    def open(
        self,
        uid: str,
        function: FunctionSpec,
        state: InstanceState,
        *,
        unbilled: bool = False,
        same_process: bool = True,
    ) -> Meter:
        """Open the meter of an instance; the caller passes it to the gate. If `load` found its ledger, a gap is added:
        idle and estimated if the same process still lives, unbilled if it is started anew (`same_process` False)."""
        # Read once: the gap ends where the meter starts.
        now, wall = self._clock.monotonic_ns(), self._clock.wall_ns()
        last = self._last_windows.pop(uid, None)
        seq, placement = 0, Placement()
        if last is not None:
            same_process = same_process and last.boot_id == self._boot_id
            seq = self._complete(last, now, same_process=same_process, goes_on=True)
            placement = Placement(last.gpu_model, last.gpu_uuids, last.gpu_memory_bytes)
        meter = Meter(
            Subject.of(uid, function, node=self._node, boot_id=self._boot_id),
            self._settings.policy,
            state=state,
            at=now,
            wall=wall,
            seq=seq,
            placement=placement,
            unbilled=unbilled,
        )
        self._meters[uid] = meter
        return meter

    def changed(self, uid: str, state: InstanceState, *, unbilled: bool = False) -> None:
        """The instance's state has changed; a terminal state ends its ledger. Unknown uids are ignored."""
        meter = self._meters.get(uid)
        if meter is None:
            return
        now, wall = self._clock.monotonic_ns(), self._clock.wall_ns()
        if not state.terminal:
            self._keep(meter.state_changed(state, now, wall, unbilled=unbilled))
            return
        # Seal its open row on disk even if it is empty: to a recovery, unsealed means cut off.
        final = meter.seal(now, wall) or meter.ended_empty()
        self._keep(final)
        self._unmatched_ends += meter.unmatched_ends
        del self._meters[uid]
        while len(self._sums) - len(self._meters) > REMEMBERED_ENDS:
            del self._sums[next(old for old in self._sums if old not in self._meters)]

    def placed(self, uid: str, model: str, gpu_uuids: tuple[str, ...]) -> None:
        """The instance holds these GPUs now. Unknown uids are ignored."""
        meter = self._meters.get(uid)
        if meter is not None:
            card = min((self._card_bytes.get(uuid, 0) for uuid in gpu_uuids), default=0)
            placement = Placement(model, gpu_uuids, card)
            self._keep(meter.placed(placement, self._clock.monotonic_ns(), self._clock.wall_ns()))

    def totals(self, uid: str) -> tuple[int, int, int]:
        """(active, idle, unbilled) ns of the instance since this agent started, plus its last window before that;
        zeros for an unknown uid."""
        sums = self._sums.get(uid, (0, 0, 0))
        meter = self._meters.get(uid)
        return sums if meter is None else _plus(sums, meter.open_window(self._clock.monotonic_ns()))

    def peak(self, uid: str) -> int:
        """Most requests inside the instance at once, recently (core/peak.py)."""
        meter = self._meters.get(uid)
        return 0 if meter is None else max(meter.in_flight, meter.peak.read(self._clock.monotonic_ns()))

    def open_windows(self) -> list[UsageWindow]:
        """Snapshots of all open windows, now."""
        now = self._clock.monotonic_ns()
        return [meter.open_window(now) for meter in self._meters.values()]

    def unwritten(self) -> list[UsageWindow]:
        """Windows that the store may not have yet: the sealed ones, then the open ones as of now."""
        return [*self._backlog.waiting(), *self.open_windows()]

    @property
    def health(self) -> BillingHealth:
        unmatched = self._unmatched_ends + sum(meter.unmatched_ends for meter in self._meters.values())
        return BillingHealth(self._failures, self._reason, len(self._backlog), self._backlog.merged, unmatched)

    # ---- time ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start to flush once per interval."""
        self._arm()

    async def stop(self, deadline_s: float = 5.0) -> bool:
        """Flush a last time. Open windows stay open on disk, as the instances live on. False = not all was written."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                while await self.flush() and len(self._backlog):
                    pass
        if self._flushing is not None:
            self._flushing.cancel()
            await asyncio.gather(self._flushing, return_exceptions=True)
        return self.health.healthy and not len(self._backlog)

    async def flush(self) -> bool:
        """Write all windows now; True if they are on disk. Never raises."""
        if self._flushing is not None:
            await asyncio.wait({self._flushing})
        return await asyncio.shield(self._begin_flush())

    def _arm(self) -> None:
        self._timer = self._clock.call_at(self._clock.monotonic_ns() + self._settings.flush_interval_ns, self._tick)

    def _tick(self) -> None:
        self._seal_due()
        if self._flushing is None and self._clock.monotonic_ns() >= self._retry_at:
            self._begin_flush()
        self._arm()

    def _seal_due(self) -> None:
        now, wall = self._clock.monotonic_ns(), self._clock.wall_ns()
        if self._failures:
            return
        for meter in self._meters.values():
            if meter.window_start <= now - self._settings.window_ns:
                self._keep(meter.seal(now, wall))

    def _keep(self, window: UsageWindow | None) -> None:
        if window is not None:
            self._backlog.add(window)
            self._sums[window.instance_uid] = _plus(self._sums.get(window.instance_uid, (0, 0, 0)), window)

    # ---- the disk ------------------------------------------------------------------------------------------------

    def _begin_flush(self) -> asyncio.Task[bool]:
        if self._flushing is None:
            self._flushing = asyncio.create_task(self._write(), name="billing flush")
            self._flushing.add_done_callback(self._flush_ended)
        return self._flushing

    def _flush_ended(self, task: asyncio.Task[bool]) -> None:
        self._flushing = None

    async def _write(self) -> bool:
        sealed = self._backlog.offer(self._settings.batch)
        # An open window on disk without its predecessors would be a gap after a crash.
        rows = [*sealed, *self.open_windows()] if len(sealed) == len(self._backlog) else list(sealed)
        try:
            async with asyncio.timeout(self._settings.write_timeout_s):
                await self._store.upsert_windows(rows)
        except (HibernodeError, TimeoutError) as error:
            self._failed(str(error) or f"no answer within {self._settings.write_timeout_s:g} s")
            return False
        self._backlog.written(len(sealed))
        if self._failures:
            self._log.info("billing.store_recovered", failures=self._failures, pending=len(self._backlog))
        self._failures, self._reason, self._retry_at = 0, "", 0
        if sealed:
            self._on_written()
        return True

    def _failed(self, reason: str) -> None:
        if not self._failures:
            self._log.error("billing.store_failed", reason=reason, pending=len(self._backlog))
        backoff = min(MAX_BACKOFF_NS, self._settings.flush_interval_ns << min(self._failures, 16))
        self._retry_at = self._clock.monotonic_ns() + backoff
        self._failures += 1
        self._reason = reason


def _plus(sums: tuple[int, int, int], window: UsageWindow) -> tuple[int, int, int]:
    return (sums[0] + window.active_ns, sums[1] + window.idle_ns, sums[2] + window.unbilled_ns)
