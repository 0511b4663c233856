"""What survives the scheduler, and the rules of a deploy."""

from __future__ import annotations

import asyncio
import stat
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.core.dispatch.events import Event, FunctionRemoved, FunctionSet
from agent.core.errors import ConfigError, InvalidArgumentError, UnavailableError
from agent.core.provisioning.problem import Problem
from agent.core.types import DispatchPolicy
from agent.event_log import EventLog
from agent.scheduler.database.store import FunctionRow, Store
from agent.scheduler.functions.catalog import Catalog
from agent.scheduler.functions.deploy_rules import Defaults
from agent.scheduler.usage.collector import UsageDatabase
from agent.v1.function_service_pb2 import DeployFunctionRequest, HttpTrigger
from agent.v1.types_pb2 import FunctionSpec
from tests.fakes.clock import FakeClock

DEFAULTS = Defaults(policy=DispatchPolicy.SPREAD, wake_factor=0.5, queue_length=7, queue_timeout_ns=9)


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    made = Store(database_url)
    await made.open()
    yield made
    await made.close()


def catalog_on(store: Store) -> tuple[Catalog, list[Event]]:
    events: list[Event] = []
    clock = FakeClock()
    return Catalog(clock, EventLog(clock), store, events.append, lambda: None, DEFAULTS), events


def request(target: int = 1, name: str = "ocr", **spec: object) -> DeployFunctionRequest:
    message = FunctionSpec(name=name, entrypoint=["app"], **spec)  # type: ignore[arg-type]
    return DeployFunctionRequest(spec=message, target=target)


async def test_functions_and_nodes_come_back(store: Store) -> None:
    catalog, _ = catalog_on(store)
    await catalog.deploy(request(environment={"KEY": "secret"}))
    await store.put_node("gpu-1", 1)
    await store.put_node("gpu-1", 2)
    again, events = catalog_on(store)
    await again.load()
    found = again.find("ocr")
    assert found is not None
    assert dict(found.spec.environment) == {"KEY": "secret"}
    assert found == catalog.find("ocr")
    assert events == [FunctionSet("ocr", True, DispatchPolicy.SPREAD, 0.5, 7)]
    assert await store.nodes() == ["gpu-1"]
    assert "secret" not in repr(found)


async def test_only_the_owner_may_read_the_file(tmp_path: Path) -> None:
    (tmp_path / "scheduler.db").touch()
    (tmp_path / "scheduler.db").chmod(0o644)  # as a copy from a backup may have it
    store = Store(f"sqlite:///{tmp_path}/scheduler.db")
    await store.open()
    await store.close()
    assert stat.S_IMODE((tmp_path / "scheduler.db").stat().st_mode) == 0o600


async def test_the_schedulers_defaults_fill_fields_that_a_deploy_leaves_out(store: Store) -> None:
    catalog, _ = catalog_on(store)
    left_out, _ = await catalog.deploy(request())
    assert (left_out.spec.queue_length, left_out.spec.queue_timeout_ns) == (7, 9)
    said, _ = await catalog.deploy(request(queue_length=1))
    assert said.spec.queue_length == 1


async def test_another_spec_is_another_revision_another_target_is_not(store: Store) -> None:
    catalog, _ = catalog_on(store)
    revisions = []
    for wanted in (request(), request(), request(target=3), request(port=8080), request()):
        deployed, _ = await catalog.deploy(wanted)
        revisions.append(deployed.spec.revision)
    assert revisions == ["1", "1", "1", "2", "3"]


async def test_a_name_deployed_again_goes_on_counting(store: Store) -> None:
    catalog, events = catalog_on(store)
    await catalog.deploy(request())
    await catalog.delete("ocr")
    assert catalog.find("ocr") is None
    assert events[-1] == FunctionRemoved("ocr")
    await catalog.forget("ocr")
    again, _ = catalog_on(store)
    await again.load()
    deployed, _ = await again.deploy(request())
    assert deployed.spec.revision == "2", "request_ids of revision 1 are used up"


async def test_validate_only_changes_nothing(store: Store) -> None:
    catalog, events = catalog_on(store)
    wanted = request()
    wanted.validate_only = True
    deployed, _ = await catalog.deploy(wanted)
    assert deployed.spec.revision == "1"
    assert (catalog.find("ocr"), events, await store.functions()) == (None, [], [])


async def test_a_lasting_problem_ends_the_waiting_until_the_next_deploy(store: Store) -> None:
    catalog, events = catalog_on(store)
    await catalog.deploy(request())
    catalog.set_problem("ocr", Problem("NO_FREE_GPU", "all taken"))
    assert len(events) == 1
    catalog.set_problem("ocr", Problem("IMAGE_RUNTIME_UNAVAILABLE", "no engine", no_capacity_expected=True))
    assert events[-1] == FunctionSet("ocr", False, DispatchPolicy.SPREAD, 0.5, 7)
    await catalog.deploy(request())
    assert catalog.problem("ocr") is None
    assert events[-1] == FunctionSet("ocr", True, DispatchPolicy.SPREAD, 0.5, 7)


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        (request(name="no spaces"), "name"),
        (request(target=10_001), "target"),
        (request(port=0), "port"),
        (request(timeout_ns=0), "timeout_ns"),
        (request(queue_length=0), "queue_length"),
        (request(image=""), "image"),
        (request(environment={"BIG": "x" * 4096}), "environment"),
        (DeployFunctionRequest(spec=FunctionSpec(name="ocr"), target=1), "entrypoint"),
    ],
)
async def test_what_is_out_of_range_names_its_field(store: Store, wanted: DeployFunctionRequest, field: str) -> None:
    catalog, _ = catalog_on(store)
    with pytest.raises(InvalidArgumentError) as caught:
        await catalog.deploy(wanted)
    assert caught.value.metadata["field"] == field


async def test_methods_are_checked_and_one_open_trigger_opens_all(store: Store) -> None:
    catalog, _ = catalog_on(store)
    wanted = request()
    wanted.triggers.extend([HttpTrigger(name="a", methods=["get", "POST"])])
    deployed, _ = await catalog.deploy(wanted)
    assert deployed.methods == {b"GET", b"POST"}
    wanted.triggers.append(HttpTrigger(name="b"))
    deployed, _ = await catalog.deploy(wanted)
    assert deployed.methods == frozenset()
    wanted.triggers[0].methods.append("BREW")
    with pytest.raises(InvalidArgumentError, match="BREW"):
        await catalog.deploy(wanted)


async def test_a_broken_database_is_reported_without_its_url(tmp_path: Path) -> None:
    (tmp_path / "scheduler.db").write_bytes(b"this is not a database, whatever its name says" * 100)
    broken = Store(f"sqlite:///{tmp_path}/scheduler.db")
    with pytest.raises(UnavailableError) as caught:
        await broken.open()
    assert caught.value.reason == "STORE_FAILED"
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises(UnavailableError):
        await broken.put_function(FunctionRow("ocr", 1, b"", 1, b"", 0, 0))
    await broken.close()


def test_an_invalid_database_url_is_a_config_error_without_its_password() -> None:
    for url in ("nonsense", "foo://u:hunter2@db/h", "postgresql://u:hunter2@db:port/h"):
        with pytest.raises(ConfigError) as caught:
            Store(url)
        assert caught.value.reason == "DATABASE_INVALID"
        assert "hunter2" not in str(caught.value)


async def test_a_disk_that_hangs_is_an_error_by_its_deadline(tmp_path: Path) -> None:
    stuck = Store(f"sqlite:///{tmp_path}/scheduler.db", deadline_s=0.05)
    released = threading.Event()
    blocking = asyncio.get_running_loop().run_in_executor(stuck.database.executor, released.wait)
    with pytest.raises(UnavailableError) as caught:
        await stuck.functions()
    assert caught.value.reason == "STORE_FAILED"
    released.set()
    await blocking
    await stuck.close()


async def test_a_program_that_looks_into_the_database_does_not_take_its_log_away(tmp_path: Path) -> None:
    """What is written afterwards survives a SIGKILL: it is in a file that has a name."""
    path = tmp_path / "scheduler.db"
    store, usage = Store(f"sqlite:///{path}"), UsageDatabase.at(f"sqlite:///{path}")
    await store.open()
    await usage.open()
    look = "import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute('SELECT name FROM nodes').fetchall())"
    for nodes in ([], ["gpu-1"], ["gpu-1", "gpu-2"]):
        for name in nodes:
            await store.put_node(name, 1)
        seen = await asyncio.create_subprocess_exec(sys.executable, "-c", look, path, stdout=asyncio.subprocess.PIPE)
        out, _ = await seen.communicate()
        assert out.decode().strip() == str([(name,) for name in nodes])
    await store.close()
    usage.close()
