"""PutProvisionConfig, its list and its end; what deploys make of it; and what is refused, with nothing half applied."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.core.errors import InvalidArgumentError, NotFoundError, UnavailableError
from agent.core.types import SECOND_NS, IdleMode
from agent.scheduler.database.store import FunctionRow, Store
from agent.v1 import function_service_pb2 as pb
from tests.scheduler.functions.autoscaler_rig import Rig, current_policy
from tests.wire.test_convert_provision import BAD, Change, config, morning, seed_policy


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    made = Store(f"sqlite:///{tmp_path}/scheduler.db")
    await made.open()
    yield made
    await made.close()


@pytest.fixture
def rig(store: Store) -> Rig:
    return Rig(store)


async def test_the_unedited_example_is_accepted_with_a_warning(rig: Rig) -> None:
    rig.clock.step_wall(3 * 365 * 86_400 * SECOND_NS)
    await rig.deploy(target=1)
    answer = await rig.put(target=1, target_tracking_policies=[seed_policy()])
    assert list(answer.warnings) == [
        "targetTrackingPolicies[0] scaling-policy-demo: window ended at 2024-07-30T16:00:00.000Z; the target stays"
    ]
    assert (answer.provision.target, answer.provision.decided_by) == (1, "")
    assert answer.provision.config.target_tracking_policies == [seed_policy()], "listed as it was put"


async def test_a_deploy_keeps_schedule_and_policies_unless_it_has_its_own(rig: Rig, store: Store) -> None:
    await rig.deploy(target=1)
    await rig.put(target=1, scheduled_actions=[morning()], target_tracking_policies=[current_policy()])
    await rig.deploy(target=3, port=8080)
    assert (rig.ocr.default_target, rig.ocr.target, rig.ocr.spec.revision) == (3, 2, "2")
    assert rig.ocr.config.scheduled_actions == [morning()]
    await rig.deploy(target=3, port=8080, provision=pb.ProvisionConfig())
    assert (rig.ocr.target, rig.ocr.config) == (3, pb.ProvisionConfig())
    assert await store.provision_configs() == {}


async def test_always_allocate_gpu_makes_a_revision_only_when_it_changes(rig: Rig) -> None:
    await rig.deploy(target=1)
    seen = []
    for always in (False, True, True, None, False):
        given = {} if always is None else {"always_allocate_gpu": always}
        answer = await rig.put(**given)
        seen.append((rig.ocr.spec.revision, answer.provision.always_allocate_gpu, rig.ocr.spec.idle.mode))
    idle, never = IdleMode.REQUIRE, IdleMode.NEVER
    assert seen == [("1", False, idle), ("2", True, never), ("2", True, never), ("2", True, never), ("3", False, idle)]


async def test_put_list_and_delete(rig: Rig, store: Store) -> None:
    await rig.deploy(target=0)
    assert await rig.listed() == []
    await rig.put(target=0, target_tracking_policies=[current_policy()])
    rig.instances(2)
    (one,) = await rig.listed()
    assert (one.function, one.target, one.current, one.config.default_target) == ("ocr", 2, 2, 0)
    assert one.policies == [pb.Provision.PolicyState(name="scaling-policy-demo", active=True, target=2)]
    function = (await rig.servicer.GetFunction(pb.GetFunctionRequest(name="ocr"), None)).function
    assert (function.target, function.default_target) == (2, 0)
    await rig.servicer.DeleteProvisionConfig(pb.DeleteProvisionConfigRequest(function="ocr"), None)
    assert (rig.ocr.target, await store.provision_configs()) == (0, {})
    assert await rig.listed() == []


async def test_a_deleted_function_takes_its_provisioning_with_it(rig: Rig, store: Store) -> None:
    await rig.deploy()
    await rig.put(target_tracking_policies=[current_policy()])
    await rig.catalog.delete("ocr")
    assert await store.provision_configs() == {}
    rig.scaler.check()
    assert [one.target for one in rig.catalog.all()] == [0], "no policy holds on to its instances"
    await rig.deploy(target=1)
    assert (rig.ocr.target, rig.ocr.config) == (1, pb.ProvisionConfig())


async def test_validate_only_changes_nothing(rig: Rig, store: Store) -> None:
    await rig.deploy(target=1)
    before = rig.ocr
    given = pb.ProvisionConfig(default_target=9, always_allocate_gpu=True, scheduled_actions=[morning()])
    request = pb.PutProvisionConfigRequest(function="ocr", config=given, validate_only=True)
    answer = await rig.servicer.PutProvisionConfig(request, None)
    assert answer.provision.config.default_target == 9
    assert (rig.ocr, await store.provision_configs()) == (before, {})


def too_many(given: pb.ProvisionConfig) -> None:
    given.default_target = 10_001


def negative(given: pb.ProvisionConfig) -> None:
    given.default_target = -1


WRONG: list[tuple[Change, str]] = [
    *((change, field) for change, field, _ in BAD),
    (too_many, "default_target"),
    (negative, "default_target"),
]


@pytest.mark.parametrize(("change", "field"), WRONG, ids=[f"{n}-{one[1]}" for n, one in enumerate(WRONG)])
async def test_of_what_is_wrong_nothing_is_applied(rig: Rig, store: Store, change: Change, field: str) -> None:
    await rig.deploy(target=1)
    before, row = rig.ocr, await store.functions()
    given = config()
    given.default_target, given.always_allocate_gpu = 7, True
    change(given)
    request = pb.PutProvisionConfigRequest(function="ocr", config=given)
    with pytest.raises(InvalidArgumentError) as caught:
        await rig.servicer.PutProvisionConfig(request, None)
    assert caught.value.metadata["field"] == field
    assert (rig.ocr, await store.functions(), await store.provision_configs()) == (before, row, {})
    if field == "default_target":
        return  # a deploy has a target of its own
    with pytest.raises(InvalidArgumentError):
        await rig.deploy(target=7, provision=given)
    assert (rig.ocr, await store.functions(), await store.provision_configs()) == (before, row, {})


async def test_what_could_not_be_stored_is_not_in_effect(
    rig: Rig, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await rig.deploy(target=1)
    before = rig.ocr

    async def fails(row: FunctionRow, provision: bytes | None = None) -> None:
        raise UnavailableError("STORE_FAILED", "no")

    monkeypatch.setattr(store, "put_function", fails)
    with pytest.raises(UnavailableError):
        await rig.put(target=4, target_tracking_policies=[current_policy()])
    assert rig.ocr == before


async def test_the_first_policies_with_default_target_0_refuse_no_request(rig: Rig) -> None:
    """The autoscaler checks right after: until then no request may be refused."""
    await rig.deploy(target=2)
    assert rig.busy(1) == [], "it waits: the instances are not there yet"
    await rig.put(target=0, target_tracking_policies=[current_policy()])
    assert (rig.ocr.target, rig.ocr.default_target) == (2, 0)
    assert rig.dispatcher.queue_state("ocr").queued == 1
    await rig.put(target=0, target_tracking_policies=[seed_policy()])
    assert rig.ocr.target == 0, "no window is open"
    assert rig.dispatcher.queue_state("ocr").queued == 0, "no instance is expected"


async def test_provisioning_of_a_function_that_is_not_there(rig: Rig) -> None:
    with pytest.raises(NotFoundError, match="hibernode functions"):
        await rig.put()
    with pytest.raises(NotFoundError):
        await rig.servicer.DeleteProvisionConfig(pb.DeleteProvisionConfigRequest(function="ocr"), None)
