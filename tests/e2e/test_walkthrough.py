"""Function Compute's walkthrough of real-time inference, step by step, on one host.

Deploy its s.yaml, invoke with curl, put its scaling policy, load until it scales out, idle until it scales in, list,
and release everything. Differences from the page: the image (the host runs the example `echo`), the dates of the
policy, and seconds in place of minutes.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.stack import Stack, running_stack, until

FC3 = Path(__file__).parents[1] / "cli" / "fc3"
NAME = "gpu-porn-detection"
SCALING = {"scaling": {"period": "1s", "periods": 2}}
WORK_MS = 200


class Walk:
    """The page's commands, run as programs."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.folder = stack.folder

    def write_s_yaml(self) -> None:
        """Write the page's s.yaml with another image."""
        document = yaml.safe_load((FC3 / "gpu-best-practice.s.yaml").read_text())
        props = document["resources"]["gpu-best-practive"]["props"]
        props["customContainerConfig"] = {
            "image": "host",
            "entrypoint": [sys.executable, "-m", "agent.examples.echo"],
            "port": 9000,
        }
        del props["environmentVariables"]  # /dev/shm exists in a container only
        props["memorySize"] = 512
        props["hibernode"] = {"freezeAfter": "200ms"}
        (self.folder / "s.yaml").write_text(yaml.safe_dump(document, sort_keys=False))

    def write_policy(self, *, now: bool) -> Path:
        """Write the page's policy; `now`: with current dates."""
        document = json.loads((FC3 / "provision.json").read_text())
        path = self.folder / ("provision-now.json" if now else "provision.json")
        if now:
            today = datetime.now(UTC)
            policy = document["targetTrackingPolicies"][0]
            policy["startTime"] = (today - timedelta(days=1)).strftime("%Y-%m-%dT%H:%M:%S.000Z")
            policy["endTime"] = (today + timedelta(days=30)).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        path.write_text(json.dumps(document, indent=2))
        return path

    async def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `hibernode ...` in the folder of the s.yaml."""
        command = [sys.executable, "-m", "agent.cli.main", *arguments]
        environment = {**self.stack.environment, "HIBERNODE_HOME": str(self.folder), "PYTHONPATH": str(Path.cwd())}
        return await asyncio.to_thread(
            subprocess.run, command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=90
        )

    async def curl(self, url: str) -> str:
        command = ["curl", "-sS", url, "-H", "Content-Type: text/plain", "--data", "Nice to meet you"]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    async def put(self, path: Path) -> subprocess.CompletedProcess[str]:
        return await self.run(
            "provision", "put", "--target", "1", "--targetTrackingPolicies", f"./{path.name}", "--qualifier", "LATEST",
            "-t", "s.yaml", "-a", "default",
        )  # fmt: skip

    async def listed(self) -> dict[str, Any]:
        """The function in `provision list`, {} if it is missing."""
        done = await self.run("provision", "list", "--output", "yaml")
        assert done.returncode == 0, done.stderr
        shown = yaml.safe_load(done.stdout) or {}
        return dict(shown[NAME][0]) if shown else {}

    async def until_listed(self, what: str, **wanted: object) -> dict[str, Any]:
        found: dict[str, Any] = {}

        async def reached() -> bool:
            nonlocal found
            found = await self.listed()
            return all(found.get(key) == value for key, value in wanted.items())

        try:
            await until(what, reached)
        except AssertionError as error:
            raise AssertionError(f"{error}: {found}\n{self.stack.log_of('scheduler')[-3000:]}") from None
        return found


class Load:
    """A constant number of concurrent requests until it is stopped."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self.answered = 0
        self.failed: list[str] = []

    @asynccontextmanager
    async def running(self, at_once: int) -> AsyncIterator[None]:
        stop = asyncio.Event()

        async def one() -> None:
            while not stop.is_set():
                answer = await self._stack.ask(NAME, f"/sleep?ms={WORK_MS}")
                self.answered += 1
                if answer.status != 200:
                    self.failed.append(f"{answer.status}: {answer.body[:200]!r}")

        tasks = [asyncio.create_task(one()) for _ in range(at_once)]
        try:
            yield
        finally:
            stop.set()
            await asyncio.gather(*tasks)


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_function_compute_walkthrough() -> None:
    async with running_stack(
        "--gpus", "6", "--gib", "16", "--profile", "580",
        scheduler_settings=SCALING,
        gpu_settings={"types": {"fc.gpu.tesla.1": "Emulated T4"}, "instances_per_gpu": 1},
    ) as stack:  # fmt: skip
        walk = Walk(stack)
        walk.write_s_yaml()

        deployed = await walk.run("deploy", "--skip-push", "true", "-t", "s.yaml", "--wait")
        assert deployed.returncode == 0, deployed.stderr
        url = deployed.stdout.strip()
        assert await walk.curl(f"{url}invoke") == "Nice to meet you"

        ended = await walk.put(walk.write_policy(now=False))
        assert ended.returncode == 0, ended.stderr
        assert "window ended" in ended.stderr
        assert (await walk.until_listed("the target stays", current=1))["target"] == 1

        put = await walk.put(walk.write_policy(now=True))
        assert put.returncode == 0, put.stderr
        found = await walk.until_listed("its least capacity at once", target=2, current=2)
        assert found["decidedBy"] == "scaling-policy-demo"
        (policy,) = found["targetTrackingPolicies"]
        assert (policy["minCapacity"], policy["maxCapacity"], policy["metricTarget"]) == (2, 30, 0.3)
        assert {"functionName", "qualifier", "resource", "scheduledActions", "currentError"} <= found.keys()

        load = Load(stack)
        async with load.running(at_once=4):
            # It ends at six GPUs, one per instance, and reports the reason.
            found = await walk.until_listed("as many as there is room for", current=6)
            assert found["target"] > 6
            assert "has its full number of instances" in found["currentError"]
        await walk.until_listed("back at its least capacity", target=2, current=2)
        assert not load.failed
        assert load.answered > 20

        released = await walk.run("provision", "put", "--target", "0", "--qualifier", "LATEST", "-t", "s.yaml")
        assert released.returncode == 0, released.stderr

        async def nothing_left() -> bool:
            return not await stack.instances()

        await until("everything is released", nothing_left)
        assert await walk.listed() == {}, "nothing is provisioned any more"
        gone = await stack.ask(NAME, "/invoke", method="POST", data=b"Nice to meet you")
        assert gone.status == 503
        await stack.remove_functions([NAME])
