"""Plans a container: looks up image, GPUs, volumes and limits, then builds its configuration."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.adapters.engine.api import EngineApi
from agent.adapters.engine.container_config import PlanOptions, container_config
from agent.adapters.engine.gpus import Attachment, attach_gpus, read_cdi_devices
from agent.adapters.engine.images import Images
from agent.adapters.engine.volumes import ResolvedVolume, forbidden_paths, resolve_volumes
from agent.core.errors import InstanceError, PreconditionError
from agent.core.types import FunctionSpec
from agent.log import get_logger
from agent.ports import StartSpec
from agent.settings import GpuSettings, RuntimeSettings

VOLUMES_DEADLINE_S = 10.0

log = get_logger()


@dataclass(frozen=True, slots=True)
class ContainerPlan:
    """`config` contains secrets: never log it. `devices`: CDI names for Podman's own API. `limits_disk`: the plan
    limits the size of the writable layer."""

    config: Mapping[str, Any] = field(repr=False)
    devices: tuple[str, ...] = ()
    limits_disk: bool = False


class ContainerPlanner:
    """`runtime` and `gpu` are the node's settings; `excluded_paths` may be in no volume (state directory ...)."""

    def __init__(
        self,
        api: EngineApi,
        images: Images,
        runtime: RuntimeSettings,
        gpu: GpuSettings,
        *,
        state_uuid: str,
        network: str,
        excluded_paths: tuple[Path, ...],
    ) -> None:
        self._api = api
        self._images = images
        self._runtime = runtime
        self._gpu = gpu
        self._state_uuid = state_uuid
        self._network = network
        self._excluded_paths = excluded_paths
        self._disk_limit_refused = False

    async def plan(self, spec: StartSpec) -> ContainerPlan:
        """Raises InstanceError IMAGE_NOT_FOUND, VOLUME_REFUSED, START_FAILED; PreconditionError GPU_ATTACH_UNAVAILABLE,
        DISK_LIMIT_UNAVAILABLE; and what `EngineApi.call` raises."""
        function = spec.instance.function
        image = await self._images.inspect(function.image)
        if image is None:
            raise InstanceError(
                "IMAGE_NOT_FOUND",
                f"the image {function.image} was removed from this node meanwhile; create the instance again",
                image=function.image,
            )
        limits_disk, attachment = self._limits_disk(function), await self._attachment(spec)
        options = PlanOptions(
            image=image.id,
            network=self._network,
            state_uuid=self._state_uuid,
            pids_limit=self._runtime.engine.pids_limit,
            capabilities=self._runtime.engine.capabilities,
            log_limit_bytes=self._runtime.log_limit_bytes,
            attachment=attachment,
            volumes=await self._volumes(function),
            image_user=image.user,
            image_environment=image.environment,
            disk_limit=limits_disk,
            host_cpus=self._api.facts.cpus,
        )
        return ContainerPlan(container_config(spec, options), attachment.devices, limits_disk)

    def disk_limit_refused(self) -> bool:
        """Record that the engine can't limit disk size. Returns whether a plan without the limit is allowed
        (`auto`)."""
        if self._runtime.engine.disk_limit == "auto" and not self._disk_limit_refused:
            self._disk_limit_refused = True
            log.warning("engine.disk_limit_unavailable", hint="the disk size of functions is not enforced on this node")
            return True
        return False

    def _limits_disk(self, function: FunctionSpec) -> bool:
        if not function.disk_bytes:
            return False
        match self._runtime.engine.disk_limit:
            case "off":
                return False
            case "auto":
                return self._api.facts.disk_limits and not self._disk_limit_refused
            case "require":
                if not self._api.facts.disk_limits:
                    raise PreconditionError(
                        "DISK_LIMIT_UNAVAILABLE",
                        "runtime.engine.disk_limit is `require`, but the engine's storage can't limit a container's "
                        "disk; use overlay2 on xfs mounted with pquota, or set it to auto",
                        storage=self._api.facts.storage,
                    )
                return True

    async def _attachment(self, spec: StartSpec) -> Attachment:
        if not spec.gpu_uuids:
            return Attachment()
        devices: frozenset[str] = frozenset()
        if self._gpu.attach in ("auto", "cdi"):
            devices = await read_cdi_devices()
        return attach_gpus(self._gpu, self._api.facts, devices, spec.gpu_uuids, all_gpus=spec.all_gpus)

    async def _volumes(self, function: FunctionSpec) -> tuple[ResolvedVolume, ...]:
        if not function.container.volumes:
            return ()
        own: tuple[str | Path, ...] = (*self._excluded_paths, self._api.path, self._api.facts.root_dir)
        try:
            async with asyncio.timeout(VOLUMES_DEADLINE_S):
                return await asyncio.to_thread(
                    lambda: resolve_volumes(
                        function.container.volumes, self._runtime.volumes_allowed, forbidden_paths(*own)
                    )
                )
        except TimeoutError:
            raise InstanceError(
                "VOLUME_REFUSED", "a volume's folder does not answer; is its network file system reachable?"
            ) from None
