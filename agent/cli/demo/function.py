"""A function in a private world: deploy it, wait until it is ready, wait until its instances are frozen."""

from __future__ import annotations

from typing import Any

from agent.cli.commands.ps import list_instances, state_of
from agent.cli.demo.processes import comes_true
from agent.cli.demo.world import CALL_S, DemoWorld
from agent.core.errors import DeadlineError, UnavailableError
from agent.v1 import function_service_pb2, types_pb2

DEPLOY_S, SETTLE_S = 60.0, 30.0


class WorldFunction:
    """The function `name`; `scheduler` is a channel to the world's scheduler, `agent` one to its agent."""

    def __init__(self, world: DemoWorld, name: str, agent: Any, scheduler: Any) -> None:
        self._world = world
        self._name = name
        self._agent = agent
        self._scheduler = scheduler

    async def deploy(self, s_yaml: str, instances: int) -> None:
        from agent.cli.commands.deploy import deploy_request
        from agent.cli.fc3.load import load_s_yaml

        path = self._world.home / f"{self._name}.s.yaml"
        path.write_text(s_yaml)
        (deployment,) = load_s_yaml(path)
        await self._scheduler.call(
            self._scheduler.functions.DeployFunction, deploy_request(deployment, instances), CALL_S
        )

    async def wait_until_ready(self, deadline_s: float = DEPLOY_S) -> None:
        """Raises DeadlineError DEMO_DEPLOY_TIMEOUT, UnavailableError with the reason of a function that fails."""

        async def ready() -> bool:
            self._world.processes.check()
            request = function_service_pb2.GetFunctionRequest(name=self._name)
            found = (await self._scheduler.call(self._scheduler.functions.GetFunction, request, CALL_S)).function
            if found.state == function_service_pb2.Function.STATE_DEGRADED:
                raise UnavailableError(found.current_error_reason or "DEMO_DEPLOY_FAILED", found.current_error)
            return bool(found.state == function_service_pb2.Function.STATE_READY)

        if not await comes_true(ready, deadline_s):
            raise DeadlineError("DEMO_DEPLOY_TIMEOUT", f"{self._name} is not ready after {deadline_s:g} s")

    async def wait_until_frozen(self, deadline_s: float = SETTLE_S) -> None:
        """Raises DeadlineError DEMO_NOT_ASLEEP."""
        states: list[str] = []

        async def all_frozen() -> bool:
            self._world.processes.check()
            states[:] = [state_of(one) for one in await self.instances()]
            return bool(states) and all(state == "FROZEN" for state in states)

        if not await comes_true(all_frozen, deadline_s):
            text = f"not all instances are frozen after {deadline_s:g} s without a request: {', '.join(states)}"
            raise DeadlineError("DEMO_NOT_ASLEEP", text)

    async def instances(self, *, ended: bool = False) -> list[types_pb2.Instance]:
        return await list_instances(self._agent, self._name, include_ended=ended)
