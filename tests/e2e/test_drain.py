"""A node is drained for maintenance and used again under load, without a failed request."""

from __future__ import annotations

import asyncio
import sys

import pytest

from tests.e2e.fleet_load import Clients, chat, jobs, ocr
from tests.e2e.fleet_world import Fleet, running_fleet, why_not
from tests.e2e.stack import until

TARGETS = {"ocr": 2, "chat": 2}
SEED = 7

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.alone]


@pytest.fixture(autouse=True)
def _namespaces() -> None:
    if reason := why_not():
        pytest.skip(reason)


async def hibernode(fleet: Fleet, *arguments: str) -> tuple[int, str]:
    """Run an operator's command; returns exit code and output."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "agent.cli.main", "--home", str(fleet.hub.folder), "--insecure", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(60):
        out, _ = await process.communicate()
    return process.returncode or 0, out.decode()


async def on(fleet: Fleet, node: str) -> set[str]:
    """The node's instances, from its agent."""
    return {one.uid for one in await fleet.nodes[node].instances()}


@pytest.mark.timeout(180)
async def test_node_is_drained_under_load_and_used_again() -> None:
    async with running_fleet("gpu-1", "gpu-2") as fleet:
        log = fleet.hub.folder / "requests.log"
        log.touch()
        log.chmod(0o666)
        await fleet.deploy(ocr(log), TARGETS["ocr"])
        await fleet.deploy(chat(log), TARGETS["chat"])
        await fleet.wait_until_complete(TARGETS)
        first = await on(fleet, "gpu-1")
        assert first, "instances are spread"
        clients = Clients(fleet)
        load = asyncio.create_task(clients.run(jobs(tuple(TARGETS), SEED)))

        async def busy() -> bool:
            return any(one.in_flight for one in await fleet.nodes["gpu-1"].instances())

        await until("a request is inside gpu-1", busy)
        code, said = await hibernode(fleet, "node", "drain", "gpu-1", "--wait", "--timeout", "50s")
        assert code == 0, said
        assert "gpu-1 is drained" in said
        assert await on(fleet, "gpu-1") == set()
        await fleet.wait_until_complete(TARGETS)
        assert len(await on(fleet, "gpu-2")) == sum(TARGETS.values())

        code, said = await hibernode(fleet, "node", "uncordon", "gpu-1")
        assert code == 0, said
        code, said = await hibernode(fleet, "node", "drain", "gpu-2", "--wait", "--timeout", "50s")
        assert code == 0, said
        again = await on(fleet, "gpu-1")
        assert len(again) == sum(TARGETS.values())
        assert not again & first, "an instance that was drained is gone"
        load.cancel()
        await clients.finish()
        assert not [one for one in clients.records if not one.served]
        served = {one.instance for one in clients.records}
        assert served & first
        await fleet.remove_functions(list(TARGETS))
