"""Builds the engine runtime from the node's settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from agent.adapters.engine.api import EngineApi
from agent.adapters.engine.containers import EngineContainers
from agent.adapters.engine.images import Images
from agent.adapters.engine.network import EngineNetwork
from agent.adapters.engine.planner import ContainerPlanner
from agent.adapters.engine.runtime import EngineComponents, EngineRuntime, Execs, Logs
from agent.adapters.runtime.bundles import Bundles
from agent.adapters.runtime.log_files import LogFiles
from agent.core.types import SECOND_NS
from agent.settings import GpuSettings, RuntimeSettings

KEPT_LOG_FILES = 200


def open_engine_api(runtime: RuntimeSettings) -> EngineApi:
    """A client for the configured engine. Does not connect yet."""
    return EngineApi(runtime.engine.socket, runtime.engine.operation_timeout_ns / SECOND_NS)


def open_engine_runtime(
    api: EngineApi,
    runtime: RuntimeSettings,
    gpu: GpuSettings,
    *,
    state_dir: Path,
    state_uuid: str,
    logs: Logs,
    execs: Execs,
    excluded_paths: Sequence[Path] = (),
    auth_files: Sequence[Path] | None = None,
) -> EngineRuntime:
    """Build the runtime without contacting the engine: the daemon starts while that is down. The caller awaits `close`.
    `excluded_paths`: paths outside the state directory that no volume may reach (the agent's socket)."""
    network = EngineNetwork(api, state_uuid)
    images = Images(api, runtime.engine.pull, runtime.engine.pull_timeout_ns / SECOND_NS, auth_files)
    planner = ContainerPlanner(
        api,
        images,
        runtime,
        gpu,
        state_uuid=state_uuid,
        network=network.name,
        excluded_paths=(state_dir, *excluded_paths),
    )
    components = EngineComponents(
        api=api,
        images=images,
        planner=planner,
        network=network,
        containers=EngineContainers(api, state_uuid),
        bundles=Bundles(state_dir, state_uuid),
        files=LogFiles(state_dir, runtime.log_limit_bytes, KEPT_LOG_FILES),
        logs=logs,
        execs=execs,
    )
    return EngineRuntime(components)
