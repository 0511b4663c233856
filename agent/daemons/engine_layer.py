"""Builds a node's runtimes: host processes, and containers if there is an engine."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from pathlib import Path

from agent.adapters.engine.api import SOCKETS, EngineApi
from agent.adapters.engine.build import open_engine_api, open_engine_runtime
from agent.adapters.engine.exec import EngineExec
from agent.adapters.engine.logs import EngineLogs
from agent.adapters.kernel.cgroup import CgroupSlice
from agent.adapters.process.runtime import ProcessRuntime, ProcessRuntimeOptions
from agent.adapters.runtime.router import Runtimes
from agent.daemons.process import OPEN_FILES_AT_START
from agent.ports import Clock
from agent.settings import AgentConfig


def open_runtimes(
    stack: AsyncExitStack, config: AgentConfig, state_uuid: str, slice_: CgroupSlice | None, clock: Clock
) -> tuple[Runtimes, EngineApi | None]:
    """Build the runtimes without contacting the engine: the agent starts while that is down. Returns the engine's
    client too, if new instances may be containers. `stack` closes what is opened."""
    process = ProcessRuntime(process_settings(config, state_uuid, slice_), clock)
    stack.callback(process.close)
    process_enabled, socket = config.runtime.process.enabled, config.runtime.engine.socket
    if socket == "off":
        return Runtimes(process, None, process_enabled=process_enabled), None
    api = open_engine_api(config.runtime)
    engine = open_engine_runtime(
        api,
        config.runtime,
        config.gpu,
        state_dir=Path(config.state_dir),
        state_uuid=state_uuid,
        logs=EngineLogs(api),
        execs=EngineExec(api),
        excluded_paths=(config.socket_path,),
    )
    stack.push_async_callback(engine.close)
    # Without any socket no new container starts, but existing ones may still have to be removed.
    found = socket != "auto" or any(os.path.exists(path) for path in SOCKETS)
    runtimes = Runtimes(process, engine, process_enabled=process_enabled, engine_enabled=found)
    return runtimes, api if found else None


def process_settings(config: AgentConfig, state_uuid: str, slice_: CgroupSlice | None) -> ProcessRuntimeOptions:
    """The configuration of the process runtime."""
    runtime = config.runtime
    return ProcessRuntimeOptions(
        state_dir=Path(config.state_dir),
        state_uuid=state_uuid,
        slice_=slice_,
        enabled=runtime.process.enabled,
        user=runtime.process.user,
        ports=(runtime.process.ports.first, runtime.process.ports.last),
        open_files=OPEN_FILES_AT_START,
        log_cap_bytes=runtime.log_limit_bytes,
    )
