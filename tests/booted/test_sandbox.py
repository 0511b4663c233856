"""The agent's sandbox, tried from within: it allows everything that the agent needs, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.booted.site import AGENT, Site

PROBE = "hibernode-probe.service"
SOCKETS = ("/run/docker.sock", "/run/podman/podman.sock")
LISTENER = """\
import os, socket, sys, time
for path in sys.argv[1:]:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    engine = socket.socket(socket.AF_UNIX)
    engine.bind(path)
    os.chmod(path, 0o660)
    engine.listen()
    globals()[path] = engine
open("/run/listening", "w").close()
time.sleep(600)
"""
NEEDED = [
    "read another user's environment",
    "read another user's memory figures",
    "signal another user's process",
    "attach to another user's process",
    "read trusted attributes of cgroups",
    "freeze and kill by cgroup",
    "isolate a bridge port",
    "reach Docker's socket",
    "reach Podman's socket",
    "become the functions' account",
    "give files to the functions' account",
    "listen below 1024",
    "map memory that is written and run",
    "write /run/lock",
    "write /tmp",
]
DENIED = [
    "write /usr",
    "write /etc",
    "write /root",
    "write other services' state",
    "set the clock",
    "mount",
    "load a kernel module",
    "make a user namespace",
    "make a device node",
    "make a set-uid file",
    "open a raw socket",
    "reboot",
]


@pytest.fixture
def bridge_port(site: Site) -> Iterator[str]:
    """A bridge port, as containers have. nspawn mounts /sys read-only; here it is writable, as on a real host."""
    machine = site.machine
    machine.run("ip", "link", "add", "probe0", "type", "bridge")
    try:
        machine.run("ip", "link", "add", "probe1", "type", "veth", "peer", "name", "probe2")
        machine.run("ip", "link", "set", "probe1", "master", "probe0")
        where = machine.run("findmnt", "-n", "-o", "TARGET", "-T", "/sys/class/net/probe1/brport").strip()
        machine.run("mount", "-o", "remount,rw", where)
        try:
            yield "probe1"
        finally:
            machine.run("mount", "-o", "remount,ro", where)
    finally:
        for name in ("probe1", "probe0"):
            machine.try_run("ip", "link", "delete", name)


@pytest.fixture
def engines(site: Site) -> Iterator[None]:
    """Listeners on the sockets of Docker and Podman."""
    machine = site.machine
    machine.write("/srv/listen.py", LISTENER)
    machine.run("systemd-run", "--unit=engines", "/usr/bin/python3", "/srv/listen.py", *SOCKETS)
    try:
        machine.until("the sockets are there", machine.path("/run/listening").exists)
        yield
    finally:
        machine.run("systemctl", "stop", "engines")
        machine.run("rm", "-rf", *SOCKETS, "/run/listening")


def probe_unit(agent_unit: str) -> str:
    """The agent's unit with the probe as its program and all restrictions unchanged."""
    service = re.sub(
        r"^(ExecStart|ExecStartPre|WatchdogSec|Restart|Type|NotifyAccess)=.*\n", "", agent_unit, flags=re.MULTILINE
    )
    probe = "[Service]\nType=oneshot\nExecStart=/usr/bin/python3 /srv/probe.py ${PROBED} ${BRIDGE_PORT}\n"
    return service.replace("[Service]\n", probe)


@contextmanager
def probing(site: Site, bridge_port: str) -> Iterator[Callable[[str], dict[str, str]]]:
    """The probe's answers under the agent's unit, with additional lines."""
    machine = site.machine
    machine.write("/srv/probe.py", Path(__file__).with_name("probe.py").read_text())
    machine.write(f"/etc/systemd/system/{PROBE}", probe_unit(machine.path(f"/etc/systemd/system/{AGENT}").read_text()))
    stranger = next(iter(site.pids().values()))

    def probe(lines: str) -> dict[str, str]:
        arguments = f"Environment=PROBED={stranger} BRIDGE_PORT={bridge_port}"
        site.drop_in("test", f"[Service]\n{arguments}\n{lines}\n", PROBE)
        machine.try_run("systemctl", "reset-failed", PROBE)
        done = machine.try_run("systemctl", "start", PROBE)
        said = machine.journal(PROBE)
        assert done.returncode == 0, said
        answers: dict[str, str] = json.loads([line for line in said.splitlines() if line.startswith("{")][-1])
        return answers

    try:
        yield probe
    finally:
        machine.run("rm", "-rf", f"/etc/systemd/system/{PROBE}", f"/etc/systemd/system/{PROBE}.d")
        machine.run("systemctl", "daemon-reload")


@pytest.mark.usefixtures("engines")
def test_sandbox_allows_the_agents_work_and_nothing_else(site: Site, bridge_port: str) -> None:
    with probing(site, bridge_port) as probe:
        answers = probe("")
    assert set(answers) == {*NEEDED, *DENIED}
    assert {name: answers[name] for name in NEEDED} == dict.fromkeys(NEEDED, "yes")
    assert [name for name in DENIED if answers[name] == "yes"] == []


@pytest.mark.usefixtures("engines")
def test_agent_needs_each_of_its_capabilities(site: Site, bridge_port: str) -> None:
    """All but SYS_RESOURCE, which a test host may lack."""
    unit = site.machine.path(f"/etc/systemd/system/{AGENT}").read_text()
    kept = re.search(r"^CapabilityBoundingSet=(.+)$", unit, re.MULTILINE)
    assert kept
    needless = []
    with probing(site, bridge_port) as probe:
        for capability in set(kept[1].split()) - {"CAP_SYS_RESOURCE"}:
            answers = probe(f"CapabilityBoundingSet=~{capability}")
            if all(answers[name] == "yes" for name in NEEDED):
                needless.append(capability)
    assert needless == []
