"""What is stored and can't be read today keeps its row, its instances and its target; the rest goes on."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.core.dispatch.events import Event, FunctionSet
from agent.core.errors import PreconditionError
from agent.core.types import DispatchPolicy
from agent.scheduler.database.store import FunctionRow, Store
from agent.v1 import function_service_pb2 as pb
from agent.v1.types_pb2 import FunctionSpec, Instance
from tests.scheduler.functions.autoscaler_rig import Rig, current_policy
from tests.scheduler.functions.provisioner_rig import ProvisionerRig
from tests.scheduler.gateway.rig import gateway_rig
from tests.wire.test_convert_provision import morning

ALWAYS = {"start_time": "2020-01-01T00:00:00Z", "end_time": "2090-01-01T00:00:00Z"}
EVERY_SECOND = "cron(* * * * * *)"
NEW_ENUM = 77
"""A value that a newer version has."""


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    made = Store(f"sqlite:///{tmp_path}/scheduler.db")
    await made.open()
    yield made
    await made.close()


@pytest.fixture
def rig(store: Store) -> Rig:
    return Rig(store)


def action(name: str, target: int, zone: str = "Europe/Berlin", **other: object) -> pb.ScheduledAction:
    fields = {**ALWAYS, "schedule_expression": EVERY_SECOND, "time_zone": zone, **other}
    return morning(name=name, target=target, **fields)


async def the_row(store: Store) -> FunctionRow:
    (row,) = await store.functions()
    return row


async def lose_zone(store: Store) -> None:
    """The zone of the action `west` is one that this host does not know any more."""
    row, stored = await the_row(store), (await store.provision_configs())["ocr"]
    config = pb.ProvisionConfig.FromString(stored)
    for one in config.scheduled_actions:
        if one.name == "west":
            one.time_zone = "Nowhere/Land"
    await store.put_function(row, config.SerializeToString())


async def find_zone(store: Store) -> None:
    row, stored = await the_row(store), (await store.provision_configs())["ocr"]
    await store.put_function(row, stored.replace(b"Nowhere/Land", b"Pacific/Apia"))


# ---- schedule and policies --------------------------------------------------------------------------------------


async def test_the_last_target_stays_if_the_only_action_cannot_be_read_any_more(rig: Rig, store: Store) -> None:
    await rig.deploy(target=1)
    await rig.put(1, scheduled_actions=[action("west", 4)])
    rig.pass_time(2)
    assert rig.ocr.target == 4
    await lose_zone(store)
    again = await rig.restarted(store)
    again.pass_time(5, reporting=False)
    assert (again.ocr.target, again.ocr.decided_by) == (4, "west")
    third = await again.restarted(store)
    assert third.ocr.target == 4, "still after another restart, on a host that holds no instance any more"


async def test_users_see_which_one_why_and_what_to_do(rig: Rig, store: Store) -> None:
    await rig.deploy(target=1)
    await rig.put(1, scheduled_actions=[action("west", 1)])
    await lose_zone(store)
    again = await rig.restarted(store)
    again.instances(1)
    again.loads["i0"].revision = "1"
    again.report()
    (listed,) = await again.listed()
    assert listed.current_error_reason == "PROVISION_UNREADABLE"
    for part in ("'west'", "'Nowhere/Land'", "started again", "put again"):
        assert part in listed.current_error
    shown = await again.servicer.ListFunctions(pb.ListFunctionsRequest(), None)
    assert shown.functions[0].current_error_reason == "PROVISION_UNREADABLE"
    assert shown.functions[0].state == pb.Function.STATE_READY, "it has the instances it should have"
    assert listed.config.scheduled_actions[0].time_zone == "Nowhere/Land", "listed as it is, for people to mend"
    (event,) = [one for one in again.event_log.read(function="ocr") if one.level == "error"]
    assert event.name == "provision.not_understood"
    assert all(part in event.message for part in ("'west'", "'Nowhere/Land'"))


async def test_what_can_be_read_goes_on_and_heals(rig: Rig, store: Store) -> None:
    noon = action("noon", 5, schedule_expression="at(2023-11-15T00:00:00)", time_zone="")
    await rig.deploy(target=1)
    await rig.put(1, scheduled_actions=[action("west", 2, schedule_expression="at(2022-01-01T00:00:00)"), noon])
    rig.pass_time(1)
    assert rig.ocr.target == 2
    await lose_zone(store)
    again = await rig.restarted(store)
    assert again.ocr.target == 2
    again.clock.advance(8 * 3600 * 10**9)
    again.pass_time(1)
    assert (again.ocr.target, again.ocr.decided_by) == (5, "noon"), "the readable action fires"
    assert again.last.get("ocr") == 2, "the last target is the last one that all had a part in"
    await find_zone(store)
    healed = await again.restarted(store)
    assert (await healed.listed())[0].current_error == ""
    assert not [one for one in healed.event_log.read() if one.level == "error"]
    healed.pass_time(1)
    assert healed.last.get("ocr") == healed.ocr.target


async def test_a_policy_that_cannot_be_read_holds_what_it_had_scaled_out_to(rig: Rig, store: Store) -> None:
    await rig.deploy(target=1)
    await rig.put(1, target_tracking_policies=[current_policy(name="load", min_capacity=1, max_capacity=30)])
    rig.instances(10)
    rig.busy(10)
    rig.periods(3)
    assert rig.ocr.target == 30
    row, stored = await the_row(store), (await store.provision_configs())["ocr"]
    config = pb.ProvisionConfig.FromString(stored)
    config.target_tracking_policies[0].metric_type = NEW_ENUM  # type: ignore[assignment]
    await rig.last.write()
    await store.put_function(row, config.SerializeToString())
    again = await rig.restarted(store)
    again.instances(10)
    again.periods(6)
    assert again.ocr.target == 30
    assert "'load'" in (await again.listed())[0].current_error


async def test_without_a_stored_last_target_the_instances_there_are_count(rig: Rig, store: Store) -> None:
    """The database is of a version that did not store it."""
    await rig.deploy(target=1)
    await rig.put(1, scheduled_actions=[action("west", 4)])
    await lose_zone(store)
    again = Rig(store)
    await again.catalog.load()
    again.fleet.expect("n1")
    again.scaler.check()
    assert again.scaler.waiting, "nothing is decided before the nodes have reported"
    again.instances(4)
    assert (again.ocr.target, again.targets) == (4, [4])
    assert again.last.get("ocr") == 4


async def test_an_entry_whose_window_is_over_in_every_zone_holds_nothing(rig: Rig, store: Store) -> None:
    over = action("west", 9, start_time="2022-01-01T00:00:00", end_time="2023-11-12T00:00:00")
    await rig.deploy(target=3)
    await rig.put(3, scheduled_actions=[over, action("all", 2, zone="")])
    await lose_zone(store)
    again = await rig.restarted(store)
    assert (again.ocr.target, again.ocr.decided_by) == (2, "all")


async def test_a_damaged_config_holds_the_last_target_and_is_kept_by_a_deploy(rig: Rig, store: Store) -> None:
    await rig.deploy(target=1)
    await rig.put(1, scheduled_actions=[action("west", 4)])
    await rig.last.write()
    await store.put_function(await the_row(store), b"\x1a\xff")
    again = await rig.restarted(store)
    assert again.ocr.target == 4
    assert "damaged" in (await again.listed())[0].current_error
    await again.deploy(target=1, handler="other")
    assert (again.ocr.target, (await store.provision_configs())["ocr"]) == (4, b"\x1a\xff")
    await again.put(1)
    assert (again.ocr.target, (await again.listed())[0].current_error) == (1, "")


async def test_rules_of_a_new_version_do_not_concern_what_is_stored(rig: Rig, store: Store) -> None:
    """`target` 20,000 is against today's rules, and can be read."""
    await rig.deploy(target=1)
    config = pb.ProvisionConfig(scheduled_actions=[action("x" * 65, 20_000, zone="")])
    await store.put_function(await the_row(store), config.SerializeToString())
    again = await rig.restarted(store)
    assert again.ocr.target == 20_000
    assert (await again.listed())[0].current_error == ""


# ---- the target while the store writes --------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["deploy", "put"])
async def test_a_target_decided_while_the_store_writes_stays(
    rig: Rig, store: Store, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Else the dispatcher would refuse the waiting requests of a function whose target is not 0 any more."""
    at_ten = action("up", 3, schedule_expression="at(2023-11-14T22:13:22)", time_zone="")
    await rig.deploy(target=0, provision=pb.ProvisionConfig(scheduled_actions=[at_ten]))
    announced: list[bool] = []
    write, apply = store.put_function, rig.catalog._apply_event

    def announce(event: Event) -> None:
        assert isinstance(event, FunctionSet)
        announced.append(event.expects_instances)
        apply(event)

    async def slow(row: FunctionRow, provision: bytes | None = None) -> None:
        await write(row, provision)
        rig.pass_time(3, reporting=False)
        assert rig.ocr.target == 3
        monkeypatch.setattr(rig.catalog, "_apply_event", announce)

    monkeypatch.setattr(store, "put_function", slow)
    if call == "deploy":
        await rig.deploy(target=0, handler="other")
    else:
        await rig.put(1, scheduled_actions=[at_ten])
    assert rig.ocr.target == 3
    assert announced
    assert all(announced)


# ---- functions --------------------------------------------------------------------------------------------------


async def test_a_spec_of_a_newer_version_is_served_with_what_can_be_read(rig: Rig, store: Store) -> None:
    await rig.deploy(target=2, instance_concurrency=7)
    message = FunctionSpec.FromString((await the_row(store)).spec)
    message.dispatch = NEW_ENUM  # type: ignore[assignment]
    message.idle_policy.mode = NEW_ENUM  # type: ignore[assignment]
    await store.put_function(replace(await the_row(store), spec=message.SerializeToString()))
    again = await rig.restarted(store)
    assert (again.ocr.spec.instance_concurrency, again.ocr.spec.dispatch) == (7, DispatchPolicy.PACK)
    assert again.ocr.message == message, "agents get it as it is, and may know it"
    assert (await again.listed())[0].current_error_reason == "FUNCTION_UNREADABLE"
    await again.put(3)
    assert (again.ocr.target, again.ocr.message) == (3, message)


@pytest.mark.parametrize("damage", [b"\xff\xff\xff", b"", FunctionSpec(name="other", revision="1").SerializeToString()])
async def test_a_damaged_function_keeps_its_instances_until_it_is_deployed_again(tmp_path: Path, damage: bytes) -> None:
    store = Store(f"sqlite:///{tmp_path}/scheduler.db")
    await store.open()
    rig = ProvisionerRig(store)
    await rig.deploy(target=2)
    await rig.rounds(3)
    assert rig.uids() == {"i1", "i2"}
    row = await the_row(store)
    await store.put_function(replace(row, spec=damage))
    again = ProvisionerRig(store)
    again.agents["n1"].loads.update(rig.loads)
    await again.catalog.load()
    await again.rounds(3, 10)
    assert (again.uids(), again.creates, again.stops) == ({"i1", "i2"}, [], [])
    (event,) = [one for one in again.event_log.read(function="ocr") if one.name == "function.not_understood"]
    assert (event.level, event.count, "deploy it again" in event.message) == ("error", 1, True)
    assert again.reason() == "FUNCTION_UNREADABLE"
    with pytest.raises(PreconditionError, match="deploy it again"):
        await again.catalog.put_provision("ocr", pb.ProvisionConfig(default_target=0))
    assert (await the_row(store)).spec == damage
    await again.deploy(target=1)
    await again.rounds(6, 3)
    assert (len(again.uids()), again.reason()) == (1, "")
    assert {load.request_id for load in again.loads.values()} == {"ocr/2/0/1"}, "of the next revision"
    await store.close()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("UPDATE functions SET spec = 'text'", "FUNCTION_UNREADABLE"),
        ("UPDATE functions SET triggers = 5", "FUNCTION_UNREADABLE"),
        ("UPDATE provision_configs SET config = 'text'", "PROVISION_UNREADABLE"),
    ],
)
async def test_a_value_that_is_not_even_bytes_keeps_no_scheduler_from_starting(
    rig: Rig, store: Store, tmp_path: Path, damage: str, reason: str
) -> None:
    """SQLite's columns hold values of any type."""
    await rig.deploy(target=1)
    await rig.put(1, scheduled_actions=[action("west", 1)])
    with sqlite3.connect(tmp_path / "scheduler.db") as other:
        assert other.execute(damage).rowcount == 1
    other.close()
    again = await rig.restarted(store)
    assert (await again.listed())[0].current_error_reason == reason


async def test_a_damaged_function_can_be_deleted(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/scheduler.db")
    await store.open()
    rig = ProvisionerRig(store)
    await rig.deploy(target=1)
    await rig.rounds(3)
    await store.put_function(replace(await the_row(store), spec=b"\xff"))
    again = ProvisionerRig(store)
    again.agents["n1"].loads.update(rig.loads)
    await again.catalog.load()
    await again.catalog.delete("ocr")
    await again.rounds(3, 3)
    assert (again.uids(), await store.functions()) == (set(), [])
    await store.close()


@pytest.mark.parametrize(
    "triggers",
    [
        b"\xff\xff",
        pb.Function(triggers=[pb.HttpTrigger(name="t", auth_type=pb.HttpTrigger.AUTH_TYPE_JWT)]).SerializeToString(),
    ],
)
async def test_nobody_may_call_a_function_whose_triggers_cannot_be_read(tmp_path: Path, triggers: bytes) -> None:
    """They may ask for authentication that this version lacks."""
    async with gateway_rig(str(tmp_path), "n1") as rig:
        await rig.deploy()
        rig.instance("i1")
        store = rig.catalog._store
        await store.put_function(replace(await the_row(store), triggers=triggers))
        await rig.catalog.load()
        wire = await rig.wire()
        await wire.send(b"GET /fn/ocr/ HTTP/1.1\r\nhost: g\r\n\r\n")
        status, _, body = await wire.message()
        assert (status, b"FunctionUnreadable" in body) == (503, True)
        with pytest.raises(PreconditionError):
            await rig.catalog.put_provision("ocr", pb.ProvisionConfig(default_target=1))


# ---- answers of a newer agent -----------------------------------------------------------------------------------


async def test_an_instance_in_a_state_of_another_version_is_not_made_twice(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/scheduler.db")
    await store.open()
    rig = ProvisionerRig(store)
    rig.answer = lambda request_id: Instance(uid="i1", state=NEW_ENUM)  # type: ignore[arg-type]
    await rig.deploy(target=1)
    await rig.rounds(10, 20)
    assert set(rig.creates) == {"ocr/1/0/1"}, "one request_id, which its agent answers with one instance"
    assert rig.reason() == "UNKNOWN_ENUM_VALUE"
    rig.answer = rig.running
    await rig.rounds(3, 20)
    assert (set(rig.creates), rig.reason()) == ({"ocr/1/0/1"}, "")
    await store.close()
