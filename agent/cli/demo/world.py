"""A private scheduler and agent, with emulated GPUs or this host's own, in one folder that is a HIBERNODE_HOME.

    DIR/emulated/   the driver: sockets, libraries        DIR/logs/          output of each process
    DIR/scheduler/  state directory, token                DIR/*.yaml         configurations and the example's s.yaml
    DIR/agent/      state directory, node's credential    DIR/requests.jsonl the example's record of its requests

All ports are free ones, so several can run at the same time. The demo and the proof of a host use it.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from agent.cli.daemon_locator import read_endpoints, read_token
from agent.cli.demo.gpus import WorldGpus
from agent.cli.demo.processes import DemoProcesses, comes_true
from agent.core.errors import DeadlineError, HibernodeError, PreconditionError, UnavailableError
from agent.wire.addresses import MAX_SOCKET_PATH_BYTES

NODE = "demo-node"
START_S, DELETE_S, CALL_S = 30.0, 25.0, 10.0
UNPRIVILEGED_USER = "nobody"
LONGEST_SOCKET = "emulated/control.sock"
PrintStep = Callable[[str], None]

_ANY = {"host": "127.0.0.1", "port": 0}
_MAY_RUN = """
import importlib, os, sys
for module in sys.argv[1].split(","): importlib.import_module(module)
sys.exit(not all(os.access(path, os.R_OK) for path in sys.argv[2:]))
"""


@dataclass(frozen=True, slots=True)
class WorldProgram:
    """What the function's instances run: the Python, the modules that it imports, and variables for it. The instances'
    account must be able to."""

    python: str
    modules: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


class DemoWorld:
    """The demo's processes and folder; `demo_world` starts and ends it."""

    def __init__(self, home: Path, gpus: WorldGpus, program: WorldProgram, print_step: PrintStep) -> None:
        self.home = home
        self._gpus = gpus
        self._program = program
        self.processes = DemoProcesses(home / "logs")
        self.user = ""
        self.gateway = ""
        self._print_step = print_step

    @property
    def request_log(self) -> Path:
        return self.home / "requests.jsonl"

    @property
    def parts(self) -> str:
        driver = " and the driver" if "driver" in self.processes.names else ""
        return f"the instances, the agent, the scheduler{driver}"

    # ---- start --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Starts all processes in order. Raises HibernodeError with the end of the log of one that does not start."""
        self._gpus.start(self.processes, self._environment(), self._print_step)
        self._start_daemon("scheduler", self._scheduler_config())
        await self._gpus.wait(self.processes)
        self.user = await asyncio.to_thread(self._choose_user)
        await self._wait_for_daemon("scheduler")
        self.gateway = read_endpoints("scheduler", self.home)["gateway"]
        self._start_daemon("agent", self._agent_config())
        await self._wait_for_daemon("agent")
        await self._wait_for_node()

    def _environment(self) -> dict[str, str]:
        environment = {**os.environ, "HIBERNODE_DEMO": str(self.home), "GRPC_ENABLE_FORK_SUPPORT": "0"}
        if not os.access(os.path.expanduser("~"), os.W_OK):  # the compiled driver is cached there
            environment["XDG_CACHE_HOME"] = str(self.home / "cache")
        environment.pop("NOTIFY_SOCKET", None)
        return environment

    def _start_daemon(self, name: str, config: dict[str, Any]) -> None:
        self._print_step(f"starting the {name}")
        path = self.home / f"{name}.yaml"
        path.write_text(f"# Made by Hibernode for a short time.\n{yaml.safe_dump(config, sort_keys=False)}")
        environment = self._environment()
        if name == "agent":
            environment.update(self._gpus.exports(environment))
        self.processes.start(name, environment, f"agent.daemons.{name}", "--config", str(path))

    async def _wait_for_daemon(self, name: str) -> None:
        await self.processes.wait_for(name, (self.home / name / "endpoints.json").exists, START_S)

    def _scheduler_config(self) -> dict[str, Any]:
        return {
            "state_dir": str(self.home / "scheduler"),
            "log_format": "console",
            "gateway": _ANY,
            "grpc": _ANY,
            "admin": _ANY,
            "nodes": [{"name": NODE, "token_file": str(self.home / "agent" / "token")}],
        }

    def _agent_config(self) -> dict[str, Any]:
        return {
            "node_name": NODE,
            "state_dir": str(self.home / "agent"),
            "log_format": "console",
            "ingress": _ANY,
            "grpc": _ANY,
            "admin": _ANY,
            "scheduler": {
                "address": read_endpoints("scheduler", self.home)["grpc"],
                "token_file": str(self.home / "agent" / "token"),
                "upload_interval": "200ms",
            },
            "runtime": {"process": {"enabled": True, "user": self.user or _own_user()}, "stop_timeout": "5s"},
            "gpu": self._gpus.settings(),
            "billing": {"flush_interval": "200ms"},
        }

    def _choose_user(self) -> str:
        """The instances' account: `nobody` if this process is root and `nobody` can run the example, else ""."""
        if os.geteuid() != 0:
            return ""
        try:
            done = subprocess.run(
                [self._program.python, "-P", "-c", _MAY_RUN, ",".join(self._program.modules), *self._gpus.needs()],
                env={**os.environ, **self._program.environment},
                user=UNPRIVILEGED_USER,
                group=_group_of(UNPRIVILEGED_USER),
                extra_groups=[],
                cwd="/",
                capture_output=True,
                timeout=CALL_S,
                check=False,
            )
        except (OSError, KeyError, subprocess.SubprocessError):
            return ""
        return UNPRIVILEGED_USER if done.returncode == 0 else ""

    async def _wait_for_node(self) -> None:
        """Waits until the scheduler reports the node READY."""
        from agent.v1 import scheduler_service_pb2, types_pb2

        async with self.scheduler() as channel:

            async def ready() -> bool:
                self.processes.check()
                request = scheduler_service_pb2.ListNodesRequest()
                nodes = (await channel.call(channel.scheduler.ListNodes, request, CALL_S)).nodes
                return any(node.state == types_pb2.Node.STATE_READY for node in nodes)

            if not await comes_true(ready, START_S):
                text = f"the agent did not register within {START_S:g} s.\n{self.processes.tail('agent')}"
                raise UnavailableError("DEMO_NOT_READY", text)

    # ---- talking ------------------------------------------------------------------------------------------------

    def agent(self) -> Any:
        """A channel to the agent."""
        return self._channel("agent")

    def scheduler(self) -> Any:
        """A channel to the scheduler."""
        return self._channel("scheduler")

    def _channel(self, daemon: str) -> Any:
        from agent.wire.clients import DaemonChannel

        found = read_endpoints(daemon, self.home)  # type: ignore[arg-type]
        return DaemonChannel(found["grpc"], read_token(Path(found["token_file"])))

    # ---- end ----------------------------------------------------------------------------------------------------

    async def remove_functions(self) -> None:
        """Delete every function and wait until the last instance has ended. Raises DeadlineError."""
        from agent.cli.commands.functions import list_functions
        from agent.cli.commands.ps import list_instances
        from agent.v1 import function_service_pb2

        async with self.scheduler() as scheduler, self.agent() as agent:
            for function in await list_functions(scheduler):
                request = function_service_pb2.DeleteFunctionRequest(name=function.name)
                await scheduler.call(scheduler.functions.DeleteFunction, request, CALL_S)

            async def none_left() -> bool:
                return not await list_instances(agent)

            if not await comes_true(none_left, DELETE_S):
                raise DeadlineError("DEMO_INSTANCES_LEFT", f"instances still run after {DELETE_S:g} s")

    async def stop(self) -> None:
        """Stops the instances through the API, then agent, scheduler and driver. Prints errors instead of raising."""
        try:
            if "agent" in self.processes.names:
                self.processes.check("agent", "scheduler")
                await self.remove_functions()
                await self._stop_instances()
        except (HibernodeError, KeyError) as error:
            self._print_step(f"the instances were not stopped properly ({str(error).splitlines()[0] or 'too slow'})")
            clean = False
        else:
            clean = True
        for name in ("agent", "scheduler", "driver"):
            if not await self.processes.stop(name):
                self._print_step(f"the {name} did not end in time and was killed")
        if clean:
            await self.processes.dismiss_guard()
        else:
            await self.processes.release_guard()

    async def _stop_instances(self) -> None:
        """Stops instances of `hibernode create`, which the scheduler does not know."""
        from agent.cli.commands.ps import list_instances
        from agent.v1 import instance_service_pb2

        async with self.agent() as agent:
            for one in await list_instances(agent):
                request = instance_service_pb2.StopInstanceRequest(uid=one.uid, force=True)
                await agent.call(agent.instances.StopInstance, request, DELETE_S)


def _own_user() -> str:
    """The account to name if `nobody` can't run instances; the agent requires it of root."""
    return "root" if os.geteuid() == 0 else ""


def _group_of(user: str) -> int:
    import pwd

    return pwd.getpwnam(user).pw_gid


@asynccontextmanager
async def demo_world(
    state_dir: Path | None, gpus_in: Callable[[Path], WorldGpus], program: WorldProgram, print_step: PrintStep
) -> AsyncIterator[DemoWorld]:
    """Starts a world; `gpus_in` gets its folder. At the end all is stopped, and a temporary folder is removed."""
    home = prepare_home(state_dir)
    world = DemoWorld(home, gpus_in(home), program, print_step)
    world.processes.start_guard(home, remove=state_dir is None)
    try:
        try:
            await world.start()
            yield world
        finally:
            print_step(f"stopping {world.parts}")
            await _uninterrupted(world.stop())
    finally:
        if state_dir is None:
            shutil.rmtree(home, ignore_errors=True)


async def _uninterrupted(work: Any) -> None:
    """Completes `work` despite a second Ctrl-C. Every step of `work` has its own deadline."""
    task = asyncio.ensure_future(work)
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise


def prepare_home(state_dir: Path | None) -> Path:
    """Prepares the folder; other users may traverse it to the driver's libraries. Raises PreconditionError."""
    home = _temporary_home() if state_dir is None else state_dir.absolute()
    if not _is_short(home):
        text = f"{home} is too long for the sockets in it; choose a shorter --state-dir"
        raise PreconditionError("DEMO_DIR_UNUSABLE", text)
    try:
        home.mkdir(parents=True, exist_ok=True)
        if any((home / name / "endpoints.json").exists() for name in ("agent", "scheduler")):
            _refuse_running(home)
        home.chmod(0o755)
        for name in ("agent", "scheduler", "emulated", "logs"):
            (home / name).mkdir(exist_ok=True)
        for name, mode in (("agent", 0o711), ("scheduler", 0o711), ("emulated", 0o755)):
            (home / name).chmod(mode)
        _write_credential(home / "agent" / "token")
        log = home / "requests.jsonl"
        log.write_text("")  # without the requests of an earlier run
        log.chmod(0o666)  # instances may run as another user
    except OSError as error:
        raise PreconditionError(
            "DEMO_DIR_UNUSABLE", f"{error.filename}: {error.strerror}; choose another --state-dir"
        ) from error
    return home


def _temporary_home() -> Path:
    """A new folder in $TMPDIR; in /tmp where the sockets' paths would be too long for the kernel."""
    prefix = "hibernode-demo-"
    if _is_short(Path(tempfile.gettempdir(), f"{prefix}12345678")):
        return Path(tempfile.mkdtemp(prefix=prefix))
    return Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))


def _is_short(home: Path) -> bool:
    return len(os.fsencode(home / LONGEST_SOCKET)) <= MAX_SOCKET_PATH_BYTES


def _refuse_running(home: Path) -> None:
    """Raises PreconditionError if a running daemon holds the lock of its state directory."""
    import fcntl

    for name in ("agent", "scheduler"):
        try:
            with (home / name / "lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            continue
        except BlockingIOError:
            text = f"a demo runs in {home} already; stop it, or choose another --state-dir"
            raise PreconditionError("DEMO_RUNNING", text) from None
        (home / name / "endpoints.json").unlink(missing_ok=True)  # left by a killed daemon


def _write_credential(path: Path) -> None:
    """Writes the token that the agent and the scheduler authenticate with."""
    if path.exists():
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
