"""Admin HTTP: read-only, only under this machine's names and addresses, with every metric from the start."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from agent.api.admin_http import AdminServer
from agent.api.agent_metrics import AgentHealth, AgentMetrics
from agent.core.types import GpuSample
from agent.host.node.observer import Observer
from tests.api.test_instance_servicer import observer_of
from tests.host.rig import node_rig


@asynccontextmanager
async def an_admin(host: str = "127.0.0.1", *, ready: bool = True) -> AsyncIterator[int]:
    server = AdminServer(lambda: b"hibernode_ready 1.0\n", lambda: ready)
    port = await server.start(host, 0)
    try:
        yield port
    finally:
        await server.stop()


async def ask(port: int, path: str, *, host: str = "localhost", method: str = "GET") -> tuple[int, bytes]:
    async with asyncio.timeout(5):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


async def test_pages_and_their_status() -> None:
    async with an_admin() as port:
        assert await ask(port, "/healthz") == (200, b"ok\n")
        assert await ask(port, "/readyz") == (200, b"ready\n")
        assert await ask(port, "/metrics") == (200, b"hibernode_ready 1.0\n")
    async with an_admin(ready=False) as port:
        assert await ask(port, "/readyz") == (503, b"not ready\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
async def test_it_is_read_only(method: str) -> None:
    async with an_admin() as port:
        assert (await ask(port, "/metrics", method=method))[0] == 405


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8612", "192.0.2.7:8612", "[::1]:8612", socket.gethostname()])
async def test_own_names_and_addresses_are_served(host: str) -> None:
    async with an_admin("0.0.0.0") as port:
        assert (await ask(port, "/healthz", host=host))[0] == 200


@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0"])
async def test_foreign_host_name_is_refused(bound: str) -> None:
    async with an_admin(bound) as port:
        assert (await ask(port, "/metrics", host="evil.example"))[0] == 403


async def test_failed_bind_leaves_nothing_behind() -> None:
    async with an_admin() as port:
        with pytest.raises(OSError, match="in use"):
            await AdminServer(bytes, lambda: True).start("127.0.0.1", port)


async def test_metrics_of_instances_gpus_and_ledger() -> None:
    async with node_rig() as world:
        actor = await world.running()
        health = AgentHealth(
            store_ok=False, pending_windows=3, merged_windows=1, unmatched_ends=0, scheduler_connected=None
        )
        text = AgentMetrics(observer_of(world), lambda: health).render().decode()
        lines = set(text.splitlines())
        uuid = actor.gpu_uuids[0]
        assert {
            'hibernode_instances{state="RUNNING"} 1.0',
            'hibernode_instances{state="FROZEN"} 0.0',
            "hibernode_ready 1.0",
            "hibernode_store_ok 0.0",
            "hibernode_ledger_pending_windows 3.0",
            "hibernode_ledger_merged_windows_total 1.0",
            f'hibernode_gpu_held{{gpu="{uuid}"}} 1.0',
            f'hibernode_wakes_total{{function="ocr",uid="{actor.uid}"}} 0.0',
            f'hibernode_instance_healthy{{function="ocr",uid="{actor.uid}"}} 1.0',
        } <= lines
        assert "scheduler_connected" not in text
        assert "instance=" not in text, "Prometheus uses that label itself"


async def test_gpu_metrics_in_base_units_without_unknown_values() -> None:
    async with node_rig() as world:
        first, second = [gpu.uuid for gpu in world.gpus.gpus]
        figures = {
            first: GpuSample(first, 1 << 30, sm_percent=0, temperature_celsius=41, power_milliwatts=61_500),
            second: GpuSample(second, error="GPU is lost", lost=True),
        }
        observer = Observer(
            world.node,
            observer_of(world).identity,
            world.clock,
            totals=world.billing.totals,
            gpu_samples=lambda: figures,
        )
        health = AgentHealth(
            store_ok=True, pending_windows=0, merged_windows=0, unmatched_ends=0, scheduler_connected=None
        )
        text = AgentMetrics(observer, lambda: health, {(second, 79): 2}).render().decode()
        assert {
            f'hibernode_gpu_memory_used_bytes{{gpu="{first}"}} 1.073741824e+09',
            f'hibernode_gpu_sm_utilization_ratio{{gpu="{first}"}} 0.0',
            f'hibernode_gpu_temperature_celsius{{gpu="{first}"}} 41.0',
            f'hibernode_gpu_power_watts{{gpu="{first}"}} 61.5',
            f'hibernode_gpu_lost{{gpu="{second}"}} 1.0',
            f'hibernode_gpu_xid_events_total{{code="79",gpu="{second}"}} 2.0',
        } <= set(text.splitlines())
        assert "hibernode_gpu_encoder_utilization_ratio{" not in text
        assert f'hibernode_gpu_memory_used_bytes{{gpu="{second}"}}' not in text
