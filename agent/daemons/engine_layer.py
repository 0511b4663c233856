"""Builds the runtimes of a node: processes of the host, and containers where there is an engine."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from agent.adapters.cgroup import CgroupSlice
from agent.adapters.engine_api import SOCKETS, EngineApi
from agent.adapters.engine_exec import EngineExec
from agent.adapters.engine_logs import EngineLogs
from agent.adapters.engine_parts import open_engine_api, open_engine_runtime
from agent.adapters.engine_runtime import EngineRuntime
from agent.adapters.process_runtime import ProcessRuntime, ProcessRuntimeSettings
from agent.adapters.runtimes import Runtimes
from agent.ports import Clock
from agent.settings import AgentConfig


@dataclass(frozen=True, slots=True)
class NodeRuntimes:
    """`all` is what the node uses; `engine` None: it has none. `offered`: what new functions may use, as the scheduler
    places by it."""

    all: Runtimes
    engine: EngineRuntime | None
    api: EngineApi | None
    offered: tuple[str, ...]


def open_runtimes(
    stack: AsyncExitStack, config: AgentConfig, state_uuid: str, slice_: CgroupSlice | None, clock: Clock
) -> NodeRuntimes:
    """Nothing is asked of an engine yet: the agent starts while that is down. `stack` closes what is opened."""
    process = ProcessRuntime(process_settings(config, state_uuid, slice_), clock)
    stack.callback(process.close)
    enabled = config.runtime.process.enabled
    offered = ("process",) if enabled else ()
    api = _engine_api(config)
    if api is None:
        return NodeRuntimes(Runtimes(process, None, process_enabled=enabled), None, None, offered)
    engine = open_engine_runtime(
        api,
        config.runtime,
        config.gpu,
        state_dir=Path(config.state_dir),
        state_uuid=state_uuid,
        logs=EngineLogs(api),
        execs=EngineExec(api),
        kept_out=(config.socket_path,),
    )
    stack.push_async_callback(engine.close)
    return NodeRuntimes(Runtimes(process, engine, process_enabled=enabled), engine, api, (*offered, "engine"))


def process_settings(config: AgentConfig, state_uuid: str, slice_: CgroupSlice | None) -> ProcessRuntimeSettings:
    """What the configuration means for processes of the host."""
    runtime = config.runtime
    return ProcessRuntimeSettings(
        state_dir=Path(config.state_dir),
        state_uuid=state_uuid,
        slice_=slice_,
        enabled=runtime.process.enabled,
        user=runtime.process.user,
        ports=(runtime.process.ports.first, runtime.process.ports.last),
        log_cap_bytes=runtime.log_limit_bytes,
    )


def _engine_api(config: AgentConfig) -> EngineApi | None:
    """None: the node has no engine. One that is only down now is there."""
    socket = config.runtime.engine.socket
    if socket == "off" or (socket == "auto" and not any(os.path.exists(path) for path in SOCKETS)):
        return None
    return open_engine_api(config.runtime)
