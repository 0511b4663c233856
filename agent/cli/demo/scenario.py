"""The demo's scenario: deploys the example, sends files to identify, lets instances freeze and wake in between."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.cli.commands.ps import list_instances, state_of
from agent.cli.demo.client import DemoClient, Tally
from agent.cli.demo.files import Sample, pick_samples
from agent.cli.demo.function import SETTLE_S, WorldFunction
from agent.cli.demo.processes import comes_true
from agent.cli.demo.timeline import Timeline
from agent.cli.demo.world import CALL_S, DemoWorld, WorldProgram
from agent.core.errors import DeadlineError
from agent.core.types import SECOND_NS
from agent.v1 import instance_service_pb2, scheduler_service_pb2, types_pb2
from agent.wire.convert_time import time_from_proto

FUNCTION = "filetype"
PROGRAM = WorldProgram(sys.executable, ("agent.examples.http_app", "magika.types"))
INSTANCES = 3
SAMPLES = 24
FREEZE_AFTER = "800ms"
LENDING_ROUND = 2
WAKE_S = 20.0
HOLD_NS = 5 * SECOND_NS
FLIPPED_BYTE = 2_000_007
"""Offset of the exponent of a weight of the model."""


@dataclass(frozen=True, slots=True)
class Pace:
    """`rounds`: files sent at once in each round. `sleep_s`: idle time before each round."""

    rounds: tuple[int, ...] = (1, 3, 12, 1, 24, 2, 6, 1)
    sleep_s: float = 1.2


QUICK = Pace((1, 3, 4, 2), 0.1)
"""For tests: each kind of round once."""


class Scenario:
    """One run of the demo; `tally` has its counts."""

    def __init__(self, world: DemoWorld, timeline: Timeline, pace: Pace, *, flip_byte: bool) -> None:
        self._world = world
        self._timeline = timeline
        self._pace = pace
        self._flip_byte = flip_byte
        self.tally = Tally()
        self.samples: list[Sample] = []
        self._turn = 0

    async def run(self) -> None:
        """Deploys the example and runs the rounds; all instances are frozen at the end. Raises HibernodeError."""
        async with self._world.agent() as agent, self._world.scheduler() as scheduler:
            picking = asyncio.create_task(asyncio.to_thread(pick_samples, SAMPLES))
            function = WorldFunction(self._world, FUNCTION, agent, scheduler)
            self._timeline.step(f"deploying {FUNCTION} (a real model) with {INSTANCES} instances on 2 GPUs")
            await function.deploy(s_yaml(self._world.request_log), INSTANCES)
            watching = asyncio.create_task(self._timeline.follow(agent))
            try:
                await function.wait_until_ready()
                self.samples = await picking
                await self._rounds(agent, scheduler, function)
                await self._timeline.catch_up(agent)
            finally:
                picking.cancel()
                watching.cancel()
                await asyncio.gather(watching, picking, return_exceptions=True)

    # ---- rounds -------------------------------------------------------------------------------------------------

    async def _rounds(self, agent: Any, scheduler: Any, function: WorldFunction) -> None:
        client = DemoClient(self._world.gateway, FUNCTION, self.tally, self._timeline.trouble, self._timeline.alias)
        try:
            await function.wait_until_frozen()
            for number, count in enumerate(self._pace.rounds):
                await asyncio.sleep(self._pace.sleep_s)  # without requests, the instances freeze
                if self._flip_byte and number == len(self._pace.rounds) // 2:
                    await self._flip(agent)
                await self._round(agent, client, count)
                if number == LENDING_ROUND:
                    await self._lend(agent)
                await function.wait_until_frozen()
            await self._each_alone(agent, scheduler, client)
        finally:
            client.close()

    async def _round(self, agent: Any, client: DemoClient, count: int) -> None:
        chosen = [self.samples[(self._turn + index) % len(self.samples)] for index in range(count)]
        self._turn += count
        woken = len(self.tally.wake_request_ms)
        answers = await asyncio.gather(*(client.identify(sample) for sample in chosen))
        wakes = self.tally.wake_request_ms[woken:]
        await self._timeline.catch_up(agent)
        self._timeline.requests([(sample.path, answer) for sample, answer in zip(chosen, answers, strict=True)], wakes)

    async def _lend(self, agent: Any) -> None:
        """Wakes a third instance while two hold both GPUs, so that an idle one must release its GPU."""
        frozen = [one.uid for one in await self.instances(agent) if state_of(one) == "FROZEN"]
        if not frozen:
            return
        alias = self._timeline.alias(frozen[0])
        self._timeline.step(f"waking {alias} while both GPUs are held: an idle instance must release one")
        request = instance_service_pb2.WakeInstanceRequest(uid=frozen[0])
        await agent.call(agent.instances.WakeInstance, request, CALL_S)

    async def _wait_until_known_awake(self, scheduler: Any, uid: str) -> None:
        """Waits until the scheduler knows of a wake by the agent; before, it might wake another instance."""

        async def alone() -> bool:
            request = scheduler_service_pb2.ListFleetInstancesRequest(function=FUNCTION)
            found = (await scheduler.call(scheduler.scheduler.ListFleetInstances, request, CALL_S)).instances
            return {one.uid for one in found if state_of(one) == "RUNNING"} == {uid}

        if not await comes_true(alone, SETTLE_S):
            text = f"the scheduler does not see {self._timeline.alias(uid)} alone awake after {SETTLE_S:g} s"
            raise DeadlineError("DEMO_NOT_ALONE", text)

    async def _each_alone(self, agent: Any, scheduler: Any, client: DemoClient) -> None:
        """Wakes every instance alone and checks all of its memory, independent of what the dispatcher chose before."""
        self._timeline.step("waking each instance alone to check every byte of its GPU memory")
        for number, one in enumerate(await self.instances(agent)):
            wake = instance_service_pb2.WakeInstanceRequest(uid=one.uid, hold_ns=HOLD_NS)
            await agent.call(agent.instances.WakeInstance, wake, WAKE_S)
            await self._wait_until_known_awake(scheduler, one.uid)
            sample = self.samples[number % len(self.samples)]
            answer = await client.identify(sample, by=one.uid)
            intact = await client.verify(by=one.uid)
            await self._timeline.catch_up(agent)
            if answer == sample.expected and intact:
                self._timeline.step(f"{self._timeline.alias(one.uid)}: every byte is unchanged")
            freeze = instance_service_pb2.FreezeInstanceRequest(uid=one.uid)
            await agent.call(agent.instances.FreezeInstance, freeze, WAKE_S)

    async def instances(self, agent: Any, *, ended: bool = False) -> list[types_pb2.Instance]:
        """The example's instances of this run: a folder that was used before also remembers those of earlier runs."""
        began_ns = self._timeline.began_ns
        found = await list_instances(agent, FUNCTION, include_ended=ended)
        return [one for one in found if time_from_proto(one.create_time) >= began_ns]

    async def _flip(self, agent: Any) -> None:
        """Rehearses memory corruption by changing a byte of a frozen instance's GPU memory. It must be detected."""
        from agent.emulated.control import EmulatedDriver

        victim = (await self.instances(agent))[0]
        with EmulatedDriver(self._world.home / "emulated") as driver:
            driver.flip_byte(victim.pid, offset=FLIPPED_BYTE)
        self._timeline.step(f"rehearsal: one byte of frozen {self._timeline.alias(victim.uid)}'s GPU memory is flipped")


def s_yaml(request_log: Path) -> str:
    """The example's s.yaml."""
    return f"""\
# The demo's function. To deploy it again, changed or under another name:
#   hibernode deploy -t THIS_FILE
edition: 3.0.0
name: hibernode-demo
resources:
  {FUNCTION}:
    component: fc3
    props:
      functionName: {FUNCTION}
      region: local
      runtime: custom-container
      cpu: 1
      memorySize: 1024
      timeout: 30
      instanceConcurrency: 1
      gpuConfig: {{gpuType: fc.gpu.ada.1, gpuMemorySize: 4096}}
      customContainerConfig:
        image: host
        entrypoint: [{json.dumps(sys.executable)}, "-m", "agent.examples.filetype"]
      environmentVariables:
        REQUEST_LOG: {json.dumps(str(request_log))}
        VRAM_MIB: "8"
      instanceLifecycleConfig:
        initializer: {{handler: index.initialize, timeout: 60}}
      provisionConfig: {{defaultTarget: {INSTANCES}, alwaysAllocateGPU: false}}
      triggers:
        - {{triggerName: http, triggerType: http, triggerConfig: {{authType: anonymous}}}}
      hibernode: {{freezeAfter: {FREEZE_AFTER}}}
"""
