"""Private container engines for tests: a Docker and a Podman in temporary folders, separate from the host's own.

They start once per test process. `close` removes their containers, networks, mounts and firewall rules. A killed run
leaves its folder unlocked; the next run starts that engine again and closes it the same way (`sweep`). Tests query an
engine through `api`, never through the code under test.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psutil

from tests.engines import host_traces

API = "/v1.40"
"""Supported by Docker 20.10 and Podman 4.3."""
START_DEADLINE_S = 60.0
STOP_DEADLINE_S = 30.0
CALL_DEADLINE_S = 60.0
PREFIX = "hibernode-engine-"
LABEL = "hibernode.state"

REGISTRIES = """\
unqualified-search-registries = ["docker.io"]
[[registry]]
location = "127.0.0.1"
insecure = true
"""
"""For Podman only: names without a registry mean Docker Hub, as for Docker; registries on loopback need no TLS; no
other file of the host is read."""

CONTAINERD_CONFIG = """\
version = 2
root = "{folder}/containerd-root"
state = "{folder}/containerd-state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = "{folder}/containerd.sock"
[ttrpc]
address = "{folder}/containerd.sock.ttrpc"
[debug]
level = "warn"
"""
"""A separate containerd, as packages set it up: one started by dockerd would die with it."""

PODMAN_CONFIG = """\
[containers]
default_ulimits = []
[network]
network_backend = "netavark"
network_config_dir = "{folder}/networks"
default_subnet_pools = [{{"base" = "{addresses}", "size" = 24}}]
[engine]
runtime = "{runtime}"
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
tmp_dir = "{folder}/tmp"
static_dir = "{folder}/static"
volume_path = "{folder}/volumes"
"""
"""default_ulimits: raising rlimits needs CAP_SYS_RESOURCE, which a test host may lack. lock_type: the default is one
block of shared memory for all Podmans of a host."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of an engine."""

    status: int
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("engine", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


@dataclass
class Engine:
    """One engine. `kind` is "docker" or "podman"; `socket` serves the Docker Engine API."""

    kind: str
    folder: Path
    _children: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _before: host_traces.HostTraces = field(default_factory=host_traces.take)

    @property
    def socket(self) -> str:
        return str(self.folder / "s.sock")

    # ---- lifetime ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start and wait for an answer. Does nothing if it runs."""
        if self.answers():
            return
        containerd = self.folder / "containerd.toml"
        if self.kind == "docker" and not any(str(containerd) in process.cmdline() for process in self._processes()):
            containerd.write_text(CONTAINERD_CONFIG.format(folder=self.folder))
            self._spawn(["containerd", "--config", str(containerd)])
        process = self._spawn(self._command())
        ends = time.monotonic() + START_DEADLINE_S
        while not self.answers():
            if process.poll() is not None or time.monotonic() > ends:
                raise AssertionError(f"{self.kind} does not start: {self.log()[-2000:]}")
            time.sleep(0.05)

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.folder / "engine.log").open("ab") as log:
            # In its own folder: conmon writes a file `oom` to its working directory.
            process = subprocess.Popen(
                command, cwd=self.folder, stdout=log, stderr=log, env=self.environment(), start_new_session=True
            )
        self._children.append(process)
        return process

    def _command(self) -> list[str]:
        if self.kind == "docker":
            (self.folder / "daemon.json").write_text("{}")  # instead of the host's
            return [
                "dockerd", "--config-file", str(self.folder / "daemon.json"),
                "--data-root", str(self.folder / "data"), "--exec-root", str(self.folder / "exec"),
                "--pidfile", str(self.folder / "pid"), "--host", f"unix://{self.socket}",
                "--containerd", str(self.folder / "containerd.sock"),
                "--default-address-pool", f"base={self.addresses()},size=24",
                # Containers outlive the daemon, as recommended to operators.
                "--live-restore", "--bridge", "none", "--log-level", "warn",
            ]  # fmt: skip
        runtime = "runc" if shutil.which("runc") else "crun"
        (self.folder / "containers.conf").write_text(
            PODMAN_CONFIG.format(folder=self.folder, runtime=runtime, addresses=self.addresses())
        )
        (self.folder / "registries.conf").write_text(REGISTRIES)
        return [*self._podman(), "system", "service", "--time=0", f"unix://{self.socket}"]

    def addresses(self) -> str:
        """Address range of its networks, distinct from other engines' here: Podman does not see interfaces that are
        down."""
        file = self.folder / "addresses"
        if not file.exists():
            used = host_traces.routed_networks()
            free = [network for n in range(100, 250) if (network := f"10.{n}.") not in used]
            file.write_text(f"{random.choice(free)}0.0/16")
        return file.read_text()

    def _podman(self) -> list[str]:
        return ["podman", "--root", str(self.folder / "data"), "--runroot", str(self.folder / "run")]

    def environment(self) -> dict[str, str]:
        """Environment of the engine and its command line (`client`)."""
        if self.kind == "docker":
            return {**os.environ, "DOCKER_HOST": f"unix://{self.socket}", "DOCKER_CONFIG": str(self.folder / "client")}
        own = {
            "CONTAINERS_CONF": str(self.folder / "containers.conf"),
            "CONTAINERS_REGISTRIES_CONF": str(self.folder / "registries.conf"),
        }
        return {**os.environ, **own}

    def client(self, *arguments: str) -> list[str]:
        """A command line for this engine as a user would type it; run it with `environment()`."""
        return ["docker", *arguments] if self.kind == "docker" else [*self._podman(), *arguments]

    def answers(self) -> bool:
        try:
            return self.api("GET", "/_ping", deadline_s=5.0).status == 200
        except OSError:
            return False

    def stop(self) -> None:
        """Stop like an upgrade does; containers keep running (live-restore; Podman needs no daemon)."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL; its helpers (containerd, shims, conmon) and all containers keep running."""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        serving = [process for process in self._processes() if self._serves(process)]
        for process in serving:
            process.send_signal(number)
        _gone, left = psutil.wait_procs(serving, timeout=STOP_DEADLINE_S)
        assert not left, f"{self.kind} does not end: {left}"
        # A killed dockerd leaves its pid file, and the next one refuses to start if any process or thread has that id.
        (self.folder / "pid").unlink(missing_ok=True)
        self._reap()

    def _reap(self) -> None:
        self._children = [child for child in self._children if child.poll() is None]

    def _serves(self, process: psutil.Process) -> bool:
        return f"unix://{self.socket}" in process.cmdline() and process.name() in ("dockerd", "podman")

    def _processes(self) -> Iterator[psutil.Process]:
        """The engine, its helpers and conmons, recognised by its folder in their arguments."""
        for process in psutil.process_iter():
            try:
                ours = process.pid != os.getpid() and any(str(self.folder) in part for part in process.cmdline())
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    yield process
            except psutil.Error:
                continue

    def log(self) -> str:
        return (self.folder / "engine.log").read_text(errors="replace")

    # ---- API calls --------------------------------------------------------------------------------------------------

    def api(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        content: Any = None,
        query: Mapping[str, str] | None = None,
        deadline_s: float = CALL_DEADLINE_S,
    ) -> Reply:
        """Make one call. `body` is sent as JSON, `content` (bytes or an open file) unchanged. Raises OSError."""
        connection = _UnixConnection(self.socket, deadline_s)
        try:
            target = f"{API}{path}" + (f"?{urlencode(query)}" if query else "")
            if content is not None:
                connection.request(method, target, content, {"Content-Type": "application/x-tar"})
            elif body is not None:
                connection.request(method, target, json.dumps(body), {"Content-Type": "application/json"})
            else:
                connection.request(method, target)
            answer = connection.getresponse()
            return Reply(answer.status, answer.read())
        except http.client.HTTPException as error:
            raise ConnectionError(f"{self.kind}: {error!r}") from error
        finally:
            connection.close()

    def must(self, method: str, path: str, **how: Any) -> Any:
        """Make a call that must succeed; returns its answer."""
        reply = self.api(method, path, **how)
        assert reply.status < 300, f"{self.kind}: {method} {path}: {reply.status} {reply.body[:500]!r}"
        try:
            return reply.json()
        except ValueError:
            return reply.body

    def ps(self, state_uuid: str = "") -> list[dict[str, Any]]:
        """All containers, including ended ones, of one agent or of all."""
        label = {"label": [f"{LABEL}={state_uuid}"]} if state_uuid else {}
        found: list[dict[str, Any]] = self.must(
            "GET", "/containers/json", query={"all": "true", "filters": json.dumps(label)}
        )
        return found

    def container(self, uid: str) -> dict[str, Any]:
        """The inspect answer for an instance's container."""
        found: dict[str, Any] = self.must("GET", f"/containers/hibernode-{uid}/json")
        return found

    def remove(self, container: str) -> None:
        """Remove a container from outside the agent, in any state."""
        reply = self.api("DELETE", f"/containers/{container}", query={"force": "true", "v": "true"})
        assert reply.status in (200, 204, 404, 409), reply.body

    def networks(self) -> list[str]:
        return [entry["Name"] for entry in self.must("GET", "/networks")]

    # ---- leftovers --------------------------------------------------------------------------------------------------

    def leftovers(self, state_uuid: str) -> list[str]:
        """Containers, networks, bridges, mounts and cgroups that an agent left. Polls for at most 3 s, because kernel
        and engine clean up with a delay."""
        ends = time.monotonic() + 3.0
        while (found := self._leftovers(state_uuid)) and time.monotonic() < ends:
            time.sleep(0.1)
        return found

    def _leftovers(self, state_uuid: str) -> list[str]:
        digits = state_uuid.replace("-", "")
        containers = self.ps()
        ids = {entry["Id"] for entry in containers}
        found = [f"container {entry['Names'][0]}" for entry in containers if entry["Labels"].get(LABEL) == state_uuid]
        found += [f"network {name}" for name in self.networks() if name == f"hibernode-{digits[:12]}"]
        now = host_traces.take(self.folder)
        found += [f"bridge {link}" for link in now.links if link == f"hib-{digits[:8]}"]
        found += [f"mount {path}" for path in now.mounts if not ids and "/overlay" in path and path.endswith("/merged")]
        known = {path for path in now.cgroups if any(one in path for one in ids)}
        gone = now.cgroups - self._before.cgroups - known
        return found + [f"cgroup {path}" for path in sorted(gone) if host_traces.is_empty_cgroup(path)]

    def clear(self) -> list[str]:
        """Remove every container and every test network; returns what existed."""
        found = []
        for entry in self.ps():
            found.append(f"container {entry['Names'][0]}")
            self._unpause(entry["Id"])
            self.remove(entry["Id"])
        for name in self.networks():
            if name.startswith("hibernode-"):
                found.append(f"network {name}")
                self.api("DELETE", f"/networks/{name}")
        return found

    def _unpause(self, container: str) -> None:
        """Thaw by the cgroup: the agent freezes without the engine, which can't kill a frozen container."""
        for path in host_traces.cgroups_of(container):
            host_traces.kill_cgroup(path)

    def close(self) -> None:
        """Remove everything from the host, in any state."""
        try:
            self.start()
            self.clear()
            self.stop()
        finally:
            for process in list(self._processes()):
                process.kill()
            for child in self._children:
                child.wait(STOP_DEADLINE_S)
            host_traces.unmount_below(self.folder)
            shutil.rmtree(self.folder, ignore_errors=True)
            host_traces.remove_firewall_rules(self._before.rules)


class EngineFolder:
    """A locked folder for one engine: `sweep` of other processes skips it while this process lives."""

    def __init__(self, kind: str) -> None:
        with Path(tempfile.gettempdir(), f"{PREFIX.rstrip('-')}.lock").open("w") as door:
            fcntl.flock(door, fcntl.LOCK_EX)
            sweep()
            self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{kind}-"))
            self._lock = (self.folder / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.engine = Engine(kind, self.folder)

    def close(self) -> None:
        self.engine.close()
        self._lock.close()


def sweep() -> None:
    """Close the engines of killed runs."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        kind = folder.name.removeprefix(PREFIX).partition("-")[0]
        try:
            with (folder / "lock").open("r") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                Engine(kind, folder).close()
        except OSError:
            continue  # it belongs to a running test process, or another has just removed it


def missing(kind: str) -> str:
    """Why this engine can't run here; "" if it can."""
    if os.geteuid() != 0:
        return f"only root can start a {kind} of its own"
    needed = {"docker": ("dockerd", "containerd", "runc", "iptables"), "podman": ("podman", "conmon", "iptables")}
    absent = [program for program in needed[kind] if shutil.which(program) is None]
    if absent:
        return f"{', '.join(absent)} not found; `scripts/test --all` installs what is missing where it may"
    return ""
