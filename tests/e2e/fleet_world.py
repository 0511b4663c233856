"""A fleet on this machine: a scheduler and agents, each on its own host as far as the network is concerned.

Each has a network namespace with its own address. The bridge between them is in a namespace too, out of reach of the
machine's firewall. The test's clients run in the machine's own namespace. Agents share processes, cgroups and files
with the machine; each has its own emulated driver.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from agent.adapters.daemon.token_file import ensure_token
from agent.core.types import FunctionSpec
from agent.v1 import function_service_pb2 as functions_pb
from agent.v1 import scheduler_service_pb2 as scheduler_pb
from agent.v1 import types_pb2
from agent.v1 import usage_service_pb2 as usage_pb
from agent.wire.clients import DaemonChannel
from agent.wire.convert_function import function_to_proto
from tests.e2e.stack import CALL_S, START_DEADLINE_S, Stack, until
from tests.fakes.gpu_locks import forget_locks

SCHEDULER = 1
"""Host number of the scheduler; agents have 11, 12, ..., the clients 254."""
FIRST_AGENT = 11
CLIENTS = 254
READY = types_pb2.Node.STATE_READY


def why_not() -> str:
    """Why network namespaces are unavailable here; "" if they are available."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [program for program in ("ip", "nsenter") if shutil.which(program) is None]
    if missing:
        return f"network namespaces need {' and '.join(missing)} (iproute2, util-linux)"
    name = f"hib-try-{secrets.token_hex(3)}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"no network namespace can be made here: {tried.stderr.strip()[:200]}"
    bridge = subprocess.run(
        ["ip", "-n", name, "link", "add", "name", "br0", "type", "bridge"], capture_output=True, text=True, check=False
    )
    subprocess.run(["ip", "netns", "del", name], check=True)
    return f"no bridge can be made here: {bridge.stderr.strip()[:200]}" if bridge.returncode else ""


@dataclass
class Network:
    """A switch and the hosts connected to it. `namespaces` by host number."""

    tag: str = field(default_factory=lambda: secrets.token_hex(3))
    subnet: str = ""
    namespaces: dict[int, str] = field(default_factory=dict)

    @property
    def switch(self) -> str:
        return f"hib-{self.tag}-switch"

    def address(self, number: int) -> str:
        return f"{self.subnet}.{number}"

    def build(self) -> None:
        """Create the switch, and an interface for the clients in the machine's own namespace."""
        self.subnet = _free_subnet()
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "name", "br0", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "br0", "up")
        self._cable(CLIENTS)
        _ip("addr", "add", f"{self.address(CLIENTS)}/24", "dev", self._plug(CLIENTS))
        _ip("link", "set", self._plug(CLIENTS), "up")

    def add(self, number: int, name: str) -> None:
        """Create a host."""
        namespace = self.namespaces[number] = f"hib-{self.tag}-{name}"
        _ip("netns", "add", namespace)
        self._cable(number)
        _ip("link", "set", self._plug(number), "netns", namespace)
        _ip("-n", namespace, "addr", "add", f"{self.address(number)}/24", "dev", self._plug(number))
        _ip("-n", namespace, "link", "set", self._plug(number), "up")
        _ip("-n", namespace, "link", "set", "lo", "up")

    def cut(self, number: int) -> None:
        """Disconnect the host silently in both directions."""
        _ip("-n", self.switch, "link", "set", self._port(number), "nomaster")

    def mend(self, number: int) -> None:
        _ip("-n", self.switch, "link", "set", self._port(number), "master", "br0")

    def remove(self) -> None:
        """Remove everything that exists; processes inside have ended."""
        for namespace in (*self.namespaces.values(), self.switch):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", self._plug(CLIENTS)], capture_output=True, check=False)

    def _cable(self, number: int) -> None:
        port, plug = self._port(number), self._plug(number)
        _ip("-n", self.switch, "link", "add", port, "type", "veth", "peer", "name", plug, "netns", str(os.getpid()))
        _ip("-n", self.switch, "link", "set", port, "master", "br0", "up")

    def _port(self, number: int) -> str:
        return f"p{self.tag}{number}"

    def _plug(self, number: int) -> str:
        return f"h{self.tag}{number}"


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _free_subnet() -> str:
    """A free one in 198.18.0.0/15, reserved for network tests (RFC 2544)."""
    taken = _ip("-4", "route", "show", "table", "all")
    first = secrets.randbelow(256)
    return next(net for i in range(256) if f"{(net := f'198.18.{(first + i) % 256}')}." not in taken)


@dataclass
class Host(Stack):
    """One machine of the fleet: a `Stack` whose daemons run in a namespace and listen on its address."""

    name: str = ""
    namespace: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Top-level keys of the daemon's configuration."""

    def spawn(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{self.namespace}", sys.executable, *command],
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )

    def _configure(self, name: str, config: dict[str, Any]) -> None:
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump({**config, **self.overrides}))

    def channel(self, daemon: str) -> DaemonChannel:
        endpoints = json.loads((self.folder / daemon / "endpoints.json").read_text())
        token = Path(endpoints["token_file"]).read_text().strip()
        target = f"unix:{endpoints['socket']}" if "socket" in endpoints else endpoints["grpc"]
        return DaemonChannel(target, token, insecure=True)

    def kill(self, daemon: str) -> int:
        """SIGKILL a daemon; returns the time (CLOCK_MONOTONIC ns)."""
        process = self.processes[daemon]
        at_ns = time.monotonic_ns()
        process.kill()
        process.wait(10)
        (self.folder / daemon / "endpoints.json").unlink(missing_ok=True)
        return at_ns

    def respawn_scheduler(self) -> None:
        self.spawn("scheduler", "-m", "agent.daemons.scheduler", "--config", str(self.folder / "scheduler.yaml"))


@dataclass
class Fleet:
    """A running fleet: `hub` is the scheduler's host, `nodes` the agents' by name."""

    network: Network
    hub: Host
    nodes: dict[str, Host]
    numbers: dict[str, int]
    http: aiohttp.ClientSession | None = None

    @property
    def gateway(self) -> str:
        return f"http://{self.hub.gateway}"

    # ---- state ------------------------------------------------------------------------------------------------------

    async def deploy(self, spec: FunctionSpec, target: int) -> None:
        async with self.hub.channel("scheduler") as channel:
            request = functions_pb.DeployFunctionRequest(
                spec=function_to_proto(spec, reveal_secrets=True), target=target
            )
            await channel.call(channel.functions.DeployFunction, request, CALL_S)

    async def node_states(self) -> dict[str, types_pb2.Node.State.ValueType]:
        async with self.hub.channel("scheduler") as channel:
            answer = await channel.call(channel.scheduler.ListNodes, scheduler_pb.ListNodesRequest(), CALL_S)
            return {node.name: node.state for node in answer.nodes}

    async def function(self, name: str) -> functions_pb.Function:
        async with self.hub.channel("scheduler") as channel:
            wanted = functions_pb.GetFunctionRequest(name=name)
            return (await channel.call(channel.functions.GetFunction, wanted, CALL_S)).function

    async def complete(self, targets: dict[str, int]) -> bool:
        """Whether every node is ready and every function has its target, by the scheduler and on the nodes."""
        states = await self.node_states()
        if set(states) != set(self.nodes) or set(states.values()) != {READY}:
            return False
        if [(await self.function(name)).current for name in targets] != list(targets.values()):
            return False
        found = dict.fromkeys(targets, 0)
        for instances in (await self.instances()).values():
            for one in instances:
                found[one.function] += 1
        return found == targets

    async def wait_until_complete(self, targets: dict[str, int], deadline_s: float = 30.0) -> None:
        try:
            await until(f"all nodes are ready with {targets}", lambda: self.complete(targets), deadline_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{await self.describe(targets)}") from None

    async def describe(self, targets: dict[str, int]) -> str:
        """The state of nodes and functions, for failure messages."""
        lines = [f"nodes {await self.node_states()}"]
        lines += [f"{name}: {found.current} {found.current_error}" for name in targets
                  for found in [await self.function(name)]]  # fmt: skip
        lines.append(self.hub.log_of("scheduler")[-6000:])
        return "\n".join(lines)

    async def instances(self) -> dict[str, list[types_pb2.Instance]]:
        """The instances of each node, from its agent."""
        return {name: await node.instances() for name, node in self.nodes.items()}

    async def owners(self) -> dict[str, str]:
        """The node of each instance."""
        return {one.uid: name for name, instances in (await self.instances()).items() for one in instances}

    async def usage(self) -> dict[str, usage_pb.UsageRow]:
        """The scheduler's usage of every instance, including ended ones."""
        rows: dict[str, usage_pb.UsageRow] = {}
        token = ""
        async with self.hub.channel("scheduler") as channel:
            while True:
                request = usage_pb.ListUsageRequest(
                    grouping=usage_pb.ListUsageRequest.GROUPING_INSTANCE, page_size=1000, page_token=token
                )
                answer = await channel.call(channel.usage.ListUsage, request, CALL_S)
                rows.update({row.instance_uid: row for row in answer.rows})
                token = answer.next_page_token
                if not token:
                    return rows

    # ---- faults -----------------------------------------------------------------------------------------------------

    def cut(self, node: str) -> None:
        self.network.cut(self.numbers[node])

    def mend(self, node: str) -> None:
        self.network.mend(self.numbers[node])

    # ---- the end ----------------------------------------------------------------------------------------------------

    async def remove_functions(self, names: Sequence[str]) -> None:
        async with self.hub.channel("scheduler") as channel:
            for name in names:
                request = functions_pb.DeleteFunctionRequest(name=name)
                await channel.call(channel.functions.DeleteFunction, request, CALL_S)

        async def none_left() -> bool:
            return not any((await self.instances()).values())

        await until("all instances are stopped", none_left)


@asynccontextmanager
async def running_fleet(*names: str, gpus: int = 2, scheduler: dict[str, Any] | None = None) -> AsyncIterator[Fleet]:
    """A scheduler and one agent per name, running and connected. Everything ends afterwards; a daemon that does not end
    cleanly is an error."""
    with tempfile.TemporaryDirectory(prefix="hibernode-fleet-") as folder, _network() as network:
        fleet = _plan(Path(folder), network, names, scheduler or {})
        hosts = [*fleet.nodes.values(), fleet.hub]
        uuids: list[str] = []
        try:
            for node in fleet.nodes.values():
                await node.start_driver("--gpus", str(gpus), "--gib", "1", "--profile", "580")
                with node.driver() as control:
                    uuids += [device.uuid for device in control.devices()]
            await fleet.hub.start_scheduler()
            for node in fleet.nodes.values():
                node.configure_agent()
                await node.start_agent(wait=False)
            for node in fleet.nodes.values():
                await node.wait_for_endpoints("agent")
            await fleet.wait_until_complete({}, START_DEADLINE_S)
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
                fleet.http = session
                yield fleet
            for host in hosts:
                for daemon in reversed(host.processes):
                    code = host.terminate(daemon)
                    assert code == 0, f"{host.name}'s {daemon} ended with {code}:\n{host.log_of(daemon)[-3000:]}"
        finally:
            for host in hosts:
                host.kill_everything()
            forget_locks(uuids)


@contextmanager
def _network() -> Iterator[Network]:
    network = Network()
    try:
        network.build()
        yield network
    finally:
        network.remove()


def _plan(folder: Path, network: Network, names: Sequence[str], scheduler: dict[str, Any]) -> Fleet:
    """Create folders, addresses, tokens and configurations, without starting anything."""
    folder.chmod(0o755)
    environment = {**os.environ, "GRPC_ENABLE_FORK_SUPPORT": "0"}
    network.add(SCHEDULER, "scheduler")
    here = network.address(SCHEDULER)
    listen = {"gateway": {"host": here, "port": 8600}, "grpc": {"host": here, "port": 8601}}
    tokens = [{"name": name, "token_file": str(folder / name / "agent" / "token")} for name in names]
    hub = Host(
        folder / "hub",
        dict(environment),
        name="hub",
        namespace=network.namespaces[SCHEDULER],
        overrides={**listen, "insecure": True, "nodes": tokens, **scheduler},
    )
    hub.folder.mkdir()
    nodes: dict[str, Host] = {}
    numbers = {name: FIRST_AGENT + index for index, name in enumerate(names)}
    for name, number in numbers.items():
        network.add(number, name)
        token = folder / name / "agent" / "token"
        token.parent.mkdir(parents=True)
        token.parent.chmod(0o711)
        ensure_token(token)
        mine = network.address(number)
        overrides = {
            "node_name": name,
            "insecure": True,
            "ingress": {"host": mine, "port": 8610},
            "grpc": {"host": mine, "port": 8611},
            "scheduler": {"address": f"{here}:8601", "token_file": str(token), "upload_interval": "300ms"},
        }
        nodes[name] = Host(
            folder / name,
            dict(environment),
            name=name,
            namespace=network.namespaces[number],
            overrides=overrides,
        )
    return Fleet(network, hub, nodes, numbers)


@contextmanager
def partitioned(fleet: Fleet, node: str) -> Iterator[None]:
    """Cut the node off during the block."""
    fleet.cut(node)
    try:
        yield
    finally:
        with suppress(RuntimeError):  # a failed test may have removed the network already
            fleet.mend(node)
