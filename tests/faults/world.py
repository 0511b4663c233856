"""One agent on one emulated host for the whole fault matrix: real processes, short timeouts, no scheduler.

A case creates an instance (or reuses the previous case's), brings it to the state where the fault applies, sends a
request that has to wait for it, and checks the outcome.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import aiohttp
import psutil

from agent.adapters.daemon.token_file import read_token
from agent.adapters.kernel import cgroup
from agent.core.errors import HibernodeError
from agent.core.types import SECOND_NS
from agent.emulated.control import EmulatedDriver
from agent.examples.echo.__main__ import expected_answer
from agent.v1 import instance_service_pb2 as pb
from agent.v1 import types_pb2
from agent.wire.convert_function import function_to_proto
from tests.e2e.stack import Stack, echo, running_stack, until

ANSWER_DEADLINE_S = 20.0
"""No fault may delay a request longer: the sum of the short timeouts below, twice, plus room for a busy machine."""

SHORT = {
    "lock_timeout": "200ms",
    "operation_timeout": "1s",
    "release_timeout": "3s",
    "frozen_memory_limit": "32MiB",
}
STATE = types_pb2.Instance.State
AWAKE_OR_ASLEEP = (STATE.STATE_RUNNING, STATE.STATE_FROZEN)
Plan = Callable[["FaultWorld", str], Awaitable[None]]
"""Applies a fault to the instance of this uid."""


@dataclass(frozen=True)
class Reply:
    """Outcome of the waiting request: `answered` correctly, `refused` before any byte reached the instance (the gateway
    retries elsewhere), or something else, which no fault may cause."""

    how: str
    detail: str = ""


@dataclass
class FaultWorld:
    """The agent and its instances. `stack` only manages processes and channels."""

    stack: Stack
    driver: EmulatedDriver
    http: aiohttp.ClientSession
    ingress: str
    token: str
    number: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    follow_ups: list[asyncio.Task[None]] = field(default_factory=list)
    _frozen_ancestor: Path | None = None

    # ---- preparing the instance -------------------------------------------------------------------------------------

    async def awake(self, environment: dict[str, str]) -> str:
        """The uid of a running, idle instance with this environment; created if there is none."""
        living = [one for one in await self.stack.instances() if one.state in AWAKE_OR_ASLEEP]
        if living and environment == self.environment:
            (instance,) = living
            async with self.stack.channel("agent") as channel:
                await channel.call(channel.instances.WakeInstance, pb.WakeInstanceRequest(uid=instance.uid), 20.0)
            return str(instance.uid)
        for instance in living:
            await self._stop(instance.uid)
        return await self._create(environment)

    async def _stop(self, uid: str) -> None:
        async with self.stack.channel("agent") as channel:
            await channel.call(channel.instances.StopInstance, pb.StopInstanceRequest(uid=uid, force=True), 20.0)

    async def _create(self, environment: dict[str, str]) -> str:
        self.number += 1
        spec = echo(f"ocr-{self.number}", None, **self._resolved(environment))
        if "SECOND" in environment:
            spec = replace(spec, entrypoint=(sys.executable, "-m", "tests.faults.two_processes"))
        spec = replace(spec, idle=replace(spec.idle, freeze_after_ns=600 * SECOND_NS))
        async with self.stack.channel("agent") as channel:
            request = pb.CreateInstanceRequest(
                request_id=f"fault-{self.number}", spec=function_to_proto(spec, reveal_secrets=True), wait=True
            )
            made = (await channel.call(channel.instances.CreateInstance, request, 30.0)).instance
        assert made.state == STATE.STATE_RUNNING, made
        self.environment = environment
        return str(made.uid)

    def _resolved(self, environment: dict[str, str]) -> dict[str, str]:
        told = {"SECOND": str(self.second_told)} if environment.get("SECOND") == "when told" else {}
        return {**environment, **told, "PYTHONPATH": str(Path(__file__).parents[2])}

    @property
    def second_told(self) -> Path:
        """The file that starts the newest instance's second process."""
        return self.stack.folder / f"second-{self.number}"

    async def asleep(self, environment: dict[str, str]) -> str:
        """The uid of a frozen instance."""
        uid = await self.awake(environment)
        assert await self.freeze(uid) == "", "the freeze before the fault"
        return uid

    async def freeze(self, uid: str) -> str:
        """Request a freeze and wait for its end; "" or why it failed."""
        async with self.stack.channel("agent") as channel:
            try:
                await channel.call(channel.instances.FreezeInstance, pb.FreezeInstanceRequest(uid=uid), 20.0)
            except HibernodeError as error:
                return error.message
        return ""

    async def struck(self, fault: int | None = None) -> None:
        """Wait until this fault (None: every planned one) has occurred; used-up faults are no longer listed."""

        async def hit() -> bool:
            due = [one for one in self.driver.faults() if one.times == 1 and fault in (None, one.id)]
            return all(one.hits for one in due)

        await until("the fault strikes", hit, 10.0)

    def once_struck(self, fault: int, follow_up: Callable[[], None]) -> None:
        """Call `follow_up` once the planned fault has occurred."""

        async def wait() -> None:
            await self.struck(fault)
            follow_up()

        self.follow_ups.append(asyncio.create_task(wait()))

    # ---- faults of the host -----------------------------------------------------------------------------------------

    def pause(self, uid: str) -> None:
        """An external `docker pause`, followed by an unpause."""
        cgroup.write_freeze(self.cgroup_of(uid), frozen=True)
        loop = asyncio.get_running_loop()
        loop.call_later(1.5, lambda: cgroup.write_freeze(self.cgroup_of(uid), frozen=False))  # longer than a freeze

    def pause_for_good(self, uid: str) -> None:
        """An external `docker pause` without an unpause."""
        cgroup.write_freeze(self.cgroup_of(uid), frozen=True)

    def freeze_ancestor(self, uid: str) -> None:
        """Freeze the slice of all instances from outside."""
        cgroup.write_freeze(self.cgroup_of(uid).parent, frozen=True)
        self._frozen_ancestor = self.cgroup_of(uid).parent

    def kill_instance(self, uid: str) -> None:
        """Kill the instance, like the OOM killer or an operator."""
        for pid in cgroup.procs(self.cgroup_of(uid)):
            os.kill(pid, signal.SIGKILL)

    def blind_nvml(self, _uid: str) -> None:
        """Let NVML answer NVML_ERROR_UNKNOWN for every GPU."""
        for device in self.driver.devices():
            self.driver.set_device(device.uuid, nvml_error=999)

    async def no_persistence(self, _uid: str) -> None:
        """Turn persistence mode off from outside, some time before."""
        before = (await self.history("")).count("gpu.persistence_off")
        for device in self.driver.devices():
            self.driver.set_device(device.uuid, persistence=False)

        async def noticed() -> bool:
            return (await self.history("")).count("gpu.persistence_off") > before

        await until("the agent has noticed", noticed, 10.0)

    def fill_gpu(self, _uid: str) -> None:
        """Fill the GPU's memory from outside."""
        for device in self.driver.devices():
            self.driver.reserve(device.uuid, device.total_bytes - device.used_bytes)

    def kill_workers(self, _uid: str) -> None:
        """Kill every process that calls the driver for the agent."""
        for child in psutil.Process(self.stack.processes["agent"].pid).children(recursive=True):
            if any("driver_worker" in word for word in child.cmdline()):
                child.kill()

    def start_second(self, _uid: str) -> None:
        """Start the instance's second CUDA process."""
        self.second_told.touch()

    def kill_second(self, uid: str) -> None:
        """Kill the instance's second CUDA process."""
        pids = [process.pid for process in self.driver.processes() if process.pid in cgroup.procs(self.cgroup_of(uid))]
        os.kill(max(pids), signal.SIGKILL)

    # ---- the waiting request ----------------------------------------------------------------------------------------

    async def ask(self, uid: str) -> Reply:
        """Send one request for this instance through the ingress."""
        self.number += 1
        headers = {"x-hibernode-token": self.token, "x-hibernode-instance": uid}
        try:
            async with self.http.get(
                f"http://{self.ingress}/answer?n={self.number}",
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=ANSWER_DEADLINE_S),
            ) as response:
                body = (await response.read()).decode()
                if response.status == 200 and body == expected_answer(self.number):
                    return Reply("answered")
                if "x-hibernode-refused" in response.headers:
                    return Reply("refused", response.headers["x-hibernode-refused"])
                return Reply("wrong", f"{response.status} {body[:200]}")
        except (aiohttp.ClientError, TimeoutError) as error:
            return Reply("unanswered", repr(error))

    # ---- the outcome ------------------------------------------------------------------------------------------------

    async def history(self, uid: str) -> str:
        """The messages of all the instance's events."""
        async with self.stack.channel("agent") as channel:
            answer = await channel.call(
                channel.instances.ListEvents, pb.ListEventsRequest(instance_uid=uid, page_size=1000), 5.0
            )
        return "\n".join(f"{event.name} {event.message}" for event in answer.events)

    async def find(self, uid: str) -> types_pb2.Instance:
        """The instance, even after its end."""
        async with self.stack.channel("agent") as channel:
            return (await channel.call(channel.instances.GetInstance, pb.GetInstanceRequest(uid=uid), 5.0)).instance

    async def settled(self, uid: str) -> types_pb2.Instance:
        """The instance once it is RUNNING, FROZEN or ended, and has released a GPU that it does not hold."""
        at_rest = (STATE.STATE_RUNNING, STATE.STATE_FROZEN, STATE.STATE_FAILED, STATE.STATE_STOPPED)

        async def resting() -> bool:
            if (await self.find(uid)).state not in at_rest:
                return False
            awake = {one.uid for one in await self.stack.instances() if one.state == STATE.STATE_RUNNING}
            return {holder for gpu in (await self.stack.node()).gpus for holder in gpu.holder_uids} == awake

        await until(f"{uid} rests, and GPUs are held by who is awake", resting, 15.0)
        return await self.find(uid)

    def heal(self) -> None:
        """Remove all faults; hung operations run now."""
        if self._frozen_ancestor is not None:
            with suppress(FileNotFoundError):  # removed with the last instance
                cgroup.write_freeze(self._frozen_ancestor, frozen=False)
            self._frozen_ancestor = None
        self.driver.clear_faults()
        for device in self.driver.devices():
            self.driver.set_device(device.uuid, persistence=True, nvml_error=0, silent=False)
            self.driver.reserve(device.uuid, 0)

    async def goes_on(self, uid: str) -> None:
        """Wait until the instance is no longer paused."""

        async def running() -> bool:
            return bool((await self.find(uid)).healthy)

        await until(f"{uid} goes on", running, 10.0)

    async def nothing_is_left_half_way(self) -> None:
        """After `heal`: no process is locked, and only the frozen instance's own are checkpointed."""

        async def clean() -> bool:
            frozen = sum(one.state == STATE.STATE_FROZEN for one in await self.stack.instances())
            states = [process.state for process in self.driver.processes()]
            return "LOCKED" not in states and "FAILED" not in states and states.count("CHECKPOINTED") <= frozen

        await until("no process is locked or half checkpointed", clean, 10.0)

    def cgroup_of(self, uid: str) -> Path:
        """The cgroup in which the instance's threads are frozen."""
        mark = (self.stack.folder / "agent" / "uuid").read_text().strip()
        slice_ = cgroup.open_slice(mark)
        assert slice_ is not None
        return slice_.path_of(uid)


@asynccontextmanager
async def running_fault_world(profile: str) -> AsyncIterator[FaultWorld]:
    """A driver with one GPU and an agent, always closed at the end."""
    driver_options = ("--gpus", "1", "--gib", "1", "--profile", profile)
    async with running_stack(*driver_options, gpu_settings=SHORT, scheduler=False) as stack:
        assert stack.http is not None
        with stack.driver() as driver:
            endpoints = await stack.wait_for_endpoints("agent")
            yield FaultWorld(stack, driver, stack.http, endpoints["ingress"], read_token(Path(endpoints["token_file"])))
