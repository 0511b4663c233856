"""One booted host for this folder (`machine`) with Hibernode installed (`site`), in the same state before every
test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.booted import root
from tests.booted.machine import Machine, sweep
from tests.booted.site import AGENT, INSTANCES, SCHEDULER, Site

HERE = Path(__file__).parent
TEST_DEADLINE_S = 400
FIRST_TEST_DEADLINE_S = 900
"""The first test builds the root file system if it is not cached."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = True
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.booted)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(FIRST_TEST_DEADLINE_S if first else TEST_DEADLINE_S))
            first = False


@pytest.fixture(scope="package")
def machine() -> Iterator[Machine]:
    """A freshly booted host without Hibernode; it ends with this folder's tests, not with the session."""
    if why := root.why_not():
        pytest.skip(why)
    sweep()
    host = Machine()
    try:
        try:
            host.boot()
        except root.NotHere as error:
            pytest.skip(str(error))
        yield host
    finally:
        host.close()


@pytest.fixture
def site(machine: Machine) -> Iterator[Site]:
    """Installed, configured, both daemons ready, two RUNNING instances of `echo`; changes of a test are undone."""
    site = Site(machine)
    if not machine.path("/usr/local/bin/hibernode").is_symlink():
        site.bring()
        site.install()
        site.configure()
    site.start()
    if len(site.instances()) != INSTANCES:
        site.deploy()
    try:
        yield site
    finally:
        if machine.path("/usr/local/bin/hibernode").is_symlink():
            _restore_configuration(site)


def _restore_configuration(site: Site) -> None:
    """Restore the configuration. The agent reads it at its next start; a test that needs another one starts it
    itself."""
    for unit in (AGENT, SCHEDULER):
        site.remove_drop_in("test", unit)
    site.configure_agent()
