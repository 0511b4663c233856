"""The Checkpointer port on the driver's API (570 and newer), through a small pool of worker processes.

A batch waits in a bounded queue for a free worker and runs under a hard deadline; a worker whose driver call misses it
is killed. A lost worker is replaced after a growing pause; a slot whose workers keep failing rests until there is work.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from agent.adapters.cuda.driver_worker_process import DriverWorkerProcess, Phase, WorkerEvents, WorkerOptions
from agent.adapters.cuda.result_codes import not_begun
from agent.core.errors import UnavailableError
from agent.log import get_logger
from agent.ports import CudaAnswer, CudaCall, CudaFault, CudaReply

MAX_CALLS = 256
MAX_BATCH_BYTES = 96 * 1024
CALL_BYTES, PAIR_BYTES = 64, 96
"""Bounds of one message to a worker, and the most that a call and a pair of a GPU map take of it. An instance may have
more processes than fit into one message."""

_log = get_logger()


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """Bounds of the pool's queue and of the replacement of workers."""

    workers: int = 2
    queue_length: int = 256
    queue_timeout_s: float = 60.0
    first_backoff_s: float = 0.1  # pause before a worker is replaced; doubles up to `last_backoff_s`
    last_backoff_s: float = 10.0
    max_failures: int = 6  # in a row, before a slot rests


@dataclass(slots=True, eq=False)
class _Job:
    calls: Sequence[CudaCall]
    deadline_s: float
    gpu_uuids: Sequence[str]
    reply: asyncio.Future[CudaReply]
    waiting: asyncio.TimerHandle | None = None

    def resolve(self, reply: CudaReply) -> None:
        """Answer the caller, unless it was cancelled meanwhile."""
        if self.waiting is not None:
            self.waiting.cancel()
        if not self.reply.done():
            self.reply.set_result(reply)


@dataclass(slots=True, eq=False)
class _WorkerSlot:
    """A place for one worker. With `worker` None and `respawn` None it rests after too many failures."""

    worker: DriverWorkerProcess | None = None
    job: _Job | None = None
    failures: int = 0
    last_error: str = ""
    respawn: asyncio.TimerHandle | None = None


class DriverCheckpointer:
    """`agent.ports.Checkpointer`. Create, `start()`, use and `close()` it on one loop's thread."""

    def __init__(
        self,
        options: WorkerOptions | None = None,
        limits: PoolLimits | None = None,
        on_stuck: Callable[[Sequence[str]], None] | None = None,
    ) -> None:
        """`on_stuck` gets the uuids of the GPUs whose operation survived SIGKILL: cordon them."""
        self._options = options or WorkerOptions()
        self._limits = limits or PoolLimits()
        self._on_stuck = on_stuck
        self.init_before_restore = self._options.init_before_restore
        self._slots = [_WorkerSlot() for _ in range(self._limits.workers)]
        self._queue: deque[_Job] = deque()
        self._changed = asyncio.Event()  # set, and replaced, at each change of the slots
        self._closed = False
        self._ever_ready = False
        self._events = WorkerEvents(self._on_ready, self._on_answered, self._on_gone)

    async def start(self) -> None:
        """Spawn the workers; return when one is ready. Raises UnavailableError CHECKPOINT_API_UNAVAILABLE."""
        for slot in self._slots:
            self._spawn(slot)
        while not any(self._is_up(slot) for slot in self._slots):
            if all(slot.last_error for slot in self._slots):
                await self.close()
                raise UnavailableError(
                    "CHECKPOINT_API_UNAVAILABLE",
                    f"no driver worker could be started: {self._slots[0].last_error}",
                )
            await self._changed.wait()

    async def run(self, calls: Sequence[CudaCall], deadline_s: float, gpu_uuids: Sequence[str] = ()) -> CudaReply:
        """`Checkpointer.run`. Reasons with NOT_BEGUN: DRIVER_QUEUE_FULL, DRIVER_BUSY, DRIVER_WORKERS_DOWN; with LOST
        and STUCK: DRIVER_OPERATION_LOST. Calls that do not fit into one message are sent in several, each with its own
        `deadline_s`; if a later one is not begun, the whole reply is LOST."""
        answers: tuple[CudaAnswer, ...] = ()
        for part in _messages(calls):
            reply = await self._run(part, deadline_s, gpu_uuids)
            if answers and reply.fault is CudaFault.NOT_BEGUN:
                reply = replace(reply, fault=CudaFault.LOST)
            if reply.fault is not CudaFault.NONE:
                return reply
            answers += reply.answers
            if not reply.ok:
                break
        return CudaReply(answers)

    async def _run(self, calls: Sequence[CudaCall], deadline_s: float, gpu_uuids: Sequence[str]) -> CudaReply:
        if self._closed:
            return not_begun("DRIVER_WORKERS_DOWN", "the agent is stopping")
        if len(self._queue) >= self._limits.queue_length:
            return not_begun("DRIVER_QUEUE_FULL", f"{len(self._queue)} operations already wait for the driver")
        loop = asyncio.get_running_loop()
        job = _Job(calls, deadline_s, gpu_uuids, loop.create_future())
        self._queue.append(job)
        self._dispatch()
        if not job.reply.done() and job in self._queue:
            self._revive()
            job.waiting = loop.call_later(self._limits.queue_timeout_s, self._expire, job)
        try:
            return await job.reply
        finally:
            if job in self._queue:  # the caller was cancelled before a worker took it
                self._queue.remove(job)
                job.resolve(not_begun("DRIVER_BUSY", "cancelled"))

    async def close(self) -> None:
        """Kill the workers and wait until they are reaped or abandoned; their kill timeout bounds the wait."""
        self._closed = True
        while self._queue:
            self._queue.popleft().resolve(not_begun("DRIVER_WORKERS_DOWN", "the agent is stopping"))
        for slot in self._slots:
            if slot.respawn is not None:
                slot.respawn.cancel()
                slot.respawn = None
            if slot.worker is not None:
                slot.worker.kill("the agent is stopping")
        while any(slot.worker is not None for slot in self._slots):
            await self._changed.wait()

    def on_persistence_off(self) -> None:
        """From now on cuInit precedes a worker's first restore: without it the restore would kill its target."""
        self.init_before_restore = True

    def _dispatch(self) -> None:
        for slot in self._slots:
            if not self._queue:
                return
            if slot.worker is not None and slot.worker.phase is Phase.IDLE:
                job = self._queue[0]
                if slot.worker.submit(job.calls, job.deadline_s, init=self.init_before_restore):
                    self._queue.popleft()
                    slot.job = job
                    if job.waiting is not None:
                        job.waiting.cancel()

    def _expire(self, job: _Job) -> None:
        if job in self._queue:
            self._queue.remove(job)
            waited_s = self._limits.queue_timeout_s
            job.resolve(not_begun("DRIVER_BUSY", f"no driver worker became free within {waited_s:g} s"))

    def _fail_queue_if_down(self) -> None:
        """Fail the queued jobs if every slot rests, or no worker has ever found a usable driver."""
        resting = all(slot.worker is None and slot.respawn is None for slot in self._slots)
        never = not self._ever_ready and all(slot.last_error for slot in self._slots)
        if not resting and not never:
            return
        error = next((slot.last_error for slot in self._slots if slot.last_error), "")
        while self._queue:
            self._queue.popleft().resolve(not_begun("DRIVER_WORKERS_DOWN", f"driver workers fail to start: {error}"))

    def _is_up(self, slot: _WorkerSlot) -> bool:
        return slot.worker is not None and slot.worker.phase in (Phase.IDLE, Phase.BUSY)

    def _spawn(self, slot: _WorkerSlot) -> None:
        slot.respawn = None
        try:
            slot.worker = DriverWorkerProcess(self._options, self._events)
        except OSError as error:
            self._failed(slot, f"a worker can't be spawned ({error})")

    def _revive(self) -> None:
        """Give the resting slots one attempt, because there is work."""
        for slot in self._slots:
            if slot.worker is None and slot.respawn is None:
                self._spawn(slot)

    def _failed(self, slot: _WorkerSlot, error: str) -> None:
        slot.failures += 1
        slot.last_error = error
        limits = self._limits
        if slot.failures <= limits.max_failures:
            pause_s = min(limits.first_backoff_s * 2 ** (slot.failures - 1), limits.last_backoff_s)
            slot.respawn = asyncio.get_running_loop().call_later(pause_s, self._spawn, slot)
        else:
            _log.error("driver.workers_resting", failures=slot.failures, error=error)
        self._fail_queue_if_down()

    def _on_ready(self, worker: DriverWorkerProcess) -> None:
        self._ever_ready = True
        self._dispatch()
        self._notify()

    def _on_answered(self, worker: DriverWorkerProcess, answers: Sequence[CudaAnswer]) -> None:
        slot = self._slot_of(worker)
        job, slot.job = slot.job, None
        slot.failures, slot.last_error = 0, ""
        if job is not None:
            job.resolve(CudaReply(tuple(answers)))
        self._dispatch()

    def _on_gone(self, worker: DriverWorkerProcess, stuck: bool, error: str) -> None:
        slot = self._slot_of(worker)
        job, slot.job, slot.worker = slot.job, None, None
        if not self._closed:
            _log.warning("driver.worker_lost", pid=worker.pid, error=error, stuck=stuck, working=job is not None)
            self._failed(slot, error)
        if job is not None:
            fault = CudaFault.STUCK if stuck else CudaFault.LOST
            job.resolve(CudaReply((), fault, "DRIVER_OPERATION_LOST", error))
            if stuck and self._on_stuck is not None:
                self._on_stuck(job.gpu_uuids)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _slot_of(self, worker: DriverWorkerProcess) -> _WorkerSlot:
        return next(slot for slot in self._slots if slot.worker is worker)


def _messages(calls: Sequence[CudaCall]) -> Iterator[list[CudaCall]]:
    """Split the calls, in order, into parts that fit into one message."""
    part: list[CudaCall] = []
    room = MAX_BATCH_BYTES
    for call in calls:
        size = CALL_BYTES + PAIR_BYTES * len(call.gpu_map)
        if part and (size > room or len(part) == MAX_CALLS):
            yield part
            part, room = [], MAX_BATCH_BYTES
        part.append(call)
        room -= size
    if part:
        yield part
