"""What the shells need from the outside world. The adapters implement these; tests pass fakes.

Every wait has a deadline given by the caller in seconds or held by the adapter; a failure is a `HibernodeError`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from agent.core.billing.window import UsageWindow
from agent.core.errors import UnavailableError
from agent.core.gpus.cuda_calls import CudaAnswer as CudaAnswer  # noqa: PLC0414 (re-exported)
from agent.core.gpus.cuda_calls import CudaCall as CudaCall  # noqa: PLC0414 (re-exported)
from agent.core.gpus.cuda_calls import CudaFault as CudaFault  # noqa: PLC0414 (re-exported)
from agent.core.gpus.cuda_calls import CudaOp as CudaOp  # noqa: PLC0414 (re-exported)
from agent.core.gpus.cuda_calls import CudaReply as CudaReply  # noqa: PLC0414 (re-exported)
from agent.core.gpus.cuda_calls import CudaState as CudaState  # noqa: PLC0414 (re-exported)
from agent.core.snapshots import InstanceReading
from agent.core.types import Exit, FunctionSpec, Gpu, GpuProcess, GpuSample, Handle, InstanceSpec, InstanceState, Xid


class Timer(Protocol):
    """A scheduled callback that can be cancelled (asyncio.TimerHandle has this shape)."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """The only way to read time. Monotonic for durations, wall for records; both integer nanoseconds."""

    def monotonic_ns(self) -> int: ...

    def wall_ns(self) -> int: ...

    def call_at(self, at_mono_ns: int, callback: Callable[[], None]) -> Timer: ...


# ---- containers -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartSpec:
    """What a runtime starts: the instance, and the environment added by us (`gpu.mounts`, FC_*), which wins over the
    function's own. Only `gpu_uuids` are visible inside; `all_gpus`: every GPU of the host is (the driver moves only
    what can see them all), and CUDA_VISIBLE_DEVICES still names `gpu_uuids`."""

    instance: InstanceSpec
    environment: Mapping[str, str]
    gpu_uuids: tuple[str, ...]
    all_gpus: bool = False


@dataclass(frozen=True, slots=True)
class ExecSpec:
    """A command to run inside an instance. `terminal`: on a terminal of `columns` x `rows`; `user` "" = the
    container's own."""

    command: tuple[str, ...]
    terminal: bool = False
    columns: int = 80
    rows: int = 24
    user: str = ""


@dataclass(frozen=True, slots=True)
class ExecOutput:
    """Some bytes that the command wrote; on a terminal all of it is standard output."""

    data: bytes
    is_error: bool = False


class ExecSession(Protocol):
    """A command that runs inside an instance. Whoever opened it closes it; `close` ends the command as well as the
    engine allows (its input and output end; a terminal hangs up)."""

    async def read(self) -> ExecOutput | None:
        """The next output; None once it has ended. No deadline: cancelled by the caller. At most 64 KiB."""

    async def write(self, data: bytes) -> None: ...

    async def close_input(self) -> None: ...

    async def resize(self, columns: int, rows: int) -> None: ...

    async def exit_code(self) -> int:
        """After `read` has answered None."""

    async def close(self) -> None: ...


class Runtime(Protocol):
    """About a dozen verbs on containers. Containers outlive the agent; `recover` finds them again by their handle."""

    name: str

    def accepts(self, function: FunctionSpec) -> None:
        """Raise (PreconditionError IMAGE_RUNTIME_UNAVAILABLE ...) if this runtime can't run the function."""

    async def prepare(self, function: FunctionSpec, progress: Callable[[str], None]) -> None:
        """Have the image here, before a GPU is asked for: pull it if the policy says so. `progress` gets a sentence now
        and then. Bounded in time; calls for the same image share one pull.

        Raises InstanceError IMAGE_NOT_FOUND, IMAGE_PULL_DENIED, IMAGE_PULL_FAILED, DISK_FULL; UnavailableError
        ENGINE_UNAVAILABLE.
        """

    async def start(self, spec: StartSpec) -> Handle:
        """Start the container; returns as soon as its main process runs (it need not listen yet).

        Raises InstanceError START_FAILED (for an engine also COMMAND_NOT_FOUND, IMAGE_NOT_FOUND, DISK_FULL,
        VOLUME_REFUSED ...), UnavailableError ENGINE_UNAVAILABLE. Leaves nothing behind on failure. Idempotent per uid:
        a container of the same uid left by an earlier attempt is destroyed first.
        """

    async def wait(self, handle: Handle) -> Exit:
        """Wait until the container has ended. No deadline: cancelled by the caller."""

    async def alive(self, handle: Handle) -> bool:
        """Is exactly this container (boot, pid, start time) still there?"""

    async def terminate(self, handle: Handle) -> None:
        """SIGTERM to the main process (a no-op if it is gone)."""

    async def kill(self, handle: Handle, deadline_s: float = 10.0) -> None:
        """SIGKILL everything of it, frozen or not (cgroup.kill), and wait until it is gone. DeadlineError if not."""

    async def kill_processes(self, handle: Handle, pids: Sequence[int]) -> None:
        """SIGKILL these processes, frozen or not; those that are not inside the container (any more) are left alone."""

    async def destroy(self, handle: Handle) -> None:
        """Remove what is left (cgroup, scratch; not the log). Idempotent."""

    async def list_handles(self) -> Sequence[Handle]:
        """All containers on this host that carry this state directory's UUID, recorded or not."""

    async def pids(self, handle: Handle) -> Sequence[int]:
        """Host pids inside the container now."""

    async def read_log(self, handle: Handle, tail_bytes: int) -> bytes:
        """The last bytes of its combined stdout and stderr, also after it has ended. OSError if it can't be read."""

    def follow_log(self, handle: Handle, tail_bytes: int) -> AsyncGenerator[bytes, None]:
        """The last bytes, then what comes, in chunks of at most 64 KiB, until the container has ended and all is read.
        Whoever reads it closes it (`aclosing`): that, or cancelling, stops it and leaves nothing."""

    async def exec(self, handle: Handle, spec: ExecSpec) -> ExecSession:
        """Run a command inside. Never call it for a frozen instance: it would hang.

        Raises PreconditionError EXEC_UNAVAILABLE (process runtime), InstanceError EXEC_FAILED (command not found ...).
        """


class ContainerEngine(Protocol):
    """The part of a container engine's runtime that `EngineWatch` needs."""

    async def check(self) -> None:
        """Check that the engine answers. Raises HibernodeError ENGINE_UNAVAILABLE, ENGINE_TOO_OLD ..."""


class UsageReader(Protocol):
    """The host's accounts of what instances use."""

    async def read(self, handles: Sequence[Handle]) -> Mapping[str, InstanceReading]:
        """Readings by uid, without instances that have ended. Bounded in time; raises HibernodeError if they can't be
        read now."""


# ---- freezing -------------------------------------------------------------------------------------------------


class Outcome(Enum):
    """How an operation on the driver or the freezer ended, after re-reading the state.

    OK: done. REFUSED: rolled back, the instance is as before. BROKEN: unknown; only a kill is safe.
    """

    OK = "OK"
    REFUSED = "REFUSED"
    BROKEN = "BROKEN"


@dataclass(frozen=True, slots=True)
class FreezeResult:
    """`driver_ns` is the time inside the driver's own calls; `image_bytes` what the host now holds of VRAM."""

    outcome: Outcome
    reason: str = ""
    message: str = ""
    driver_ns: int = 0
    image_bytes: int = 0


class Condition(Enum):
    """What recovery finds (DESIGN section 4, read the cgroup before the driver)."""

    GONE = "GONE"
    AWAKE = "AWAKE"
    LOCKED = "LOCKED"
    CHECKPOINTED = "CHECKPOINTED"
    FROZEN = "FROZEN"
    PAUSED_BY_OTHERS = "PAUSED_BY_OTHERS"
    BROKEN = "BROKEN"


class Freezer(Protocol):
    """Freeze and wake one instance in the order of the driver's rules. Never queries a frozen cgroup.

    `lock` then `checkpoint` is a freeze; `lock` then `unlock` a cancelled one; `wake` thaws, restores, unlocks and
    verifies. Each has a hard deadline inside and always returns a result, never raises for a driver's answer.
    """

    async def lock(self, handle: Handle) -> FreezeResult: ...

    async def unlock(self, handle: Handle) -> FreezeResult: ...

    async def checkpoint(self, handle: Handle) -> FreezeResult: ...

    async def wake(self, handle: Handle, gpu_map: Mapping[str, str]) -> FreezeResult:
        """Verify free VRAM, thaw, restore (old uuid -> new uuid, naming every GPU of the host; empty = same GPUs),
        unlock, verify running. REFUSED (GPU_MEMORY_SHORT ...): still checkpointed and frozen, on the old GPUs."""

    def paused(self, handle: Handle) -> bool:
        """Is it stopped by somebody else now (docker pause)? One read of a file; no driver call."""

    async def prepare_kill(self, handle: Handle) -> None:
        """Before SIGKILL of an instance that was restored at least once: lock and checkpoint, for killing a restored
        process can hang the host (facts 7, issue 53). Bounded; the outcome does not matter, so it never raises."""

    async def condition(self, handle: Handle) -> Condition:
        """What state the instance is really in. Reads the cgroup first; asks the driver only where it is safe.

        Raises UnavailableError (NVML_UNAVAILABLE, DRIVER_BUSY ...) where nobody could ask: ask again later.
        """

    async def finish_freeze(self, handle: Handle) -> FreezeResult:
        """Recovery: CHECKPOINTED but not frozen -> freeze the cgroup."""

    async def thaw(self, handle: Handle) -> None:
        """Recovery and stop: undo a cgroup freeze that was not ours."""

    async def vram_bytes(self, handle: Handle) -> int:
        """VRAM used now by the instance's processes, by NVML."""

    def forget(self, handle: Handle) -> None:
        """The instance ended: drop what was remembered about its CUDA processes."""


FREEZE_DEADLINE_S = 5.0


class FreezerState(Enum):
    """State of an instance's threads. FREEZING: a freeze was asked for, but a thread still runs. The driver may be
    called only in THAWED."""

    THAWED = "THAWED"
    FREEZING = "FREEZING"
    FROZEN = "FROZEN"
    GONE = "GONE"


class ProcessFreezer(Protocol):
    """Stops and continues all threads of an instance at once."""

    name: str

    async def freeze(self, handle: Handle, deadline_s: float = FREEZE_DEADLINE_S) -> None:
        """Return once every thread has stopped. Idempotent.

        Raises DeadlineError FREEZE_TIMEOUT, after having thawed again; PreconditionError INSTANCE_GONE.
        """

    async def thaw(self, handle: Handle, deadline_s: float = FREEZE_DEADLINE_S) -> None:
        """Return once it runs again. Idempotent, whoever froze it. Raises DeadlineError THAW_TIMEOUT (an ancestor is
        frozen too), PreconditionError INSTANCE_GONE."""

    def state(self, handle: Handle) -> FreezerState:
        """The kernel's state now."""

    def is_frozen(self, handle: Handle) -> bool:
        """state(handle) is FROZEN; for an instance that runs it costs one read of a small file."""


class Checkpointer(Protocol):
    """The driver's checkpoint operations, batched. Never call it for a process in a frozen cgroup: it hangs.

    A STATE of a process without CUDA is answered with NONE and does not end the batch.
    """

    async def run(self, calls: Sequence[CudaCall], deadline_s: float, gpu_uuids: Sequence[str] = ()) -> CudaReply:
        """Run the calls in order, stop at the first failure; never raises for the driver's answer.

        `deadline_s` counts from the moment the driver is asked, the wait for a free worker has its own bound.
        `gpu_uuids` are the devices to report if the driver gets stuck.
        """


@dataclass(frozen=True, slots=True)
class GpuProcesses:
    """The compute processes of every device that answered. A device in `unanswered` is not empty, it is unknown:
    whoever needs proof that nothing is there asks `on`, or looks at it. `lost` (a part of `unanswered`) are those that
    never will again without a reset: what was in their memory is gone, but nobody has seen it go."""

    entries: tuple[GpuProcess, ...] = ()
    unanswered: frozenset[str] = frozenset()
    lost: frozenset[str] = frozenset()

    def __iter__(self) -> Iterator[GpuProcess]:
        return iter(self.entries)

    def on(self, gpu_uuids: Collection[str]) -> tuple[GpuProcess, ...]:
        """What these devices show. Raises UnavailableError NVML_UNAVAILABLE if one of them did not answer."""
        if silent := sorted(self.unanswered.intersection(gpu_uuids)):
            raise UnavailableError("NVML_UNAVAILABLE", f"NVML can't read GPU {', '.join(silent)}; see `nvidia-smi`")
        return tuple(process for process in self.entries if process.gpu_uuid in gpu_uuids)


class Gpus(Protocol):
    """NVML, in a thread. Raises UnavailableError NVML_UNAVAILABLE when the driver does not answer in time.

    A device that answers with an error hides nothing of the others."""

    async def list_gpus(self) -> Sequence[Gpu]:
        """Those that can be described now: one that NVML lost before is left out."""

    async def processes(self) -> GpuProcesses: ...

    async def samples(self) -> Sequence[GpuSample]:
        """The figures of every device now; one that does not answer is a sample with its `error`."""

    async def memory_free(self) -> Mapping[str, int]:
        """Free bytes by uuid: what a restore may take. A device that does not say is left out."""

    async def driver(self) -> DriverInfo: ...


class GpuEvents(Protocol):
    """XID events of every device, in a thread of its own, which outlives a driver that stops answering."""

    async def next_xid(self) -> Xid:
        """Wait for the next one. No deadline: cancelled by the caller. At most a bounded number is kept unread."""


@dataclass(frozen=True, slots=True)
class DriverInfo:
    """`version` like "580.65.06"; `cuda` as NVML gives it, 13000 for 13.0."""

    version: str
    cuda: int


class HostMemory(Protocol):
    """MemAvailable of the host with reclaimable cache counted as free, the cgroup's head room of a handle, and what
    must be remembered beyond the agent: raised limits and the sizes of images.

    `raise_limit`, `lower_limit`, `note_image`, `forget` and `recover` write to a disk: one thread beside the loop calls
    them, in order. The rest reads /proc, cgroup files and memory.
    """

    def available_bytes(self) -> int: ...

    def headroom_bytes(self, handle: Handle) -> int | None:
        """Smallest (limit - usage, cache counted as free) over every ancestor; None = no limit anywhere."""

    def raise_limit(self, handle: Handle, need_bytes: int) -> str:
        """Make room for `need_bytes` of GPU image in the instance's own memory limit (its ancestors' are not ours).

        What it was is written down before it changes. Returns "" or why it can't be done and what to do."""

    def limit_raised(self, uid: str) -> bool:
        """Costs nothing."""

    def lower_limit(self, uid: str) -> None:
        """The image is gone: the limit is what it was. Idempotent; never kills: while too much is in use the limit
        stays raised (and `limit_raised` says so); never raises for an instance that has ended."""

    def note_image(self, uid: str, image_bytes: int) -> None:
        """So large will its image be. Raises OSError."""

    def noted_image(self, uid: str) -> int | None:
        """What was noted last, by this agent or one before."""

    def resident_bytes(self, pids: Collection[int]) -> int:
        """What these processes have in host memory: for frozen ones no less than their image."""

    def forget(self, uid: str) -> None:
        """The instance has ended: nothing is remembered of it. Raises OSError."""

    def recover(self, living: Collection[str], frozen: Collection[str]) -> None:
        """After a restart: limits of everyone not frozen are lowered, notes of everyone not living go."""


# ---- metering -------------------------------------------------------------------------------------------------


class RequestMeter(Protocol):
    """The meter of one instance, as its gate sees it. Times are monotonic ns."""

    def request_began(self, at: int) -> None: ...

    def request_ended(self, at: int) -> None: ...


class Meters(Protocol):
    """The meters of a node: one per instance."""

    def open(
        self, uid: str, function: FunctionSpec, state: InstanceState, *, unbilled: bool, same_process: bool
    ) -> RequestMeter: ...

    def changed(self, uid: str, state: InstanceState, *, unbilled: bool = False) -> None: ...

    def placed(self, uid: str, model: str, gpu_uuids: tuple[str, ...]) -> None: ...


# ---- disk -----------------------------------------------------------------------------------------------------


class RecordPhase(Enum):
    """How far an instance got. CREATED: intent only. STARTED: handle known, /initialize not done."""

    CREATED = "CREATED"
    STARTED = "STARTED"
    READY = "READY"
    STOPPING = "STOPPING"
    ENDED = "ENDED"


@dataclass(frozen=True, slots=True)
class InstanceRecord:
    """What must survive the agent: the spec, then the handle, then how far the instance got."""

    spec: InstanceSpec
    phase: RecordPhase
    handle: Handle | None
    gpu_uuids: tuple[str, ...]
    create_wall_ns: int


class InstanceStore(Protocol):
    """Records of instances. A write returns when it is durable. Raises UnavailableError STORE_FAILED."""

    async def put_instance(self, record: InstanceRecord) -> None: ...

    async def load_instances(self) -> Sequence[InstanceRecord]: ...

    async def delete_instance(self, uid: str) -> None: ...


class LedgerStore(Protocol):
    """Usage windows. Unsealed windows are upserted; sealed ones never change; pruned only once acknowledged."""

    async def upsert_windows(self, windows: Sequence[UsageWindow]) -> None: ...

    async def last_windows(self) -> Sequence[UsageWindow]:
        """The newest window of every instance, sealed or not: where a recovery continues."""

    async def unacknowledged(self, limit: int) -> Sequence[UsageWindow]:
        """Sealed windows not yet acknowledged, in order of (instance_uid, seq)."""

    async def acknowledge(self, keys: Sequence[tuple[str, int]]) -> None: ...

    async def refuse(self, keys: Sequence[tuple[str, int]], kept: int = 10_000) -> None:
        """The scheduler will never take these: they are no longer offered, and the newest `kept` such stay to be
        looked at."""

    async def read_windows(
        self, instance_uid: str = "", limit: int = 1000, after_rowid: int = 0
    ) -> Sequence[UsageWindow]: ...

    async def prune(self, started_before_wall_ns: int, limit: int = 5_000) -> int:
        """Delete at most `limit` acknowledged windows that started before then; returns how many went."""
