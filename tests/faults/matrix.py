"""The faults that an agent has to live with, as rows: what strikes when, and what becomes of everybody.

The same rows are run (test_matrix.py) and printed (agent/docs/internals/driver-faults.md; a test compares the two).
`facts` is a section of agent/docs/facts/gpu-checkpoint.md, or "#N", an issue of NVIDIA/cuda-checkpoint. Three faults
are tested elsewhere because no request waits for them: killing a restored process (#53), a thread taken for a process
(#41), and mixed listings of several processes (tests/adapters/freezer/).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from tests.faults.world import FaultWorld, Plan


class Phase(Enum):
    """Where it strikes. The two listings are the looks at the CUDA processes before and after the lock."""

    LISTING = "listing"
    LOCK = "lock"
    LISTING_AGAIN = "second listing"
    CHECKPOINT = "checkpoint"
    CGROUP = "cgroup"
    FROZEN = "frozen"
    THAW = "thaw"
    RESTORE = "restore"
    UNLOCK = "unlock"

    @property
    def of_freeze(self) -> bool:
        """Does a freeze meet it? Else a wake."""
        return self not in (Phase.FROZEN, Phase.THAW, Phase.RESTORE, Phase.UNLOCK)


class End(Enum):
    """What becomes of the instance: it lives on as if nothing had been (SLEEPS: after a freeze that came about all the
    same; PAUSED: once somebody lets it), or it is killed, so that another is made."""

    LIVES = "RUNNING"
    SLEEPS = "FROZEN, woken by the request"
    PAUSED = "RUNNING, paused"
    DIES = "FAILED"


@dataclass(frozen=True)
class Row:
    """One fault. `plan` makes it strike, `reason` is what the instance's state or history says of it ("" = nothing).
    `environment` is for the function, `profile` the driver. `frozen_calls`: so many calls are under way in the driver
    when somebody else freezes the process: the only ones ever made on a frozen one."""

    fault: str
    facts: str
    phase: Phase
    plan: Plan
    end: End
    reason: str = ""
    profile: str = "580"
    environment: dict[str, str] = field(default_factory=dict)
    frozen_calls: int = 0

    @property
    def request(self) -> str:
        """What the request that waits gets from the agent; one that is refused is sent elsewhere by the gateway."""
        return "refused unseen" if self.end in (End.DIES, End.PAUSED) else "answered"

    @property
    def released(self) -> str:
        """What is given back."""
        if self.end is End.DIES:
            return "GPU (on proof), image, container"
        return (
            "lock, host memory reservation"
            if self.phase.of_freeze and self.end in (End.LIVES, End.PAUSED)
            else "nothing"
        )


def fault(
    operation: str,
    kind: str,
    *,
    after: bool = False,
    skip: int = 0,
    times: int = 1,
    delay_ms: int = 0,
    then: Callable[[FaultWorld, str], None] | None = None,
) -> Plan:
    """A fault of the driver, for whichever process comes first; `then` follows once it has struck."""

    async def plan(world: FaultWorld, uid: str) -> None:
        planned = world.driver.fault(operation, kind, after=after, skip=skip, times=times, delay_ms=delay_ms)
        if then is not None:
            world.once_struck(planned, lambda: then(world, uid))

    return plan


def both(first: Plan, second: Plan) -> Plan:
    """Two faults in one row."""

    async def plan(world: FaultWorld, uid: str) -> None:
        await first(world, uid)
        await second(world, uid)

    return plan


def host(change: Callable[[FaultWorld, str], None]) -> Plan:
    """Something that happens to the host or the GPU."""

    async def plan(world: FaultWorld, uid: str) -> None:
        change(world, uid)

    return plan


_LOST, _304, _GONE = "DRIVER_OPERATION_LOST", "CUDA_OPERATING_SYSTEM", "INSTANCE_CRASHED"
_TWO = {"SECOND": "1"}

ROWS = (
    # ---- freeze: before the lock ----------------------------------------------------------------------------------
    Row("a process without CUDA", "#10", Phase.LISTING, fault("state", "NOT_INITIALIZED"), End.SLEEPS),
    Row("get-state is denied (304)", "#6", Phase.LISTING, fault("state", "OPERATING_SYSTEM"), End.LIVES, _304),
    Row("get-state never returns", "#26", Phase.LISTING, fault("state", "HANG"), End.LIVES),
    Row("the target dies of get-state", "#58", Phase.LISTING, fault("state", "DEATH"), End.DIES),
    Row(
        "somebody else's checkpoint is under way",
        "2",
        Phase.LISTING,
        fault("state", "CHECKPOINTING"),
        End.LIVES,
        "CUDA_ILLEGAL_STATE",
    ),
    Row("paused from outside", "4", Phase.LISTING, host(FaultWorld.pause), End.PAUSED, "EXTERNALLY_FROZEN"),
    Row("NVML fails", "4", Phase.LISTING, host(FaultWorld.blind_nvml), End.LIVES, "NVML"),
    Row(
        "host memory too short for the image",
        "5, #33",
        Phase.LISTING,
        host(lambda _world, _uid: None),
        End.LIVES,
        "HOST_MEMORY_SHORT",
        environment={"VRAM_MIB": "48"},
    ),
    # ---- lock -----------------------------------------------------------------------------------------------------
    Row("times out (600)", "2", Phase.LOCK, fault("lock", "NOT_READY"), End.LIVES, "CUDA_LOCK_TIMEOUT"),
    Row("takes long", "2", Phase.LOCK, fault("lock", "SLOW", delay_ms=100), End.SLEEPS),
    Row("not supported (801): IPC, UVM", "#34", Phase.LOCK, fault("lock", "NOT_SUPPORTED"), End.LIVES, "CUDA_NOT_SUP"),
    Row("denied (304)", "#6", Phase.LOCK, fault("lock", "OPERATING_SYSTEM"), End.LIVES, _304),
    Row("wrong state (401)", "1", Phase.LOCK, fault("lock", "ILLEGAL_STATE"), End.LIVES, "CUDA_ILLEGAL_STATE"),
    Row("fails, but it is LOCKED", "2", Phase.LOCK, fault("lock", "NOT_READY", after=True), End.LIVES, "LOCK_TIMEOUT"),
    Row("success, but it still runs", "2", Phase.LOCK, fault("lock", "STALE"), End.LIVES, "CUDA_STATE_STALE"),
    Row("never returns", "#26, #30", Phase.LOCK, fault("lock", "HANG"), End.LIVES, _LOST),
    Row("never returns, but locks", "#30", Phase.LOCK, fault("lock", "HANG", after=True), End.LIVES, _LOST),
    Row("kills the target", "#58", Phase.LOCK, fault("lock", "DEATH"), End.DIES),
    Row("leaves it FAILED", "4", Phase.LOCK, fault("lock", "FAILED"), End.DIES, "CUDA_STATE_FAILED"),
    Row(
        "the worker is killed",
        "2",
        Phase.LOCK,
        fault("lock", "SLOW", delay_ms=300, then=FaultWorld.kill_workers),
        End.LIVES,
        _LOST,
    ),
    # ---- the second listing ---------------------------------------------------------------------------------------
    Row(
        "a process has appeared",
        "4",
        Phase.LISTING_AGAIN,
        fault("lock", "SLOW", delay_ms=600, then=FaultWorld.start_second),
        End.SLEEPS,
        environment={"SECOND": "when told"},
    ),
    Row(
        "a process has ended",
        "4",
        Phase.LISTING_AGAIN,
        fault("lock", "SLOW", delay_ms=150, then=FaultWorld.kill_second),
        End.SLEEPS,
        environment=_TWO,
    ),
    Row(
        "a process has appeared, and its get-state never returns",
        "#30",
        Phase.LISTING_AGAIN,
        both(fault("lock", "SLOW", delay_ms=600, then=FaultWorld.start_second), fault("state", "HANG", skip=2)),
        End.SLEEPS,
        environment={"SECOND": "when told"},
    ),
    # ---- checkpoint -----------------------------------------------------------------------------------------------
    Row(
        "out of memory (2): MIG, host",
        "#42",
        Phase.CHECKPOINT,
        fault("checkpoint", "OUT_OF_MEMORY"),
        End.LIVES,
        "CUDA_OUT_OF_MEMORY",
    ),
    Row(
        "not supported (801)", "#51", Phase.CHECKPOINT, fault("checkpoint", "NOT_SUPPORTED"), End.LIVES, "CUDA_NOT_SUP"
    ),
    Row(
        "the operating system fails (304)",
        "4",
        Phase.CHECKPOINT,
        fault("checkpoint", "OPERATING_SYSTEM"),
        End.DIES,
        _304,
    ),
    Row(
        "fails, but it is CHECKPOINTED",
        "2",
        Phase.CHECKPOINT,
        fault("checkpoint", "OUT_OF_MEMORY", after=True),
        End.LIVES,
        "CUDA_OUT_OF_MEMORY",
    ),
    Row(
        "success, but nothing was done",
        "2",
        Phase.CHECKPOINT,
        fault("checkpoint", "STALE"),
        End.LIVES,
        "CUDA_STATE_STALE",
    ),
    Row(
        "success, but it is still CHECKPOINTING",
        "2",
        Phase.CHECKPOINT,
        fault("state", "CHECKPOINTING", skip=2, times=3),
        End.LIVES,
        "CUDA_STATE_STALE",
    ),
    Row("never returns", "#17", Phase.CHECKPOINT, fault("checkpoint", "HANG"), End.LIVES, _LOST),
    Row(
        "never returns, but is done", "#17", Phase.CHECKPOINT, fault("checkpoint", "HANG", after=True), End.LIVES, _LOST
    ),
    Row("the target dies in mid-copy", "5", Phase.CHECKPOINT, fault("checkpoint", "DEATH"), End.DIES, ""),
    Row("leaves it FAILED", "4", Phase.CHECKPOINT, fault("checkpoint", "FAILED"), End.DIES, _304),
    Row(
        "one of two fails",
        "4",
        Phase.CHECKPOINT,
        fault("checkpoint", "OUT_OF_MEMORY", skip=1),
        End.LIVES,
        "CUDA_OUT_OF_MEMORY",
        environment=_TWO,
    ),
    Row(
        "the worker is killed",
        "2",
        Phase.CHECKPOINT,
        fault("checkpoint", "SLOW", delay_ms=300, then=FaultWorld.kill_workers),
        End.LIVES,
        _LOST,
    ),
    # ---- cgroup ---------------------------------------------------------------------------------------------------
    Row(
        "paused from outside meanwhile",
        "4",
        Phase.CGROUP,
        fault("checkpoint", "SLOW", delay_ms=100, then=FaultWorld.pause_for_good),
        End.LIVES,
        _LOST,
        frozen_calls=1,
    ),
    Row("it is killed while it is frozen", "7", Phase.FROZEN, host(FaultWorld.kill_instance), End.DIES),
    # ---- wake -----------------------------------------------------------------------------------------------------
    Row("an ancestor is frozen", "4", Phase.THAW, host(FaultWorld.freeze_ancestor), End.DIES, "THAW_TIMEOUT"),
    Row("no room on the GPU", "#44", Phase.RESTORE, host(FaultWorld.fill_gpu), End.DIES, "GPU_MEMORY_SHORT"),
    Row("NVML fails", "4", Phase.RESTORE, host(FaultWorld.blind_nvml), End.LIVES),
    Row(
        "out of memory (2), once",
        "#44",
        Phase.RESTORE,
        fault("restore", "OUT_OF_MEMORY"),
        End.LIVES,
        "CUDA_OUT_OF_MEMORY",
    ),
    Row(
        "out of memory (2), for good",
        "#44",
        Phase.RESTORE,
        fault("restore", "OUT_OF_MEMORY", times=0),
        End.DIES,
        "CUDA_OUT_OF_MEMORY",
    ),
    Row(
        "out of memory (2) on 570: stuck",
        "#44",
        Phase.RESTORE,
        fault("restore", "OUT_OF_MEMORY"),
        End.DIES,
        "CUDA_OUT_OF_MEMORY",
        profile="570",
    ),
    Row("persistence mode was turned off (800)", "#25", Phase.RESTORE, FaultWorld.no_persistence, End.LIVES),
    Row(
        "not permitted (800), once",
        "#25",
        Phase.RESTORE,
        fault("restore", "NOT_PERMITTED"),
        End.LIVES,
        "CUDA_NOT_PERMITTED",
    ),
    Row(
        "invalid device map (1), once",
        "#35, #47",
        Phase.RESTORE,
        fault("restore", "INVALID_VALUE"),
        End.LIVES,
        "CUDA_INVALID_VALUE",
    ),
    Row("the operating system fails (304)", "4", Phase.RESTORE, fault("restore", "OPERATING_SYSTEM"), End.DIES, _304),
    Row("success, but it is still CHECKPOINTED", "2", Phase.RESTORE, fault("restore", "STALE"), End.LIVES),
    Row("success, but it is still RESTORING", "2", Phase.RESTORE, fault("state", "RESTORING", times=3), End.LIVES),
    Row("fails, but it is restored", "2", Phase.RESTORE, fault("restore", "INVALID_VALUE", after=True), End.LIVES),
    Row("never returns", "#17", Phase.RESTORE, fault("restore", "HANG"), End.LIVES, _LOST),
    Row("never returns, but is done", "#17", Phase.RESTORE, fault("restore", "HANG", after=True), End.LIVES),
    Row("the target dies of it", "#25", Phase.RESTORE, fault("restore", "DEATH"), End.DIES, ""),
    Row("leaves it FAILED", "4", Phase.RESTORE, fault("restore", "FAILED"), End.DIES, _304),
    Row(
        "one of two fails, once",
        "#27, #47",
        Phase.RESTORE,
        fault("restore", "OUT_OF_MEMORY", skip=1),
        End.LIVES,
        environment=_TWO,
    ),
    # ---- unlock ---------------------------------------------------------------------------------------------------
    Row("wrong state (401), once", "#44", Phase.UNLOCK, fault("unlock", "ILLEGAL_STATE"), End.LIVES),
    Row("success, but it stays LOCKED", "4", Phase.UNLOCK, fault("unlock", "STALE"), End.LIVES),
    Row("fails, but it runs", "2", Phase.UNLOCK, fault("unlock", "NOT_SUPPORTED", after=True), End.LIVES),
    Row("fails (304), but it runs", "2", Phase.UNLOCK, fault("unlock", "OPERATING_SYSTEM", after=True), End.LIVES),
    Row("the operating system fails (304)", "4", Phase.UNLOCK, fault("unlock", "OPERATING_SYSTEM"), End.DIES, _304),
    Row("never returns", "#17", Phase.UNLOCK, fault("unlock", "HANG"), End.LIVES),
    Row("the target dies of it", "#58", Phase.UNLOCK, fault("unlock", "DEATH"), End.DIES, ""),
    Row("leaves it FAILED", "4", Phase.UNLOCK, fault("unlock", "FAILED"), End.DIES, _304),
)


def table() -> str:
    """The rows for people: a Markdown table."""
    lines = [
        "| phase | fault | facts | the instance | a waiting request | released |",
        "|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        on = f" (driver {row.profile})" if row.profile != "580" and row.profile not in row.fault else ""
        end = f"{row.end.value}, {row.reason}" if row.end is End.DIES and row.reason else row.end.value
        lines.append(f"| {row.phase.value} | {row.fault}{on} | {row.facts} | {end} | {row.request} | {row.released} |")
    return "\n".join(lines)
