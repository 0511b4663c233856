"""A stand-in container engine: the routes that the agent uses, on a unix socket, with fault injection.

With `cgroups` (a writable folder of the v2 hierarchy) its containers are real processes in real cgroups. It answers
with the texts of Docker 20.10 or Podman 4.3.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from agent.adapters.kernel import cgroup

IMAGE = "registry.example/resize:1"
DOCKER = {"Version": "20.10.24", "ApiVersion": "1.41", "Components": [{"Name": "Engine", "Version": "20.10.24"}]}
PODMAN = {"Version": "4.3.1", "ApiVersion": "1.41", "Components": [{"Name": "Podman Engine", "Version": "4.3.1"}]}
INFO = {"NCPU": 2, "Driver": "overlay2", "DockerRootDir": "/var/lib/docker"}


@dataclass(slots=True)
class StandInContainer:
    """`process`: the shim, once started; a child of ours and the parent of the main process `pid`."""

    id: str
    name: str
    config: dict[str, Any]
    process: asyncio.subprocess.Process | None = None
    pid: int = 0
    oom_killed: bool = False

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.returncode is None

    def state(self) -> dict[str, Any]:
        if self.process is None:
            return {"Status": "created", "Running": False, "Pid": 0, "ExitCode": 0}
        if self.running:
            return {"Status": "running", "Running": True, "Pid": self.pid, "ExitCode": 0}
        code = self.process.returncode or 0
        return {
            "Status": "exited",
            "Running": False,
            "Pid": 0,
            "ExitCode": code if code >= 0 else 128 - code,
            "OOMKilled": self.oom_killed,
        }


@dataclass(slots=True)
class Refusal:
    """An answer that replaces the real one `times` times (-1 = always)."""

    status: int
    text: str
    times: int = -1


@dataclass
class EngineStandIn:
    """Serves `socket` between `up` and `down`. `refusals`: by "METHOD last-part-of-path". Routes in `hanging` never
    answer. `calls` counts requests; `open` and `most_open` are the current and highest number of concurrent calls."""

    version: dict[str, Any] = field(default_factory=lambda: dict(DOCKER))
    info: dict[str, Any] = field(default_factory=lambda: dict(INFO))
    cgroups: Path | None = None
    address: str = "172.30.0.2"
    refusals: dict[str, Refusal] = field(default_factory=dict)
    hanging: set[str] = field(default_factory=set)
    calls: Counter[str] = field(default_factory=Counter)
    containers: dict[str, StandInContainer] = field(default_factory=dict)
    networks: dict[str, dict[str, Any]] = field(default_factory=dict)
    logs: bytes = b"listening\n"
    stop_signal: str = ""
    open: int = 0
    most_open: int = 0

    def __post_init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hibernode-engine-"))
        self.socket = str(self.folder / "engine.sock")
        self._runner: web.AppRunner | None = None

    # ---- lifetime -----------------------------------------------------------------------------------------------

    async def up(self) -> None:
        application = web.Application(middlewares=[self._through])
        routes = {
            "GET /version": self._version,
            "GET /{v}/version": self._version,
            "GET /{v}/info": self._info,
            "GET /{v}/images/{name:.+}/json": self._image,
            "GET /{v}/networks/{name}": self._network,
            "POST /{v}/networks/create": self._create_network,
            "DELETE /{v}/networks/{name}": self._delete_network,
            "POST /{v}/containers/create": self._create,
            "POST /{v}/containers/{id}/start": self._start,
            "GET /{v}/containers/json": self._list,
            "GET /{v}/containers/{id}/json": self._inspect,
            "DELETE /{v}/containers/{id}": self._delete,
        }
        for route, handler in routes.items():
            method, path = route.split()
            application.router.add_route(method, path, handler)
        self._runner = web.AppRunner(application, handle_signals=False, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.UnixSite(self._runner, self.socket).start()

    async def down(self) -> None:
        """Like `systemctl stop`: containers stay, running calls break."""
        if self._runner:
            await self._runner.cleanup()
            self._runner = None

    async def close(self) -> None:
        await self.down()
        for one in list(self.containers.values()):
            await self._end(one)
        shutil.rmtree(self.folder, ignore_errors=True)

    @web.middleware
    async def _through(self, request: web.Request, handler: Any) -> web.StreamResponse:
        last = request.path.rsplit("/", 1)[-1]
        kind = request.path.split("/")[2] if request.path.count("/") > 1 else ""
        name = f"{request.method} {last if last in ('version', 'info', 'create', 'start', 'json') else kind}"
        self.calls[name] += 1
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            if name in self.hanging:
                await asyncio.Event().wait()
            refusal = self.refusals.get(name)
            if refusal and refusal.times:
                refusal.times -= 1
                return web.json_response({"message": refusal.text}, status=refusal.status)
            answer: web.StreamResponse = await handler(request)
            return answer
        finally:
            self.open -= 1

    async def called(self, name: str) -> None:
        """Wait until this route is called."""
        assert await cgroup.poll_until(lambda: self.calls[name] > 0, 10.0)

    # ---- routes -------------------------------------------------------------------------------------------------

    async def _version(self, _request: web.Request) -> web.Response:
        return web.json_response(self.version)

    async def _info(self, _request: web.Request) -> web.Response:
        return web.json_response(self.info)

    async def _image(self, request: web.Request) -> web.Response:
        if request.match_info["name"] != IMAGE:
            return _not_found(f"No such image: {request.match_info['name']}")
        return web.json_response({"Id": "sha256:1111", "Architecture": "", "Config": {"Env": ["PATH=/bin"]}})

    async def _network(self, request: web.Request) -> web.Response:
        found = self.networks.get(request.match_info["name"])
        return web.json_response(found) if found else _not_found(f"network {request.match_info['name']} not found")

    async def _create_network(self, request: web.Request) -> web.Response:
        config = await request.json()
        if config["Name"] in self.networks:
            return web.json_response({"message": f"network with name {config['Name']} already exists"}, status=409)
        self.networks[config["Name"]] = {**config, "Id": config["Name"]}
        return web.json_response({"Id": config["Name"]}, status=201)

    async def _delete_network(self, request: web.Request) -> web.Response:
        if any(one.running for one in self.containers.values()):
            return web.json_response({"message": "network has active endpoints"}, status=403)
        if not self.networks.pop(request.match_info["name"], None):
            return _not_found("network not found")
        return web.Response(status=204)

    async def _create(self, request: web.Request) -> web.Response:
        name = request.query["name"]
        if any(one.name == name for one in self.containers.values()):
            text = f'Conflict. The container name "/{name}" is already in use by container "1234"'
            return web.json_response({"message": text}, status=409)
        made = StandInContainer(secrets.token_hex(32), name, await request.json())
        self.containers[made.id] = made
        return web.json_response({"Id": made.id, "Warnings": []}, status=201)

    async def _start(self, request: web.Request) -> web.Response:
        one = self._find(request)
        if one is None:
            return _not_found("No such container")
        network = one.config["HostConfig"]["NetworkMode"]
        if network not in self.networks:
            return _not_found(f"network {network} not found")
        await self.run(one)
        return web.Response(status=204)

    async def _inspect(self, request: web.Request) -> web.Response:
        one = self._find(request)
        if one is None:
            return _not_found(f"No such container: {request.match_info['id']}")
        networks = {one.config["HostConfig"]["NetworkMode"]: {"IPAddress": self.address if one.running else ""}}
        config = {"Labels": one.config["Labels"], "StopSignal": self.stop_signal}
        answer = {"Id": one.id, "State": one.state(), "Config": config, "NetworkSettings": {"Networks": networks}}
        return web.json_response(answer)

    async def _list(self, request: web.Request) -> web.Response:
        wanted = dict(label.split("=", 1) for label in json.loads(request.query["filters"])["label"])
        listed = [
            {
                "Id": one.id,
                "Names": [f"/{one.name}"],
                "Labels": one.config["Labels"],
                "State": one.state()["Status"],
            }
            for one in self.containers.values()
            if wanted.items() <= one.config["Labels"].items()
        ]
        return web.json_response(listed)

    async def _delete(self, request: web.Request) -> web.Response:
        one = self._find(request)
        if one is None:
            return _not_found("No such container")
        await self._end(one)
        return web.Response(status=204)

    # ---- containers ---------------------------------------------------------------------------------------------

    def _find(self, request: web.Request) -> StandInContainer | None:
        wanted = request.match_info["id"]
        return next((one for one in self.containers.values() if wanted in (one.id, one.name)), None)

    async def run(self, one: StandInContainer) -> None:
        """Start the main process in a cgroup whose name contains the id."""
        assert self.cgroups, "this stand-in has nothing to run containers in"
        path = self.cgroups / one.id
        path.mkdir(exist_ok=True)
        argv = [*one.config.get("Entrypoint", ()), *one.config.get("Cmd", ())]
        joins = f'echo $$ > {path}/cgroup.procs; exec "$@"'
        one.process = await asyncio.create_subprocess_exec(
            *("/bin/sh", "-c", 'sh -c "$0" sh "$@" & wait $!', joins, *argv),
            stdout=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )

        def joined() -> bool:
            one.pid = next(iter(cgroup.procs(path)), 0)
            return one.pid != 0 or not one.running

        assert await cgroup.poll_until(joined, 10.0)

    def make(self, name: str, labels: dict[str, str], *argv: str) -> StandInContainer:
        """Create a container without a request."""
        config = {"Labels": labels, "Entrypoint": list(argv), "HostConfig": {"NetworkMode": "bridge"}}
        made = StandInContainer(secrets.token_hex(32), name, config)
        self.containers[made.id] = made
        return made

    async def _end(self, one: StandInContainer) -> None:
        self.containers.pop(one.id, None)
        if self.cgroups:
            await cgroup.remove(self.cgroups / one.id, 5.0)
        lent = any(other.process is one.process for other in self.containers.values())
        if one.process and not lent:
            await one.process.wait()


def _not_found(text: str) -> web.Response:
    return web.json_response({"message": text}, status=404)
