"""The provisioner with agents that answer as a test wants, on a clock that a test moves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from google.protobuf.message import Message

from agent.core.dispatch.events import Event
from agent.core.errors import HibernodeError
from agent.core.types import SECOND_NS, StopCause
from agent.event_log import REPEAT_NS, EventLog
from agent.scheduler.database.store import Store
from agent.scheduler.fleet.agent_channels import AgentChannels
from agent.scheduler.fleet.fleet import Fleet
from agent.scheduler.fleet.node_scheduling import NodeScheduling
from agent.scheduler.functions.catalog import Catalog
from agent.scheduler.functions.deploy_rules import Defaults
from agent.scheduler.functions.gpu_check import GpuCheck
from agent.scheduler.functions.provisioner import Provisioner
from agent.v1.function_service_pb2 import DeployFunctionRequest
from agent.v1.instance_service_pb2 import CreateInstanceRequest, CreateInstanceResponse, StopInstanceRequest
from agent.v1.scheduler_service_pb2 import InstanceLoad, NodeLoad, Registration, ReportLoadRequest
from agent.v1.types_pb2 import FunctionSpec, Gpu, HostMemory, Instance, Node
from agent.wire.convert_enums import stop_cause_from_proto
from agent.wire.convert_time import time_to_proto
from tests.fakes.clock import FakeClock

FAILED, RUNNING = Instance.STATE_FAILED, Instance.STATE_RUNNING
Answer = Callable[[str], Instance]


@dataclass
class Agent:
    """A node and what its agent reports."""

    name: str
    gpus: int = 2
    labels: dict[str, str] = field(default_factory=dict)
    loads: dict[str, InstanceLoad] = field(default_factory=dict)
    stream: int = 0
    sequence: int = 0
    silent: bool = False


class ProvisionerRig:
    """A node n1 with two GPUs; `join` adds others. `answer` decides what a create gives, `drains` what a stop does:
    with it an instance goes on as STOPPING until `ended`."""

    def __init__(self, store: Store) -> None:
        self.clock = FakeClock()
        self.events: list[Event] = []
        self.creates: list[str] = []
        self.places: list[str] = []
        self.stops: list[str] = []
        self.graces: list[int] = []
        self.causes: list[StopCause] = []
        self.stop_error: HibernodeError | None = None
        self.drains = False
        self.comes_up = True
        self.answer: Answer = self.running
        self.event_log = EventLog(self.clock, repeat_ns=REPEAT_NS)
        self.fleet = Fleet(self.clock, self.event_log, self.events.append, lambda: None, 3 * SECOND_NS, 10 * SECOND_NS)
        self.catalog = Catalog(
            self.clock, self.event_log, store, self.events.append, lambda: None, Defaults(), GpuCheck(self.fleet)
        )
        self.scheduling = NodeScheduling(store, self.fleet, self.event_log)
        channels = cast(AgentChannels, SimpleNamespace(channel=self._channel))
        self.provisioner = Provisioner(
            self.clock, self.event_log, self.catalog, self.fleet, channels, self.events.append
        )
        self.agents: dict[str, Agent] = {}
        self.asked = ""
        self.memory = HostMemory()
        self.join("n1")

    @property
    def loads(self) -> dict[str, InstanceLoad]:
        """What n1 reports."""
        return self.agents["n1"].loads

    def join(self, name: str, gpus: int = 2, **labels: str) -> Agent:
        """Register a node without instances."""
        agent = self.agents[name] = Agent(name, gpus, labels)
        agent.stream = self.fleet.stream_opened(name)
        self.report()
        return agent

    def _channel(self, node: str) -> object:
        async def call(method: object, request: Any, timeout_s: float) -> object:
            return self._call(self.agents[node], request)

        return SimpleNamespace(instances=SimpleNamespace(CreateInstance=None, StopInstance=None), call=call)

    def _call(self, agent: Agent, request: Any) -> object:
        if isinstance(request, StopInstanceRequest):
            self.stops.append(request.uid)
            self.graces.append(request.grace_ns)
            self.causes.append(stop_cause_from_proto(request.cause))
            if self.stop_error is not None:
                raise self.stop_error
            if self.drains:
                agent.loads[request.uid].state = Instance.STATE_STOPPING
            else:
                agent.loads.pop(request.uid, None)
            return None
        assert isinstance(request, CreateInstanceRequest)
        self.creates.append(request.request_id)
        self.places.append(agent.name)
        self.asked = agent.name
        return CreateInstanceResponse(instance=self.answer(request.request_id))

    def running(self, request_id: str) -> Instance:
        """An instance that is reported as running, or as starting if none comes up, on the node's emptiest GPU."""
        agent = self.agents[self.asked]
        used = [uuid for load in agent.loads.values() for uuid in load.gpu_uuids]
        gpus = [f"{agent.name}-g{n}" for n in range(agent.gpus)]
        uid = f"i{len(self.creates)}"
        state = RUNNING if self.comes_up else Instance.STATE_STARTING
        agent.loads[uid] = InstanceLoad(
            uid=uid,
            function=request_id.partition("/")[0],
            request_id=request_id,
            state=state,
            healthy=True,
            gpu_uuids=[min(gpus, key=used.count)],
        )
        return Instance(uid=uid, state=Instance.STATE_STARTING)

    def report(self) -> None:
        """Every agent that is not silent says all it has."""
        for agent in self.agents.values():
            if not agent.silent:
                self._report(agent)

    def _report(self, agent: Agent) -> None:
        agent.sequence += 1
        message = ReportLoadRequest(
            epoch=1, sequence=agent.sequence, snapshot=True, load=NodeLoad(state=Node.STATE_READY)
        )
        message.registration.CopyFrom(
            Registration(
                ingress_address="127.0.0.1:1",
                grpc_address="127.0.0.1:2",
                gpus=[Gpu(uuid=f"{agent.name}-g{n}", health=Gpu.HEALTH_OK) for n in range(agent.gpus)],
                instances_per_gpu=1,
                runtimes=["process"],
                labels=agent.labels,
                host_memory=self.memory,
            )
        )
        message.instances.extend(agent.loads.values())
        self.fleet.receive(agent.name, agent.stream, message)

    def come_up(self) -> None:
        """What was starting runs, and so will what is created from now on."""
        self.comes_up = True
        for agent in self.agents.values():
            for load in agent.loads.values():
                if load.state == Instance.STATE_STARTING:
                    load.state = RUNNING

    def ended(self, uid: str) -> None:
        """An instance is gone."""
        for agent in self.agents.values():
            agent.loads.pop(uid, None)

    def uids(self, name: str = "n1") -> set[str]:
        return set(self.agents[name].loads)

    def reason(self, function: str = "ocr") -> str:
        """Why the function has fewer instances than wanted; "" if nothing is known to be wrong."""
        problem = self.catalog.problem(function)
        return "" if problem is None else problem.reason

    async def deploy(self, target: int = 1, **spec: object) -> None:
        message = FunctionSpec(name="ocr", entrypoint=["app"])
        for name, value in spec.items():
            if isinstance(value, dict):
                getattr(message, name).update(value)
            elif isinstance(value, Message):
                getattr(message, name).CopyFrom(value)
            elif isinstance(value, list):
                getattr(message, name).extend(value)
            else:
                setattr(message, name, value)
        await self.catalog.deploy(DeployFunctionRequest(spec=message, target=target))

    async def round(self, seconds: float = 0) -> None:
        """Let time pass, hear the agents, decide, and let what was begun end."""
        self.clock.advance(int(seconds * SECOND_NS))
        self.report()
        await self.provisioner.round()
        for _ in range(10):
            await asyncio.sleep(0)

    async def rounds(self, count: int, seconds: float = 0) -> None:
        for _ in range(count):
            await self.round(seconds)


def fails(rig: ProvisionerRig, reason: str, age_s: int = 0) -> Answer:
    def answer(request_id: str) -> Instance:
        made = time_to_proto(rig.clock.wall_ns() - age_s * SECOND_NS)
        uid = f"dead-{request_id}"
        return Instance(uid=uid, state=FAILED, state_reason=reason, state_message="no", create_time=made)

    return answer


def raises(error: HibernodeError) -> Answer:
    def answer(request_id: str) -> Instance:
        raise error

    return answer
