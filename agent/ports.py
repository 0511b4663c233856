"""The Protocols through which `host` reaches clock, containers, driver, NVML, memory and disk.

Adapters implement them; tests pass fakes. Every wait has a deadline, given by the caller in seconds or held by the
adapter. A failure is a `HibernodeError`.
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
from agent.core.instance_record import InstanceRecord, UnreadableRecord
from agent.core.snapshots import InstanceReading
from agent.core.types import Exit, FunctionSpec, Gpu, GpuProcess, GpuSample, Handle, InstanceSpec, InstanceState, Xid


class Timer(Protocol):
    """A scheduled callback that can be cancelled (asyncio.TimerHandle has this shape)."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """The only way to read time, in integer nanoseconds: monotonic for durations, wall for records."""

    def monotonic_ns(self) -> int: ...

    def wall_ns(self) -> int: ...

    def call_at(self, at_mono_ns: int, callback: Callable[[], None]) -> Timer: ...


# ---- containers -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartSpec:
    """What a runtime starts. `environment`: the agent's variables (`gpu.mounts`, FC_*), which override the function's.
    `gpu_uuids`: the GPUs visible inside. `all_gpus`: every GPU of the host is visible, and only CUDA_VISIBLE_DEVICES
    names `gpu_uuids`, because the driver restores on other GPUs only processes that can see them all. `gpu_numbers`:
    their numbers in CUDA for a program that sees every GPU (`core.instance_variables.cuda_numbers`); () = unknown."""

    instance: InstanceSpec
    environment: Mapping[str, str]
    gpu_uuids: tuple[str, ...]
    all_gpus: bool = False
    gpu_numbers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ExecSpec:
    """A command to run inside an instance. `terminal`: with a terminal of `columns` x `rows`; `user` "" = the
    container's own."""

    command: tuple[str, ...]
    terminal: bool = False
    columns: int = 80
    rows: int = 24
    user: str = ""


@dataclass(frozen=True, slots=True)
class ExecOutput:
    """Bytes that the command wrote; on a terminal all of it is standard output."""

    data: bytes
    is_error: bool = False


class ExecSession(Protocol):
    """A command that runs inside an instance. Its opener closes it; `close` ends the command as far as the engine
    allows (its input and output end; a terminal hangs up)."""

    async def read(self) -> ExecOutput | None:
        """The next output, at most 64 KiB; None once it has ended. No deadline: the caller cancels it."""

    async def write(self, data: bytes) -> None: ...

    async def close_input(self) -> None: ...

    async def resize(self, columns: int, rows: int) -> None: ...

    async def exit_code(self) -> int:
        """The exit code. Call it after `read` has returned None."""

    async def close(self) -> None: ...


class Runtime(Protocol):
    """Starts, watches and ends containers. They outlive the agent; their handle finds them again."""

    name: str

    def accepts(self, function: FunctionSpec) -> None:
        """Raise PreconditionError (IMAGE_RUNTIME_UNAVAILABLE ...) if this runtime can't run the function."""

    async def prepare(self, function: FunctionSpec, progress: Callable[[str], None]) -> None:
        """Make the image available, before a GPU is requested: pull it if the policy says so. `progress` gets a
        sentence now and then. Bounded in time; calls for the same image share one pull.

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
        """Wait until the container has ended. No deadline: the caller cancels it."""

    async def alive(self, handle: Handle) -> bool:
        """Whether exactly this container (boot, pid, start time) still runs."""

    async def terminate(self, handle: Handle) -> None:
        """SIGTERM to the main process, if it still runs."""

    async def kill(self, handle: Handle, deadline_s: float = 10.0) -> None:
        """SIGKILL all its processes, frozen or not (cgroup.kill), and wait for their end. Raises DeadlineError."""

    async def kill_processes(self, handle: Handle, pids: Sequence[int]) -> None:
        """SIGKILL these processes, frozen or not. Pids that are not inside the container (any more) are skipped."""

    async def destroy(self, handle: Handle) -> None:
        """Remove what is left (cgroup, scratch; not the log). Idempotent."""

    async def list_handles(self) -> Sequence[Handle]:
        """All containers on this host with this state directory's UUID, recorded or not."""

    async def pids(self, handle: Handle) -> Sequence[int]:
        """Host pids inside the container now."""

    async def listening(self, handle: Handle) -> Sequence[str]:
        """Addresses that its processes listen on, such as `0.0.0.0:9000`; a few at most, and none if unknown."""

    async def read_log(self, handle: Handle, tail_bytes: int) -> bytes:
        """The last bytes of its combined stdout and stderr, also after its end. Raises OSError if it can't be read."""

    def follow_log(self, handle: Handle, tail_bytes: int) -> AsyncGenerator[bytes, None]:
        """The last bytes, then new output, in chunks of at most 64 KiB, until the container has ended and all is read.
        The reader closes it (`aclosing`): that, or cancelling, stops it and leaves nothing behind."""

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
    """How an operation of the freezer ended, by the state read afterwards.

    OK: done. REFUSED: rolled back, the instance is as before. BROKEN: state unknown, only a kill is safe.
    """

    OK = "OK"
    REFUSED = "REFUSED"
    BROKEN = "BROKEN"


@dataclass(frozen=True, slots=True)
class FreezeResult:
    """`driver_ns`: time inside the driver's own calls; `image_bytes`: VRAM that host memory now holds."""

    outcome: Outcome
    reason: str = ""
    message: str = ""
    driver_ns: int = 0
    image_bytes: int = 0


class Condition(Enum):
    """The state in which recovery finds an instance."""

    GONE = "GONE"
    AWAKE = "AWAKE"
    LOCKED = "LOCKED"
    CHECKPOINTED = "CHECKPOINTED"
    FROZEN = "FROZEN"
    PAUSED_BY_OTHERS = "PAUSED_BY_OTHERS"
    BROKEN = "BROKEN"


class Freezer(Protocol):
    """Freezes and wakes instances, in the order that the driver's rules require. Makes no driver call on a frozen
    cgroup.

    `lock` then `checkpoint` is a freeze; `lock` then `unlock` a cancelled one. Each operation has a hard deadline
    inside, and returns a result also for the driver's errors.
    """

    async def lock(self, handle: Handle) -> FreezeResult: ...

    async def unlock(self, handle: Handle) -> FreezeResult: ...

    async def checkpoint(self, handle: Handle) -> FreezeResult: ...

    async def wake(self, handle: Handle, gpu_map: Mapping[str, str], gpu_uuids: Sequence[str] = ()) -> FreezeResult:
        """Verify free VRAM, thaw, restore, unlock, verify that it runs. `gpu_map`: old uuid -> new uuid of every GPU,
        empty = the same. `gpu_uuids`: the GPUs that it was granted, where alone it may run afterwards; empty = unknown.
        REFUSED (GPU_MEMORY_SHORT ...): still checkpointed and frozen, on the old GPUs."""

    def paused(self, handle: Handle) -> bool:
        """Whether another program has paused it (docker pause). Reads one file; makes no driver call."""

    async def prepare_kill(self, handle: Handle) -> None:
        """Lock and checkpoint before SIGKILL of an instance that was restored before: killing a restored process can
        hang the host (agent/docs/facts/gpu-checkpoint.md, section 7). Bounded in time; never raises."""

    async def condition(self, handle: Handle) -> Condition:
        """The instance's real state. Reads the cgroup first, and calls the driver only where that is safe.

        Raises UnavailableError (NVML_UNAVAILABLE, DRIVER_BUSY ...) if it can't be read now: retry.
        """

    async def finish_freeze(self, handle: Handle) -> FreezeResult:
        """Recovery: freeze the cgroup of a CHECKPOINTED instance."""

    async def thaw(self, handle: Handle) -> None:
        """Recovery and stop: undo a cgroup freeze of another program."""

    async def vram_bytes(self, handle: Handle) -> int:
        """VRAM that the instance's processes use now, by NVML."""

    def forget(self, handle: Handle) -> None:
        """The instance ended: forget its CUDA processes."""


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
        """Return once it runs again. Idempotent; undoes any freeze. Raises DeadlineError THAW_TIMEOUT (an ancestor is
        frozen too), PreconditionError INSTANCE_GONE."""

    def state(self, handle: Handle) -> FreezerState:
        """The kernel's state now."""

    def is_frozen(self, handle: Handle) -> bool:
        """state(handle) is FROZEN; for an instance that runs it costs one read of a small file."""


class Checkpointer(Protocol):
    """The driver's checkpoint operations, in batches. A call on a process in a frozen cgroup hangs. STATE of a process
    without CUDA is answered with NONE and does not end the batch."""

    async def run(self, calls: Sequence[CudaCall], deadline_s: float, gpu_uuids: Sequence[str] = ()) -> CudaReply:
        """Run the calls in order until one fails. The driver's errors are in the reply, never raised. `deadline_s` is
        for the driver; the wait for a free worker has its own bound. `gpu_uuids`: the devices to report if it hangs."""


@dataclass(frozen=True, slots=True)
class GpuProcesses:
    """The compute processes of every device that answered. Those on `unanswered` devices are unknown: `on` proves a
    device empty. `lost`: those of `unanswered` that need a reset to answer."""

    entries: tuple[GpuProcess, ...] = ()
    unanswered: frozenset[str] = frozenset()
    lost: frozenset[str] = frozenset()

    def __iter__(self) -> Iterator[GpuProcess]:
        return iter(self.entries)

    def on(self, gpu_uuids: Collection[str]) -> tuple[GpuProcess, ...]:
        """The processes on these devices. Raises UnavailableError NVML_UNAVAILABLE if one did not answer."""
        if silent := sorted(self.unanswered.intersection(gpu_uuids)):
            raise UnavailableError("NVML_UNAVAILABLE", f"NVML can't read GPU {', '.join(silent)}; see `nvidia-smi`")
        return tuple(process for process in self.entries if process.gpu_uuid in gpu_uuids)


class Gpus(Protocol):
    """NVML, in a thread. Raises UnavailableError NVML_UNAVAILABLE if the driver does not answer in time; an error of
    one device does not hide the others."""

    async def list_gpus(self) -> Sequence[Gpu]:
        """The GPUs that NVML can describe now, without those that it has lost."""

    async def processes(self) -> GpuProcesses: ...

    async def samples(self) -> Sequence[GpuSample]:
        """A sample of every device; one that does not answer has `error` set."""

    async def memory_free(self) -> Mapping[str, int]:
        """Free bytes by uuid, for a restore. A device that does not answer is left out."""

    async def driver(self) -> DriverInfo: ...


class GpuEvents(Protocol):
    """XID events of every device, in a thread of its own, which outlives a driver that stops answering."""

    async def next_xid(self) -> Xid:
        """Wait for the next event. No deadline: the caller cancels it. A bounded number is kept unread."""


@dataclass(frozen=True, slots=True)
class DriverInfo:
    """`version` like "580.65.06"; `cuda` as NVML gives it, 13000 for 13.0."""

    version: str
    cuda: int


class HostMemory(Protocol):
    """The host's free memory, an instance's cgroup headroom, and notes that outlive the agent: raised limits and sizes
    of images.

    `raise_limit`, `lower_limit`, `note_image`, `forget` and `recover` write to a disk: one thread beside the loop calls
    them, in order. The others read /proc, cgroup files and memory.
    """

    def available_bytes(self) -> int:
        """MemAvailable, with reclaimable cache counted as free."""

    def headroom_bytes(self, handle: Handle) -> int | None:
        """Smallest (limit - usage, cache counted as free) over every ancestor; None = no limit anywhere."""

    def raise_limit(self, handle: Handle, need_bytes: int) -> str:
        """Raise the instance's own memory limit for `need_bytes` of GPU image, never that of an ancestor.

        The old limit is noted before. Returns "", or why it failed and what to do."""

    def limit_raised(self, uid: str) -> bool:
        """Whether the limit is raised now. Costs nothing."""

    def lower_limit(self, uid: str) -> None:
        """Restore the limit once the image is gone. Idempotent. While more is in use than the old limit allows, it
        stays raised (as `limit_raised` shows), so that nothing is killed. Never raises for an instance that has
        ended."""

    def note_image(self, uid: str, image_bytes: int) -> None:
        """Note the expected size of its image. Raises OSError."""

    def noted_image(self, uid: str) -> int | None:
        """The size noted last, by this agent or an earlier one."""

    def resident_bytes(self, pids: Collection[int]) -> int:
        """Host memory of these processes; of frozen ones at least their image."""

    def forget(self, uid: str) -> None:
        """The instance has ended: delete its notes. Raises OSError."""

    def recover(self, living: Collection[str], frozen: Collection[str]) -> None:
        """After a restart: lower the limits of instances that are not frozen, delete the notes of those not living."""


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


class InstanceStore(Protocol):
    """Records of instances. A write returns once it is durable. Raises UnavailableError STORE_FAILED."""

    async def put_instance(self, record: InstanceRecord) -> None: ...

    async def load_instances(self) -> Sequence[InstanceRecord]:
        """Those that can be read."""

    async def unreadable_instances(self) -> Sequence[UnreadableRecord]:
        """The others."""

    async def delete_instance(self, uid: str) -> None: ...


class LedgerStore(Protocol):
    """Usage windows. Unsealed ones are upserted, sealed ones never change, only acknowledged ones are pruned."""

    async def upsert_windows(self, windows: Sequence[UsageWindow]) -> None: ...

    async def last_windows(self) -> Sequence[UsageWindow]:
        """The newest window of every instance, sealed or not: a recovery continues there."""

    async def unacknowledged(self, limit: int) -> Sequence[UsageWindow]:
        """Sealed windows not yet acknowledged, in order of (instance_uid, seq)."""

    async def acknowledge(self, keys: Sequence[tuple[str, int]]) -> None: ...

    async def refuse(self, keys: Sequence[tuple[str, int]], kept: int = 10_000) -> None:
        """Mark windows that the scheduler rejected for good: they are no longer offered. The newest `kept` of them stay
        readable."""

    async def read_windows(
        self, instance_uid: str = "", limit: int = 1000, after_rowid: int = 0
    ) -> Sequence[UsageWindow]: ...

    async def prune(self, started_before_wall_ns: int, limit: int = 5_000) -> int:
        """Delete at most `limit` acknowledged windows that started before then; returns their number."""
