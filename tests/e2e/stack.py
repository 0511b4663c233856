"""A whole Hibernode for tests: emulated driver, scheduler, agent and instances, all real processes.

Only clients run in the test's own process. Ports are random; all state is in one temporary folder.
"""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import yaml

from agent.adapters.daemon.token_file import ensure_token
from agent.adapters.kernel.cgroup import CgroupSlice, open_slice
from agent.core.types import MIB, MILLISECOND_NS, SECOND_NS, FunctionSpec, GpuNeed, Hook, Hooks, IdlePolicy
from agent.emulated.control import EmulatedDriver
from agent.emulated.env import exports
from agent.examples.echo.__main__ import expected_answer
from agent.v1 import function_service_pb2 as functions_pb
from agent.v1 import instance_service_pb2 as instances_pb
from agent.v1 import node_service_pb2 as nodes_pb
from agent.v1 import types_pb2
from agent.wire.clients import DaemonChannel
from agent.wire.convert_function import function_to_proto
from tests.fakes.gpu_locks import forget_locks

NODE = "gpu-1"
START_DEADLINE_S = 60.0
CALL_S = 60.0
PORTS_ANY = {"host": "127.0.0.1", "port": 0}
OWN_USER = {"enabled": True, "user": pwd.getpwuid(os.getuid()).pw_name}


def echo(name: str, request_log: Path | None = None, **environment: str) -> FunctionSpec:
    """The example `echo` with 4 MiB in device memory, frozen after 100 ms without a request."""
    variables = {"VRAM_MIB": "4", **environment}
    if request_log is not None:
        variables["REQUEST_LOG"] = str(request_log)
    return FunctionSpec(
        name,
        entrypoint=(sys.executable, "-m", "agent.examples.echo"),
        environment=tuple(variables.items()),
        timeout_ns=20 * SECOND_NS,
        gpu=GpuNeed(1, memory_bytes=16 * MIB),
        hooks=Hooks(initializer=Hook(20 * SECOND_NS)),
        idle=IdlePolicy(freeze_after_ns=100 * MILLISECOND_NS),
    )


async def until(what: str, reached: Callable[[], Awaitable[bool]], deadline_s: float = 60.0) -> None:
    """Poll for at most `deadline_s`: other processes send no event."""
    ends = time.monotonic() + deadline_s
    while not await reached():
        if time.monotonic() > ends:
            raise AssertionError(f"not within {deadline_s:g} s: {what}")
        await asyncio.sleep(0.02)


@dataclass
class Answer:
    """A client's answer with its times (CLOCK_MONOTONIC ns)."""

    status: int
    body: bytes
    headers: dict[str, str]
    began_ns: int
    ended_ns: int

    @property
    def instance(self) -> str:
        return self.headers.get("x-fc-instance-id", "")


@dataclass
class Stack:
    """A running system, created by `running_stack`."""

    folder: Path
    environment: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    gateway: str = ""
    http: aiohttp.ClientSession | None = None
    agent_settings: dict[str, Any] = field(default_factory=dict)
    gpu_settings: dict[str, Any] = field(default_factory=dict)
    scheduler_settings: dict[str, Any] = field(default_factory=dict)
    engine_socket: str = "off"

    # ---- processes --------------------------------------------------------------------------------------------------

    def spawn(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, *command], stdout=log, stderr=log, env=self.environment, start_new_session=True
            )

    def log_of(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    async def wait_for_endpoints(self, name: str) -> dict[str, str]:
        path = self.folder / name / "endpoints.json"

        async def there() -> bool:
            if self.processes[name].poll() is not None:
                raise AssertionError(f"{name} ended:\n{self.log_of(name)[-3000:]}")
            return path.exists()

        await until(f"{name} writes its endpoints", there, START_DEADLINE_S)
        found: dict[str, str] = json.loads(path.read_text())
        return found

    async def start_driver(self, *arguments: str) -> None:
        directory = self.folder / "driver"
        directory.mkdir()
        self.spawn("driver", "-m", "agent.cli.main", "emulated", "up", "--dir", str(directory), *arguments)

        async def ready() -> bool:
            return (directory / "ready").exists()

        await until("the emulated driver is ready", ready, START_DEADLINE_S)
        self.environment.update(exports(directory))

    def driver(self) -> EmulatedDriver:
        return EmulatedDriver(self.folder / "driver")

    async def start_scheduler(self) -> None:
        config = {
            "state_dir": str(self.folder / "scheduler"),
            "log_format": "console",
            "gateway": PORTS_ANY,
            "grpc": PORTS_ANY,
            "admin": PORTS_ANY,
            "nodes": [{"name": NODE, "token_file": str(self.folder / "agent" / "token")}],
            **self.scheduler_settings,
        }
        self._configure("scheduler", config)
        self.spawn("scheduler", "-m", "agent.daemons.scheduler", "--config", str(self.folder / "scheduler.yaml"))
        self.gateway = (await self.wait_for_endpoints("scheduler"))["gateway"]

    def configure_agent(self) -> None:
        folder = exports(self.folder / "driver")
        mounts = {key: value for key, value in folder.items() if key != "PATH"}
        mounts["LD_LIBRARY_PATH"] = str(self.folder / "driver" / "lib")
        config = {
            "state_dir": str(self.folder / "agent"),
            "node_name": NODE,
            "log_format": "console",
            "ingress": PORTS_ANY,
            "grpc": PORTS_ANY,
            "admin": PORTS_ANY,
            **self._link(),
            "runtime": {
                "process": OWN_USER,
                "engine": {"socket": self.engine_socket},
                "trusted_gpus": bool(self.gpu_settings.get("migrate")),
                **self.agent_settings.get("runtime", {}),
            },
            "gpu": {
                "instances_per_gpu": 2,
                "attach": "mounts",
                # At the host's path inside, so that processes and containers use the same one.
                "mounts": {"environment": mounts, "binds": [f"{self.folder / 'driver'}:{self.folder / 'driver'}:ro"]},
                "utility_path": str(self.folder / "driver" / "bin" / "cuda-checkpoint"),
                "max_hold": "1s",
                **self.gpu_settings,
            },
            **{key: value for key, value in self.agent_settings.items() if key != "runtime"},
        }
        self._configure("agent", config)

    def _link(self) -> dict[str, Any]:
        """The agent's scheduler section; empty for an agent that runs alone."""
        if "scheduler" not in self.processes:
            return {}
        address = json.loads((self.folder / "scheduler" / "endpoints.json").read_text())["grpc"]
        token_file = str(self.folder / "agent" / "token")
        return {"scheduler": {"address": address, "token_file": token_file, "upload_interval": "300ms"}}

    def _configure(self, name: str, config: dict[str, Any]) -> None:
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(config))

    async def start_agent(self, *, wait: bool = True) -> None:
        self.spawn("agent", "-m", "agent.daemons.agent", "--config", str(self.folder / "agent.yaml"))
        if wait:
            await self.wait_for_endpoints("agent")
            try:
                await until("the agent is ready", self._agent_ready)
            except AssertionError as error:
                raise AssertionError(f"{error}\n{self.log_of('agent')[-6000:]}") from None

    async def _agent_ready(self) -> bool:
        try:
            return (await self.node()).state == types_pb2.Node.STATE_READY
        except Exception:
            return False

    def kill_agent(self) -> None:
        """SIGKILL the agent."""
        process = self.processes["agent"]
        process.kill()
        process.wait(10)
        (self.folder / "agent" / "endpoints.json").unlink(missing_ok=True)

    def terminate(self, name: str, deadline_s: float = 40.0) -> int:
        process = self.processes[name]
        process.terminate()
        return process.wait(deadline_s)

    # ---- calls ------------------------------------------------------------------------------------------------------

    def channel(self, daemon: str) -> DaemonChannel:
        endpoints = json.loads((self.folder / daemon / "endpoints.json").read_text())
        token = Path(endpoints["token_file"]).read_text().strip()
        return DaemonChannel(endpoints["grpc"], token)

    async def deploy(self, spec: FunctionSpec, target: int) -> None:
        """Deploy and wait for `target` instances."""
        async with self.channel("scheduler") as channel:
            request = functions_pb.DeployFunctionRequest(
                spec=function_to_proto(spec, reveal_secrets=True), target=target
            )
            await channel.call(channel.functions.DeployFunction, request, CALL_S)

            async def provisioned() -> bool:
                wanted = functions_pb.GetFunctionRequest(name=spec.name)
                found = await channel.call(channel.functions.GetFunction, wanted, CALL_S)
                if found.function.current_error and "no node is ready" not in found.function.current_error:
                    raise AssertionError(f"{spec.name}: {found.function.current_error}\n{self.log_of('agent')[-2000:]}")
                return bool(found.function.current == target)

            await until(f"{target} instances of {spec.name}", provisioned)

    async def instances(self) -> list[types_pb2.Instance]:
        async with self.channel("agent") as channel:
            answer = await channel.call(channel.instances.ListInstances, instances_pb.ListInstancesRequest(), CALL_S)
            return list(answer.instances)

    async def node(self) -> types_pb2.Node:
        async with self.channel("agent") as channel:
            return (await channel.call(channel.nodes.GetNode, nodes_pb.GetNodeRequest(), CALL_S)).node

    async def windows(self) -> list[types_pb2.UsageWindow]:
        """The node's whole ledger, including open windows."""
        found: list[types_pb2.UsageWindow] = []
        token = ""
        async with self.channel("agent") as channel:
            while True:
                request = nodes_pb.ListUsageWindowsRequest(page_size=1000, page_token=token, include_open=True)
                answer = await channel.call(channel.nodes.ListUsageWindows, request, CALL_S)
                found.extend(answer.windows)
                token = answer.next_page_token
                if not token:
                    return found

    async def ask(
        self, function: str, path: str, *, method: str = "GET", timeout_s: float = 60.0, **kwargs: Any
    ) -> Answer:
        """Send one request through the gateway."""
        assert self.http is not None
        began = time.monotonic_ns()
        async with self.http.request(
            method,
            f"http://{self.gateway}/fn/{function}{path}",
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            **kwargs,
        ) as response:
            body = await response.read()
            ended = time.monotonic_ns()
            headers = {key.lower(): value for key, value in response.headers.items()}
            return Answer(response.status, body, headers, began, ended)

    async def ask_correctly(self, function: str, number: int) -> Answer:
        """Request `/answer` of the example echo; expect 200 and the original contents of its GPU memory."""
        answer = await self.ask(function, f"/answer?n={number}")
        assert answer.status == 200, answer.body
        assert answer.body.decode() == expected_answer(number), "a byte of its GPU memory was lost"
        return answer

    async def wait_for_state(self, state: types_pb2.Instance.State.ValueType, count: int) -> None:
        async def all_there() -> bool:
            return sum(one.state == state for one in await self.instances()) >= count

        await until(f"{count} instances {types_pb2.Instance.State.Name(state)}", all_there)

    # ---- leftovers --------------------------------------------------------------------------------------------------

    def _processes(self) -> Iterator[psutil.Process]:
        """All daemons and instances: every process with this stack's folder in its environment."""
        for process in psutil.process_iter():
            try:
                ours = str(self.folder) in " ".join(process.environ().values())
            except (psutil.Error, OSError):
                continue
            if ours and process.pid != os.getpid():
                yield process

    def _slice(self) -> CgroupSlice | None:
        mark = self.folder / "agent" / "uuid"
        return open_slice(mark.read_text().strip()) if mark.exists() else None

    def leftovers(self) -> list[str]:
        """Remaining processes and cgroups of instances."""
        found = [
            f"process {p.pid} {p.cmdline()}" for p in self._processes() if "agent.examples" in " ".join(p.cmdline())
        ]
        slice_ = self._slice()
        if slice_ is not None:
            found.extend(f"cgroup of {uid}" for uid in slice_.uids())
        return found

    async def remove_functions(self, names: Iterable[str]) -> None:
        async with self.channel("scheduler") as channel:
            for name in names:
                await channel.call(
                    channel.functions.DeleteFunction, functions_pb.DeleteFunctionRequest(name=name), CALL_S
                )

        async def none_left() -> bool:
            return not await self.instances()

        await until("all instances are stopped", none_left)

    def kill_everything(self) -> None:
        """Kill everything, for a failed test that left any state."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
                process.wait(10)
        ours = list(self._processes())
        for left in ours:
            with suppress(psutil.NoSuchProcess):
                left.kill()
        psutil.wait_procs(ours, timeout=10)
        slice_ = self._slice()
        if slice_ is not None:
            for uid in slice_.uids():
                with suppress(OSError):
                    slice_.path_of(uid).rmdir()
            slice_.remove_if_empty()


@asynccontextmanager
async def running_stack(
    *driver_arguments: str,
    agent_settings: dict[str, Any] | None = None,
    gpu_settings: dict[str, Any] | None = None,
    scheduler_settings: dict[str, Any] | None = None,
    scheduler: bool = True,
    engine_socket: str = "off",
) -> AsyncIterator[Stack]:
    """A running, connected system, with a container engine if its socket is given. Everything ends afterwards; a daemon
    that does not end cleanly is an error."""
    with tempfile.TemporaryDirectory(prefix="hibernode-e2e-") as name:
        folder = Path(name)
        (folder / "agent").mkdir(mode=0o711)
        ensure_token(folder / "agent" / "token")
        stack = Stack(
            folder,
            {**os.environ, "GRPC_ENABLE_FORK_SUPPORT": "0"},
            agent_settings=agent_settings or {},
            gpu_settings=gpu_settings or {},
            scheduler_settings=scheduler_settings or {},
            engine_socket=engine_socket,
        )
        uuids: list[str] = []
        try:
            await stack.start_driver(*(driver_arguments or ("--gpus", "2", "--gib", "1", "--profile", "580")))
            with stack.driver() as control:
                uuids = [device.uuid for device in control.devices()]
            if scheduler:
                await stack.start_scheduler()
            stack.configure_agent()
            await stack.start_agent()
            connector = aiohttp.TCPConnector(limit=200)
            async with aiohttp.ClientSession(connector=connector) as session:
                stack.http = session
                yield stack
            with stack.driver() as control:
                frozen = control.take_frozen_calls()
            assert not frozen, f"checkpoint calls on a process in a frozen cgroup: {frozen}"
            for daemon in reversed(stack.processes):
                code = stack.terminate(daemon)
                assert code == 0, f"{daemon} ended with {code}:\n{stack.log_of(daemon)[-3000:]}"
        finally:
            stack.kill_everything()
            forget_locks(uuids)
