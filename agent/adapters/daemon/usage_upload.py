"""Uploads sealed usage windows from the node's ledger to the scheduler, in batches."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from agent.core.billing.window import UsageWindow
from agent.core.errors import HibernodeError, InvalidArgumentError
from agent.log import get_logger
from agent.ports import LedgerStore
from agent.v1.usage_service_pb2 import UploadUsageWindowsRequest
from agent.wire.clients import DaemonChannel
from agent.wire.convert_usage import window_to_proto

UPLOAD_BATCH = 500
UPLOAD_TIMEOUT_S = 10.0


class UsageUpload:
    """Uploads the unacknowledged windows of the ledger; `run` goes on until cancelled.

    `node_name` is the name of the agent's credential, set once the scheduler has reported it. Nothing is uploaded
    before: the scheduler would reject windows under another name for good.
    """

    def __init__(self, channel: DaemonChannel, store: LedgerStore, interval_s: float) -> None:
        self.node_name = ""
        self._channel = channel
        self._store = store
        self._interval_s = interval_s
        self._log = get_logger()
        self._last_error = ""

    async def run(self) -> None:
        """Upload batch after batch, with a pause of `interval_s` when nothing is left or an upload fails."""
        while True:
            more = False
            try:
                more = await self.upload_once()
                self._last_error = ""
            except HibernodeError as error:
                if error.reason != self._last_error:  # once per cause, not per attempt
                    self._log.warning("usage.upload_failed", reason=error.reason, message=error.message)
                    self._last_error = error.reason
            except Exception:
                self._log.exception("usage.upload_crashed")
            if not more:
                await asyncio.sleep(self._interval_s)

    async def upload_once(self) -> bool:
        """Upload one batch; True if there may be more. A window leaves the queue only when the scheduler acknowledges
        or rejects it; rejected ones stay in the ledger but are not offered again, or they would block all others."""
        if not self.node_name:
            return False
        windows = await self._store.unacknowledged(UPLOAD_BATCH)
        if not windows:
            return False
        sent: list[UsageWindow] = []
        request = UploadUsageWindowsRequest()
        for window in windows:
            try:
                request.windows.append(window_to_proto(replace(window, node=self.node_name)))
                sent.append(window)
            except InvalidArgumentError as error:  # it stays in the ledger, and keeps no other back
                self._log.error("usage.not_sent", instance=window.instance_uid, seq=window.seq, message=error.message)
                await self._store.refuse([(window.instance_uid, window.seq)])
        if not sent:
            return True
        answer = await self._channel.call(self._channel.usage.UploadUsageWindows, request, UPLOAD_TIMEOUT_S)
        marks = {mark.instance_uid: mark.seq for mark in answer.marks}
        acknowledged = [(w.instance_uid, w.seq) for w in sent if w.seq <= marks.get(w.instance_uid, -1)]
        await self._store.acknowledge(acknowledged)
        open_keys = {(w.instance_uid, w.seq) for w in sent}.difference(acknowledged)
        rejected = [r for r in answer.refusals if (r.instance_uid, r.seq) in open_keys]
        if not rejected:
            return bool(acknowledged) and len(windows) == UPLOAD_BATCH
        self._log.error(
            "usage.refused",
            windows=len(rejected),
            instance=rejected[0].instance_uid,
            seq=rejected[0].seq,
            reasons=sorted({r.reason for r in rejected}),
            message="the scheduler rejects these windows: they stay in this node's ledger and are not billed",
        )
        await self._store.refuse([(r.instance_uid, r.seq) for r in rejected])
        return True
