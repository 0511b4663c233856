"""Tests runtime.process.ports: instances get ports of that range only, and a full range is reported."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from agent.adapters.kernel.clock import SystemClock
from agent.adapters.process.runtime import ProcessRuntime, ProcessRuntimeOptions
from agent.core.errors import InstanceError


def a_runtime(tmp_path: Path, ports: tuple[int, int]) -> ProcessRuntime:
    settings = ProcessRuntimeOptions(tmp_path, "uuid", None, ports=ports)
    return ProcessRuntime(settings, SystemClock())


async def test_each_port_of_the_range_is_used_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        runtime = a_runtime(tmp_path, (port, port))
        with pytest.raises(InstanceError, match=f"runtime.process.ports {port} to {port} are all in use"):
            runtime._choose_port("i-1")
    assert runtime._choose_port("i-1") == port
    with pytest.raises(InstanceError, match="all in use"):
        runtime._choose_port("i-2")
    runtime.close()


async def test_any_free_port_is_used_without_a_range(tmp_path: Path) -> None:
    runtime = a_runtime(tmp_path, (0, 0))
    assert len({runtime._choose_port(f"i-{n}") for n in range(5)}) == 5
    runtime.close()
