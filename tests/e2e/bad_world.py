"""One running stack shared by many tests of bad input; after the last one, nothing may be left."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.core.types import FunctionSpec
from agent.v1 import function_service_pb2 as functions_pb
from agent.v1 import instance_service_pb2 as instances_pb
from agent.v1 import types_pb2
from agent.wire.convert_function import function_to_proto
from tests.e2e.stack import CALL_S, Answer, Stack, running_stack, until

HIBERNODE = Path(sys.executable).with_name("hibernode")
ENDED = (types_pb2.Instance.STATE_STOPPED, types_pb2.Instance.STATE_FAILED)


@dataclass
class BadInputStack:
    """A stack with shortcuts for these tests."""

    stack: Stack

    async def deploy(self, spec: FunctionSpec) -> None:
        """Deploy with a target of one instance, without waiting for it."""
        async with self.stack.channel("scheduler") as channel:
            message = function_to_proto(spec, reveal_secrets=True)
            request = functions_pb.DeployFunctionRequest(spec=message, target=1)
            await channel.call(channel.functions.DeployFunction, request, CALL_S)

    async def functions(self) -> dict[str, functions_pb.Function]:
        async with self.stack.channel("scheduler") as channel:
            answer = await channel.call(channel.functions.ListFunctions, functions_pb.ListFunctionsRequest(), CALL_S)
            return {function.name: function for function in answer.functions}

    async def alive(self) -> list[types_pb2.Instance]:
        """Instances that have not ended."""
        return [one for one in await self.remembered() if one.state not in ENDED]

    async def remembered(self) -> list[types_pb2.Instance]:
        """All instances that the node lists, including recently ended ones."""
        async with self.stack.channel("agent") as channel:
            request = instances_pb.ListInstancesRequest(include_ended=True)
            return list((await channel.call(channel.instances.ListInstances, request, CALL_S)).instances)

    async def instance(self, function: str) -> types_pb2.Instance:
        """The only living instance of `function`."""
        found = [one for one in await self.alive() if one.function == function]
        assert len(found) == 1, found
        return found[0]

    async def until_inside(self, function: str, count: int) -> None:
        """Wait until `count` requests are in the instance and none waits at its gate."""

        async def inside() -> bool:
            one = await self.instance(function)
            return one.in_flight == count and not one.waiting

        await until(f"{count} requests inside {function}", inside, 15.0)

    def ask_later(self, function: str, path: str) -> asyncio.Task[Answer]:
        return asyncio.create_task(self.stack.ask(function, path))

    def endpoint(self, daemon: str, name: str) -> str:
        return str(json.loads((self.stack.folder / daemon / "endpoints.json").read_text())[name])

    def hibernode(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command line with this stack as its home."""
        environment = {**self.stack.environment, "HIBERNODE_HOME": str(self.stack.folder)}
        command = [str(HIBERNODE), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    async def check_nothing_left(self) -> None:
        """Check that no request waits or holds a slot; then delete the functions and check that nothing is left."""

        async def quiet() -> bool:
            queued = [name for name, function in (await self.functions()).items() if function.queued]
            busy = [one.uid for one in await self.alive() if one.in_flight or one.waiting]
            return not queued and not busy

        await until("queues and gates are empty", quiet, 15.0)
        await self.stack.remove_functions(list(await self.functions()))
        assert not self.stack.leftovers()

        async def gpus_free() -> bool:
            return not any(list(gpu.holder_uids) for gpu in (await self.stack.node()).gpus)

        await until("every GPU is free in the book", gpus_free, 35.0)
        node = await self.stack.node()
        assert not any(gpu.cordoned_reason for gpu in node.gpus)
        with self.stack.driver() as driver:
            assert driver.processes() == []
            assert all(device.used_bytes == 0 for device in driver.devices())
            assert driver.frozen_calls() == 0


@asynccontextmanager
async def running_world(gpus: int, agent_settings: dict[str, Any] | None = None) -> AsyncIterator[BadInputStack]:
    async with running_stack("--gpus", str(gpus), "--gib", "1", agent_settings=agent_settings) as stack:
        world = BadInputStack(stack)
        yield world
        await world.check_nothing_left()
