"""Which checkpointer a host gets: the driver's workers, the program, or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from agent.adapters.cuda.driver_checkpointer import DriverCheckpointer, PoolLimits
from agent.adapters.cuda.driver_worker_process import WorkerOptions
from agent.adapters.cuda.utility_checkpointer import UtilityCheckpointer
from agent.core.errors import UnavailableError
from agent.core.gpus.capabilities import Capabilities
from agent.ports import Checkpointer, CudaCall, CudaFault, CudaReply
from agent.settings import GpuSettings

WORKERS_DOWN = "DRIVER_WORKERS_DOWN"
"""Reason of a reply: no worker can be started, now or later."""

SPAWN_S = 10.0
"""What a spawn of the program may take besides its operation: cuInit took others up to 7 s on hosts with many GPUs."""


class HostCheckpointer(Checkpointer, Protocol):
    """A `Checkpointer` with its life: `start` raises HibernodeError if it can't work here; `close` ends its processes.
    One that was never started may be asked all the same (recovery does), and says NOT_BEGUN where it can't."""

    async def start(self) -> None: ...

    def on_persistence_off(self) -> None:
        """Somebody has turned persistence mode off on a GPU of this host."""

    async def close(self) -> None: ...


class NoCheckpointer:
    """For a host whose driver can't be asked at all."""

    def __init__(self, message: str) -> None:
        self._message = message

    async def start(self) -> None:
        """Raises UnavailableError CHECKPOINT_API_UNAVAILABLE."""
        raise UnavailableError("CHECKPOINT_API_UNAVAILABLE", self._message)

    def on_persistence_off(self) -> None:
        """Nothing is restored here."""

    async def close(self) -> None:
        """Nothing to end."""

    async def run(self, calls: Sequence[CudaCall], deadline_s: float, gpu_uuids: Sequence[str] = ()) -> CudaReply:
        """`Checkpointer.run`: nothing is ever begun."""
        return CudaReply((), CudaFault.NOT_BEGUN, WORKERS_DOWN, self._message) if calls else CudaReply()


def choose_checkpointer(
    capabilities: Capabilities,
    settings: GpuSettings,
    on_stuck: Callable[[Sequence[str]], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> HostCheckpointer:
    """The one that `capabilities` found fit. `on_stuck` gets the GPUs whose operation survived SIGKILL: cordon them.
    `environment` decides which libcuda is found (None: the agent's own)."""
    match capabilities.checkpointer:
        case "driver":
            return DriverCheckpointer(
                WorkerOptions(environment=environment, init_before_restore=capabilities.init_before_restore),
                PoolLimits(workers=settings.driver_workers),
                on_stuck,
            )
        case "utility":
            return UtilityCheckpointer(
                Path(settings.utility_path),
                environment,
                parallel=settings.driver_workers,
                spawn_s=SPAWN_S,
                on_stuck=on_stuck,
            )
        case _:
            return NoCheckpointer(capabilities.refusal or "the driver can't checkpoint")
