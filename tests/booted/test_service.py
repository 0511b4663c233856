"""The units under a real systemd: instances and queued requests survive every stop and start of the agent."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from agent.examples.echo.__main__ import expected_answer
from tests.booted.load import under_load
from tests.booted.site import AGENT, GATEWAY, GPUS, INSTANCES, SCHEDULER, Site

Show = Callable[[str], None]
WATCHDOG_S = 3


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    """Print a measurement into the test's output."""

    def say(text: str) -> None:
        with capsys.disabled():
            print(f"\n    {text}")  # noqa: T201 - the point of it

    return say


def ready(site: Site) -> bool:
    return site.machine.show(AGENT, "ActiveState") == "active"


@contextmanager
def same_instances(site: Site) -> Iterator[None]:
    """Check that the same processes of the same instances run before and after, in the same cgroups of the unit."""
    before = site.pids(), site.cgroups()
    assert len(before[0]) == INSTANCES
    assert all(path.startswith(f"/system.slice/{AGENT}/hibernode-") for path in before[1].values()), before[1]
    yield
    assert (site.pids(), site.cgroups()) == before
    assert {one["uid"] for one in site.instances()} == set(before[0])


def ask(site: Site, path: str, deadline_s: int = 30) -> subprocess.Popen[str]:
    """Send a request through the gateway from inside the host; prints the body, fails unless it is 200."""
    fetch = (
        f"import urllib.request as r\nprint(r.urlopen('{GATEWAY}/fn/echo{path}', timeout={deadline_s}).read().decode())"
    )
    return subprocess.Popen(
        [*site.machine.entry("-a"), "/usr/bin/python3", "-c", fetch],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ready_follows_the_recovery_of_every_instance(site: Site) -> None:
    """A driver that does not answer delays the recovery, and READY with it."""
    machine = site.machine
    with same_instances(site):
        machine.run("systemctl", "stop", AGENT)
        machine.run("systemctl", "kill", "--signal=STOP", GPUS)
        try:
            machine.run("systemctl", "start", "--no-block", AGENT)
            machine.until("the agent is being started", lambda: machine.main_pid(AGENT) != 0)
            for _ in range(5):
                time.sleep(0.3)  # to show that nothing happens
                assert machine.show(AGENT, "ActiveState") == "activating"
                assert site.agent_says("/readyz") != 200
        finally:
            machine.run("systemctl", "kill", "--signal=CONT", GPUS)
        machine.run("systemctl", "start", AGENT)  # returns with READY=1
        states = [one["state"] for one in site.instances()]
        assert states == ["RUNNING"] * INSTANCES, machine.journal(AGENT)
        assert site.agent_says("/readyz") == 200


def test_restart_under_load_loses_nothing(site: Site, show: Show) -> None:
    with same_instances(site):
        old = site.machine.main_pid(AGENT)
        with under_load(site.machine) as load:
            site.machine.run("systemctl", "restart", AGENT)
            load.go_on(20)
        assert site.machine.main_pid(AGENT) not in (0, old)
    assert not load.failed, load.failed[:5]
    show(f"systemctl restart under load: {load.summary()}")


def test_sigkill_under_load_costs_only_running_requests(site: Site, show: Show) -> None:
    """At most one request per slot is inside; those in the gateway's queue only wait."""
    machine = site.machine
    with same_instances(site):
        old = machine.main_pid(AGENT)
        with under_load(machine) as load:
            machine.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", AGENT)
            machine.until("its kernel has closed its connections", lambda: machine.main_pid(AGENT) != old)
            killed = time.monotonic_ns()
            machine.until(
                "systemd has started another", lambda: machine.main_pid(AGENT) not in (0, old) and ready(site)
            )
            back = time.monotonic_ns()
            load.go_on(20)
    assert len(load.failed) <= INSTANCES, load.failed
    assert all(one.status == 502 and one.began_ns < killed for one in load.failed), load.failed
    show(f"kill -9 under load, agent back after {(back - killed) / 1e9:.1f} s: {load.summary()}")


def test_watchdog_replaces_a_stuck_agent(site: Site, show: Show) -> None:
    """A stopped process runs no loop and handles no SIGABRT: systemd kills it after TimeoutAbortSec."""
    machine = site.machine
    with same_instances(site):
        site.drop_in("test", f"[Service]\nWatchdogSec={WATCHDOG_S}s\nTimeoutAbortSec=1s\n")
        machine.run("systemctl", "restart", AGENT)
        old = machine.main_pid(AGENT)
        time.sleep(WATCHDOG_S + 1)  # a fed agent lives on
        assert machine.main_pid(AGENT) == old
        with under_load(machine) as load:
            stuck = time.monotonic()
            machine.run("kill", "-STOP", str(old))
            machine.until(
                "the watchdog has replaced it", lambda: machine.main_pid(AGENT) not in (0, old) and ready(site)
            )
            seconds = time.monotonic() - stuck
            load.go_on(20)
        assert "watchdog" in machine.journal(AGENT).lower()
    assert len(load.failed) <= INSTANCES, load.failed
    show(f"stuck, with WatchdogSec={WATCHDOG_S}s back after {seconds:.1f} s: {load.summary()}")


def test_watchdog_leaves_thread_stacks_in_the_journal(site: Site) -> None:
    """systemd sends SIGABRT first: an agent stuck in Python prints its stacks."""
    machine = site.machine
    with same_instances(site):
        old = machine.main_pid(AGENT)
        machine.run("systemctl", "kill", "--kill-whom=main", "--signal=ABRT", AGENT)
        machine.until("systemd has started another", lambda: machine.main_pid(AGENT) not in (0, old) and ready(site))
        said = machine.journal(AGENT, 200)
    assert "Fatal Python error: Aborted" in said
    assert "in run_until_signal" in said or "in daemon_main" in said, said[-3000:]


def test_scheduler_restart_is_a_pause_for_clients(site: Site, show: Show) -> None:
    """systemd keeps the gateway's socket: new clients wait in the kernel, and requests inside are answered first."""
    with same_instances(site), under_load(site.machine) as load:
        site.machine.run("systemctl", "restart", SCHEDULER)
        load.go_on(20)
    assert not load.failed, [one.text for one in load.failed]
    show(f"systemctl restart of the scheduler under load: {load.summary()}")


def test_stop_leaves_instances_and_requests_wait_for_the_next_agent(site: Site) -> None:
    machine = site.machine
    sleeper = site.instances()[0]["uid"]
    machine.run("hibernode", "freeze", sleeper)
    with same_instances(site):
        machine.run("systemctl", "stop", AGENT)
        assert machine.show(AGENT, "Result") == "success"
        machine.run("systemctl", "daemon-reload")
        left = site.pids()
        assert len(left) == INSTANCES
        waiting = [ask(site, f"/answer?n={number}", 60) for number in range(4)]
        try:
            machine.run("systemctl", "start", AGENT)
            answers = [one.communicate(timeout=60)[0].strip() for one in waiting]
        finally:
            for one in waiting:
                one.kill()
                one.wait(10)
        assert answers == [expected_answer(number) for number in range(4)]
        events = machine.run("hibernode", "events", sleeper)
        assert "instance.recovered" in machine.journal(AGENT, 30) + events


def test_stop_ends_instances_with_on_stop_stop(site: Site) -> None:
    """Running requests finish first, even if that takes longer than watchdog and unit allow: the leaving agent extends
    its timeout."""
    machine = site.machine
    site.configure_agent(on_stop="stop")
    site.drop_in("test", f"[Service]\nWatchdogSec={WATCHDOG_S}s\nTimeoutStopSec={WATCHDOG_S}s\n")
    machine.run("systemctl", "restart", AGENT)  # the old configuration, `leave`, still applies to these instances
    assert len(site.pids()) == INSTANCES
    slow = ask(site, f"/sleep?ms={(WATCHDOG_S + 2) * 1000}")
    machine.until("the request is inside", lambda: any(one["in_flight"] for one in site.instances()))
    machine.run("systemctl", "stop", AGENT)
    assert slow.communicate(timeout=30)[0].strip().startswith('{"slept_ms"')
    assert machine.show(AGENT, "Result") == "success"
    assert not site.pids()
    assert not list(machine.path("/var/lib/hibernode/agent/instances").iterdir())
    cgroups = ("find", "/sys/fs/cgroup", "-name", AGENT)
    machine.until("the unit's cgroup is gone", lambda: machine.run(*cgroups).strip() == "")


def test_manager_environment_does_not_reach_the_daemons(site: Site) -> None:
    """A foreign library or module would run as root on a GPU host."""
    machine = site.machine
    foreign = {"LD_PRELOAD": "/srv/foreign.so", "PYTHONPATH": "/srv/foreign", "LD_AUDIT": "/srv/foreign.so"}
    # The emulated driver's drop-in clears nothing; here it clears what the unit does, except its own library path.
    unit = machine.path(f"/etc/systemd/system/{AGENT}").read_text()
    cleared = next(line for line in unit.splitlines() if line.startswith("UnsetEnvironment="))
    assert "LD_LIBRARY_PATH" in cleared
    site.drop_in("test", f"[Service]\n{cleared.replace('LD_LIBRARY_PATH', '')}\n")
    machine.run("systemctl", "set-environment", *(f"{name}={value}" for name, value in foreign.items()))
    try:
        for unit_name in (SCHEDULER, AGENT):
            machine.run("systemctl", "restart", unit_name)
            pid = machine.main_pid(unit_name)
            environment = machine.run("cat", f"/proc/{pid}/environ")
            assert "/srv/foreign" not in environment
    finally:
        machine.run("systemctl", "unset-environment", *foreign)


def test_agent_ends_on_sigterm_during_its_start(site: Site) -> None:
    """SIGTERM before READY: systemd need not wait for TimeoutStopSec and kill."""
    machine = site.machine
    with same_instances(site):
        machine.run("systemctl", "stop", AGENT)
        machine.run("systemctl", "kill", "--signal=STOP", GPUS)
        try:
            machine.run("systemctl", "start", "--no-block", AGENT)
            machine.until("the agent is being started", lambda: machine.main_pid(AGENT) != 0)
            began = time.monotonic()
            machine.run("systemctl", "stop", AGENT)
            assert time.monotonic() - began < 20
        finally:
            machine.run("systemctl", "kill", "--signal=CONT", GPUS)
        machine.run("systemctl", "start", AGENT)
