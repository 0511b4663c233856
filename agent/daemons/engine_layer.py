"""Builds the runtimes of a node: processes of the host, and containers where there is an engine."""

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
from agent.ports import Clock
from agent.settings import AgentConfig


def open_runtimes(
    stack: AsyncExitStack, config: AgentConfig, state_uuid: str, slice_: CgroupSlice | None, clock: Clock
) -> tuple[Runtimes, EngineApi | None]:
    """The runtimes and, where new instances may be containers, the way to the engine. Nothing is asked of it yet: the
    agent starts while it is down. `stack` closes what is opened."""
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
    # Without a socket anywhere there is none for new instances; containers of before may still have to be removed.
    found = socket != "auto" or any(os.path.exists(path) for path in SOCKETS)
    runtimes = Runtimes(process, engine, process_enabled=process_enabled, engine_enabled=found)
    return runtimes, api if found else None


def process_settings(config: AgentConfig, state_uuid: str, slice_: CgroupSlice | None) -> ProcessRuntimeOptions:
    """What the configuration means for processes of the host."""
    runtime = config.runtime
    return ProcessRuntimeOptions(
        state_dir=Path(config.state_dir),
        state_uuid=state_uuid,
        slice_=slice_,
        enabled=runtime.process.enabled,
        user=runtime.process.user,
        ports=(runtime.process.ports.first, runtime.process.ports.last),
        log_cap_bytes=runtime.log_limit_bytes,
    )
