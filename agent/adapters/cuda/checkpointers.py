"""Chooses the checkpointer of a host: the driver's workers, the `cuda-checkpoint` program, or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from agent.adapters.cuda.driver_checkpointer import DriverCheckpointer, PoolLimits
from agent.adapters.cuda.driver_worker_process import WorkerOptions
from agent.adapters.cuda.result_codes import not_begun
from agent.adapters.cuda.utility_checkpointer import UtilityCheckpointer
from agent.core.errors import UnavailableError
from agent.core.gpus.capabilities import Capabilities, CheckpointerKind
from agent.ports import Checkpointer, CudaCall, CudaReply
from agent.settings import GpuSettings

WORKERS_DOWN = "DRIVER_WORKERS_DOWN"
"""Reason of a reply: no worker can be started, now or later."""

SPAWN_S = 10.0
"""Time for starting the program on top of its operation: cuInit takes up to 7 s on hosts with many GPUs."""


class HostCheckpointer(Checkpointer, Protocol):
    """A `Checkpointer` with a life cycle. `start` raises HibernodeError if it can't work on this host; `close` ends its
    processes. `run` works without `start` (recovery relies on it): NOT_BEGUN if the driver can't be called."""

    async def start(self) -> None: ...

    def on_persistence_off(self) -> None:
        """Persistence mode was turned off on a GPU of this host."""

    async def close(self) -> None: ...


class NoCheckpointer:
    """For a host whose driver has no way to checkpoint."""

    def __init__(self, message: str) -> None:
        self._message = message

    async def start(self) -> None:
        """Raises UnavailableError CHECKPOINT_API_UNAVAILABLE."""
        raise UnavailableError("CHECKPOINT_API_UNAVAILABLE", self._message)

    def on_persistence_off(self) -> None:
        """Does nothing: nothing is restored here."""

    async def close(self) -> None:
        """Does nothing: there is no process to end."""

    async def run(self, calls: Sequence[CudaCall], deadline_s: float, gpu_uuids: Sequence[str] = ()) -> CudaReply:
        """`Checkpointer.run`: begins nothing, replies NOT_BEGUN with DRIVER_WORKERS_DOWN."""
        return not_begun(WORKERS_DOWN, self._message) if calls else CudaReply()


def choose_checkpointer(
    capabilities: Capabilities,
    settings: GpuSettings,
    on_stuck: Callable[[Sequence[str]], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> HostCheckpointer:
    """The checkpointer that `capabilities` names. `on_stuck` gets the uuids of GPUs whose operation survived SIGKILL:
    cordon them. `environment` decides which libcuda is loaded; None: the agent's own environment."""
    match capabilities.checkpointer:
        case CheckpointerKind.DRIVER:
            return DriverCheckpointer(
                WorkerOptions(environment=environment, init_before_restore=capabilities.init_before_restore),
                PoolLimits(workers=settings.driver_workers),
                on_stuck,
            )
        case CheckpointerKind.UTILITY:
            return UtilityCheckpointer(
                Path(settings.utility_path),
                environment,
                parallel=settings.driver_workers,
                spawn_s=SPAWN_S,
                on_stuck=on_stuck,
            )
        case CheckpointerKind.NONE:
            return NoCheckpointer(capabilities.refusal or "the driver can't checkpoint")
