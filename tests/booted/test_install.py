"""scripts/install on a host: twice is once, an upgrade drops nothing and can be taken back, it leaves as it came."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.booted.load import under_load
from tests.booted.machine import Machine
from tests.booted.site import AGENT, GPUS, INSTANCES, SCHEDULER, Site

NEWER = "9.9.9"
PLACES = ("/etc", "/opt", "/usr", "/var/lib", "/run/lock", "/run/systemd/system", "/home", "/root")
# What a running system writes by itself; the last two are the tests' own.
NOISE = re.compile(
    r"/__pycache__|^/(etc|run)/\.pwd\.lock|^/var/lib/systemd/|^/root/\.cache|^/etc/systemd/system/emulated"
)
BACKUPS = re.compile(r"^/etc/(passwd|group|shadow|gshadow|subuid|subgid)-?$")


def state(machine: Machine) -> dict[str, str]:
    """Every path with what would change if it was touched."""
    looks = ["find", *PLACES, "-xdev", "-printf", "%p\\t%y %m %u:%g %s %T@ %l\\n"]
    found = dict(line.split("\t", 1) for line in machine.run(*looks).splitlines())
    return {path: look for path, look in found.items() if not NOISE.search(path)}


def at_rest(machine: Machine) -> dict[str, str]:
    """Without what the daemons write all the time."""
    return {path: look for path, look in state(machine).items() if not path.startswith("/var/lib/hibernode/")}


def accounts(machine: Machine) -> list[str]:
    return sorted(machine.run("cat", "/etc/passwd", "/etc/group", "/etc/shadow", "/etc/gshadow").splitlines())


@pytest.fixture
def checkout(site: Site) -> Iterator[Site]:
    """A site whose checkout a test replaces: the one that is installed everywhere else is there again afterwards."""
    yield site
    if site.machine.path("/usr/local/bin/hibernode").is_symlink():
        site.bring()
        site.install()
        site.machine.run("systemctl", "restart", AGENT)


def version(site: Site) -> str:
    """Of the agent that runs."""
    node = json.loads(site.machine.run("hibernode", "node", "--output", "json"))
    return str(node["agent_version"])


def test_installing_twice_changes_nothing(site: Site) -> None:
    before = at_rest(site.machine)
    said = site.install()
    assert at_rest(site.machine) == before
    assert "systemctl restart hibernode-agent hibernode-scheduler" in said, "they run: that is the next step"


def test_an_upgrade_under_load_drops_neither_instances_nor_requests_and_can_be_taken_back(checkout: Site) -> None:
    site = checkout
    machine = site.machine
    old, pids, cgroups = version(site), site.pids(), site.cgroups()
    assert old != NEWER
    with under_load(machine) as load:
        site.bring(NEWER)
        site.install()
        load.go_on(5)
        assert version(site) == old, "installing touches no running daemon"
        machine.run("systemctl", "restart", AGENT)
        load.go_on(20)
        assert version(site) == NEWER
        site.bring()
        said = site.install()
        assert "Installing hibernode" not in said, "the earlier version was kept"
        machine.run("systemctl", "restart", AGENT)
        load.go_on(20)
        assert version(site) == old
    assert not load.failed, load.failed[:5]
    assert (site.pids(), site.cgroups()) == (pids, cgroups)


def test_versions_that_nobody_runs_are_removed_but_for_the_one_before(checkout: Site) -> None:
    site = checkout
    releases = site.machine.path("/opt/hibernode/releases")
    running = site.machine.path("/opt/hibernode/current").readlink().name
    for number in range(3):
        # What an install leaves; whole ones take half a minute each.
        (releases / f"old-{number}").mkdir()
    site.install()
    names = {path.name for path in releases.iterdir()}
    assert running in names
    assert len(names) <= 3


def test_a_first_install_makes_no_secret_and_a_purge_leaves_nothing(machine: Machine, site: Site) -> None:
    """From a host with running instances, one of them asleep, to one that has never seen any of it; and again."""
    machine.run("hibernode", "freeze", site.instances()[0]["uid"])
    said = site.install("--uninstall", "--purge")
    assert "warning" not in said, said
    leftovers(site)
    bare, known = state(machine), accounts(machine)
    site.install()
    assert sorted(path.name for path in machine.path("/etc/hibernode").rglob("*")) == [
        "agent.yaml.example",
        "nodes",
        "scheduler.yaml.example",
    ]
    assert not machine.path("/var/lib/hibernode/agent").exists()
    site.install("--uninstall", "--purge")
    after = state(machine)
    changed = {path for path in bare.keys() | after.keys() if (path in bare) is not (path in after)}
    assert {path for path in changed if not BACKUPS.match(path)} == set()
    assert accounts(machine) == known


def leftovers(site: Site) -> None:
    """Nothing of ours: files, accounts, units, processes, cgroups. The emulated driver is the tests' own."""
    machine = site.machine
    machine.run("systemctl", "stop", GPUS)
    machine.run("rm", "-f", f"/etc/systemd/system/{GPUS}")
    machine.run("systemctl", "daemon-reload")
    assert [path for path in state(machine) if "hibernode" in path] == []
    assert [line for line in accounts(machine) if "hibernode" in line] == []
    units = machine.run("systemctl", "list-units", "--all", "--plain", "--no-legend", "hibernode*")
    assert units.strip() == ""
    for unit in (AGENT, SCHEDULER):
        assert machine.show(unit, "LoadState") == "not-found"
    assert machine.try_run("pgrep", "-a", "-f", "hibernode|agent[.]examples").stdout == ""
    cgroups = machine.run("find", "/sys/fs/cgroup", "-name", "*hibernode*", "-not", "-path", "*/hibernode-booted-*")
    assert cgroups.strip() == ""
    assert not site.pids()


def test_an_uninstall_ends_instances_although_their_agent_cannot(site: Site) -> None:
    """It can't even start: its instances are killed, one that sleeps too, and what else there may be is named."""
    machine = site.machine
    machine.run("hibernode", "freeze", site.instances()[0]["uid"])
    assert len(site.pids()) == INSTANCES
    site.configure_agent(no_such_key=1)
    said = site.install("--uninstall", "--purge")
    assert "warning: the agent could not end its instances" in said
    leftovers(site)


def test_an_uninstall_alone_keeps_what_is_not_the_programs(site: Site) -> None:
    """Configuration, ledger and accounts stay; instances end, for nobody would wake them; a new install goes on."""
    machine = site.machine
    uuid = machine.path("/var/lib/hibernode/agent/uuid").read_text()
    assert len(site.pids()) == INSTANCES
    said = site.install("--uninstall")
    assert "Kept: /etc/hibernode, /var/lib/hibernode" in said
    assert not site.pids()
    assert not machine.path("/opt/hibernode").exists()
    assert machine.path("/etc/hibernode/agent.yaml").exists()
    assert machine.path("/var/lib/hibernode/agent/node.db").exists()
    site.install()
    site.start()
    assert machine.path("/var/lib/hibernode/agent/uuid").read_text() == uuid
    machine.until("the scheduler has provisioned the function anew", lambda: len(site.instances()) == INSTANCES)
