"""scripts/install on a host: idempotent, upgrades without losses, rolls back, uninstalls completely."""

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
# Written by any running system; the last two belong to the tests.
NOISE = re.compile(
    r"/__pycache__|^/(etc|run)/\.pwd\.lock|^/var/lib/systemd/|^/root/\.cache|^/etc/systemd/system/emulated"
)
BACKUPS = re.compile(r"^/etc/(passwd|group|shadow|gshadow|subuid|subgid)-?$")


def state(machine: Machine) -> dict[str, str]:
    """Every path, with values that any change would alter."""
    looks = ["find", *PLACES, "-xdev", "-printf", "%p\\t%y %m %u:%g %s %T@ %l\\n"]
    found = dict(line.split("\t", 1) for line in machine.run(*looks).splitlines())
    return {path: look for path, look in found.items() if not NOISE.search(path)}


def at_rest(machine: Machine) -> dict[str, str]:
    """The state without files that the daemons write continuously."""
    return {path: look for path, look in state(machine).items() if not path.startswith("/var/lib/hibernode/")}


def accounts(machine: Machine) -> list[str]:
    return sorted(machine.run("cat", "/etc/passwd", "/etc/group", "/etc/shadow", "/etc/gshadow").splitlines())


@pytest.fixture
def checkout(site: Site) -> Iterator[Site]:
    """A site whose checkout the test replaces; afterwards the original version is installed again."""
    yield site
    if site.machine.path("/usr/local/bin/hibernode").is_symlink():
        site.bring()
        site.install()
        site.machine.run("systemctl", "restart", AGENT)


def version(site: Site) -> str:
    """The version of the running agent."""
    node = json.loads(site.machine.run("hibernode", "node", "--output", "json"))
    return str(node["agent_version"])


def test_second_install_changes_nothing(site: Site) -> None:
    before = at_rest(site.machine)
    said = site.install()
    assert at_rest(site.machine) == before
    assert "systemctl restart hibernode-agent hibernode-scheduler" in said, "they run: that is the next step"


def test_upgrade_and_rollback_under_load_lose_nothing(checkout: Site) -> None:
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


def test_unused_versions_but_the_previous_one_are_removed(checkout: Site) -> None:
    site = checkout
    releases = site.machine.path("/opt/hibernode/releases")
    running = site.machine.path("/opt/hibernode/current").readlink().name
    for number in range(3):
        # The layout of an install; real ones take half a minute each.
        (releases / f"old-{number}").mkdir()
    site.install()
    names = {path.name for path in releases.iterdir()}
    assert running in names
    assert len(names) <= 3


def test_first_install_creates_no_secret_and_purge_leaves_nothing(machine: Machine, site: Site) -> None:
    """From a host with running instances, one of them frozen, to a clean one; and again."""
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
    """Nothing of ours is left: files, accounts, units, processes, cgroups (except the tests' emulated driver)."""
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


def test_uninstall_ends_instances_of_a_broken_agent(site: Site) -> None:
    """The agent can't even start: its instances are killed, even a frozen one, and other remains are named."""
    machine = site.machine
    machine.run("hibernode", "freeze", site.instances()[0]["uid"])
    assert len(site.pids()) == INSTANCES
    site.configure_agent(no_such_key=1)
    said = site.install("--uninstall", "--purge")
    assert "warning: the agent could not end its instances" in said
    leftovers(site)


def test_uninstall_keeps_configuration_ledger_and_accounts(site: Site) -> None:
    """Configuration, ledger and accounts stay. Instances end, because nothing would wake them. A new install
    continues."""
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
