"""Hibernode on one host as users install it: scripts/install, configuration, emulated GPUs, one function."""

from __future__ import annotations

import json
import secrets
import shutil
from pathlib import Path
from typing import Any

import yaml

from tests.booted import root
from tests.booted.machine import Machine

AGENT = "hibernode-agent.service"
SCHEDULER = "hibernode-scheduler.service"
GPUS = "emulated-gpus.service"
CHECKOUT = "/srv/checkout"
WHEELS = "/srv/wheels"
DRIVER = "/srv/gpus"
NODE = "gpu-1"
GATEWAY = "http://127.0.0.1:8600"
INSTANCES = 2
INSTALL_S = 240.0

GPUS_UNIT = f"""\
[Service]
Type=exec
Environment=HOME=/root
ExecStart=/usr/local/bin/hibernode emulated up --dir {DRIVER} --gpus 2 --gib 1 --profile 580
"""
AGENT_SEES_THEM = f"""\
[Service]
UnsetEnvironment=
Environment=LD_LIBRARY_PATH={DRIVER}/lib HIBERNODE_EMULATED_SOCKET={DRIVER}/driver.sock
"""
TEMPLATE = {
    "edition": "3.0.0",
    "name": "booted",
    "resources": {
        "echo": {
            "component": "fc3",
            "props": {
                "functionName": "echo",
                "runtime": "custom-container",
                "timeout": 30,
                "instanceConcurrency": 1,
                "gpuConfig": {"gpuType": "fc.gpu.ada.1", "gpuMemorySize": 1024},
                "customContainerConfig": {
                    "image": "host",
                    "entrypoint": ["/usr/bin/python3", "-m", "agent.examples.echo"],
                },
                "environmentVariables": {"VRAM_MIB": "4", "PYTHONPATH": "/srv/functions"},
                "instanceLifecycleConfig": {"initializer": {"handler": "index.initialize", "timeout": 30}},
                "provisionConfig": {"defaultTarget": INSTANCES},
                "hibernode": {"freezeAfter": "1h", "queueTimeout": "60s"},
            },
        }
    },
}


class Site:
    """Does everything as a user would, by commands on the host."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    # ---- install ----------------------------------------------------------------------------------------------------

    def bring(self, version: str = "") -> None:
        """Copy the checkout (optionally as another version) and a wheelhouse to the host: no index, no network."""
        target = self.machine.path(CHECKOUT)
        if target.exists():
            self.machine.run("rm", "-rf", CHECKOUT)
        shutil.copytree(self.machine.folder / "checkout", target)
        if version:
            (target / "agent" / "__init__.py").write_text(f'"""Hibernode."""\n\n__version__ = "{version}"\n')
        if not self.machine.path(WHEELS).exists():
            self.machine.run("mkdir", "-p", WHEELS)
            for wheel in root.wheelhouse().iterdir():
                (self.machine.path(WHEELS) / wheel.name).write_bytes(wheel.read_bytes())

    def install(self, *options: str) -> str:
        """Run scripts/install; returns its output."""
        offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": WHEELS, "PIP_NO_CACHE_DIR": "1"}
        script = f"{CHECKOUT}/scripts/install"
        return self.machine.run(
            "sh", "-c", '"$@" 2>&1', "sh", script, *options, environment=offline, deadline_s=INSTALL_S
        )

    # ---- configure --------------------------------------------------------------------------------------------------

    def configure(self, **agent: Any) -> None:
        """Configure both daemons, the node's credential and two emulated GPUs. `agent` replaces sections of
        agent.yaml."""
        self.configure_agent(**agent)
        self.machine.write(
            "/etc/hibernode/scheduler.yaml",
            yaml.safe_dump({"nodes": [{"name": NODE, "token_file": f"/etc/hibernode/nodes/{NODE}.token"}]}),
        )
        token = secrets.token_urlsafe(32)
        self.machine.write("/etc/hibernode/node.token", token, 0o600)
        self.machine.write(f"/etc/hibernode/nodes/{NODE}.token", token, 0o600)
        self.machine.run("chown", "hibernode-scheduler:", f"/etc/hibernode/nodes/{NODE}.token")
        self.machine.write(f"/etc/systemd/system/{GPUS}", GPUS_UNIT)
        self.drop_in("emulated", AGENT_SEES_THEM)
        # The function's code comes from the checkout, so an upgrade of /opt/hibernode does not change it.
        self.machine.run("mkdir", "-p", "/srv/functions")
        self.machine.run("cp", "-r", f"{CHECKOUT}/agent", "/srv/functions/")

    def configure_agent(self, **sections: Any) -> None:
        """Write agent.yaml, world-readable like the example: it holds no secret."""
        mounts = {"LD_LIBRARY_PATH": f"{DRIVER}/lib", "HIBERNODE_EMULATED_SOCKET": f"{DRIVER}/driver.sock"}
        config = {
            "scheduler": {"address": "127.0.0.1:8601", "token_file": "/etc/hibernode/node.token"},
            "runtime": {"process": {"enabled": True, "user": "hibernode-functions"}},
            "gpu": {"attach": "mounts", "mounts": {"environment": mounts}, "host_memory_reserve": "64MiB"},
            **sections,
        }
        self.machine.write("/etc/hibernode/agent.yaml", yaml.safe_dump(config))

    def drop_in(self, name: str, text: str, unit: str = AGENT) -> None:
        """Write a drop-in like `systemctl edit`."""
        self.machine.write(f"/etc/systemd/system/{unit}.d/{name}.conf", text)
        self.machine.run("systemctl", "daemon-reload")

    def remove_drop_in(self, name: str, unit: str = AGENT) -> None:
        self.machine.path(f"/etc/systemd/system/{unit}.d/{name}.conf").unlink(missing_ok=True)
        self.machine.run("systemctl", "daemon-reload")

    # ---- run --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start driver and daemons; each call returns when they report READY."""
        machine = self.machine
        machine.try_run("systemctl", "reset-failed", AGENT, SCHEDULER)
        machine.run("systemctl", "start", GPUS)
        machine.until("the emulated driver is ready", machine.path(f"{DRIVER}/ready").exists)
        for unit in (SCHEDULER, AGENT):
            done = machine.try_run("systemctl", "start", unit)
            assert done.returncode == 0, f"{unit}: {done.stderr}\n{machine.journal(unit)}"

    def deploy(self) -> None:
        """Deploy echo with one instance per GPU; waits until all are up."""
        self.machine.write("/srv/s.yaml", json.dumps(TEMPLATE))
        command = ["hibernode", "deploy", "-t", "/srv/s.yaml", "--wait", "--timeout", "60s"]
        done = self.machine.try_run(*command, deadline_s=90.0)
        assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{self.machine.journal(AGENT)}"

    def instances(self) -> list[dict[str, Any]]:
        """The instances in `hibernode ps` that have not ended."""
        found = json.loads(self.machine.run("hibernode", "ps", "--output", "json"))["instances"]
        return [one for one in found if one["state"] not in ("STOPPED", "FAILED")]

    def pids(self) -> dict[str, int]:
        """The process of each instance by uid, from the host's process table, independent of the agent."""
        found = {}
        for pid in self.machine.try_run("pgrep", "-f", "agent[.]examples[.]echo").stdout.split():
            environment = self.machine.try_run("cat", f"/proc/{pid}/environ").stdout
            for entry in environment.split("\0"):
                if entry.startswith("FC_INSTANCE_ID="):
                    found[entry.partition("=")[2]] = int(pid)
        return found

    def cgroups(self) -> dict[str, str]:
        """The v2 cgroup of each instance's main process by uid, as seen from the host."""
        return {uid: self.cgroup_of(pid) for uid, pid in self.pids().items()}

    def cgroup_of(self, pid: int) -> str:
        lines = self.machine.run("cat", f"/proc/{pid}/cgroup").splitlines()
        return next(line.removeprefix("0::") for line in lines if line.startswith("0::"))

    def agent_says(self, path: str) -> int:
        """The status of a page on the agent's admin port; 0 if nothing answers."""
        ask = f"import urllib.request as r\nprint(r.urlopen('http://127.0.0.1:8612{path}', timeout=5).status)"
        done = self.machine.try_run("/usr/bin/python3", "-c", ask)
        if done.returncode == 0:
            return int(done.stdout)
        return 503 if "503" in done.stderr else 0


def read(machine: Machine, path: str) -> str:
    """Read a file of the host."""
    return Path(machine.path(path)).read_text()
