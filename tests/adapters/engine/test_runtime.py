"""The engine runtime's starts and listings, against a stand-in. On real engines: `tests/engines/`."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from agent.adapters.engine.container_config import INSTANCE_LABEL, STATE_LABEL
from agent.adapters.engine.containers import ListedContainer
from agent.adapters.engine.runtime import LEAVE_DEADLINE_S
from agent.core.errors import (
    ConflictError,
    HibernodeError,
    InstanceError,
    InvalidArgumentError,
    PreconditionError,
    UnavailableError,
)
from agent.core.types import ContainerOptions, FunctionSpec, Volume
from agent.settings import EngineRuntimeSettings as EngineSettings
from tests.adapters.engine.rig import EngineRig
from tests.adapters.engine.rig import rig as rig  # noqa: PLC0414 - pytest finds the fixture by this name
from tests.adapters.engine.stand_in import Refusal, StandInContainer


async def refused(rig: EngineRig, reason: str, uid: str = "resize-a", **spec: str) -> HibernodeError:
    """Expect a start to fail with `reason` and to leave nothing."""
    with pytest.raises(HibernodeError) as raised:
        await rig.runtime.start(rig.spec(uid, **spec))
    assert raised.value.reason == reason, raised.value
    assert rig.engine.containers == {}
    assert rig.bundles.all() == []
    return raised.value


async def test_started_container_is_recorded(rig: EngineRig) -> None:
    handle = await rig.runtime.start(rig.spec("resize-a"))
    container = rig.container(handle)
    assert container.name == "hibernode-resize-a"
    assert container.config["Labels"][STATE_LABEL] == rig.state_uuid
    assert container.config["Labels"][INSTANCE_LABEL] == "resize-a"
    assert (handle.host, handle.port, handle.sees_all_gpus) == ("172.30.0.2", 9000, False)
    assert handle.process.pid == container.pid
    assert handle.cgroup == str(rig.slice.path / handle.container_id)
    bundle = rig.bundles.read("resize-a")
    assert bundle
    assert bundle.container == handle
    assert not rig.bundles.scratch("resize-a").exists()


async def test_bridge_ports_are_isolated(rig: EngineRig) -> None:
    first, second = rig.plug("veth7"), rig.plug("veth8")
    await rig.runtime.start(rig.spec("resize-a"))
    assert (first.read_text(), second.read_text()) == ("1", "1")


async def test_container_that_cannot_be_isolated_does_not_run(rig: EngineRig) -> None:
    shutil.rmtree(rig.bridges)
    error = await refused(rig, "NETWORK_FAILED")
    assert "CAP_NET_ADMIN" in error.message
    (rig.bridges / rig.network.bridge / "brif").mkdir(parents=True)
    assert "no port" in (await refused(rig, "NETWORK_FAILED")).message


async def test_process_in_a_foreign_cgroup_is_not_adopted(rig: EngineRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """That cgroup belongs to another owner and would be frozen and killed."""
    run = rig.engine.run
    stranger = rig.engine.make("stranger", {}, "/bin/sleep", "1000")
    await run(stranger)

    async def mistaken(one: StandInContainer) -> None:
        one.process, one.pid = stranger.process, stranger.pid

    monkeypatch.setattr(rig.engine, "run", mistaken)
    with pytest.raises(InstanceError, match="on the engine's own host") as raised:
        await rig.runtime.start(rig.spec("resize-a"))
    assert raised.value.reason == "CGROUP_UNKNOWN"
    assert rig.bundles.all() == []


async def test_early_exit_reports_exit_and_log(rig: EngineRig, monkeypatch: pytest.MonkeyPatch) -> None:
    run = rig.engine.run

    async def to_its_end(one: StandInContainer) -> None:
        await run(one)
        assert one.process
        await one.process.wait()

    monkeypatch.setattr(rig.engine, "run", to_its_end)
    rig.engine.logs = b"no module named torch\n"
    with pytest.raises(InstanceError, match=r"exited with code 3\. Logs: no module named torch") as raised:
        await rig.runtime.start(rig.spec("resize-a", "/bin/sh", "-c", "exit 3"))
    assert raised.value.reason == "FUNCTION_NOT_STARTED"
    assert rig.engine.containers == {}


async def test_network_is_created_once_and_removed_by_the_agent(rig: EngineRig) -> None:
    handles = await asyncio.gather(*(rig.runtime.start(rig.spec(f"resize-{letter}")) for letter in "abc"))
    assert rig.engine.calls["POST create"] == 4  # three containers and a network
    assert list(rig.engine.networks) == [rig.network.name]
    for handle in handles:
        await rig.runtime.destroy(handle)
    assert list(rig.engine.networks) == [rig.network.name], "the next start is quick"
    await rig.runtime.close()
    assert rig.engine.networks == {}
    rig.restart()


async def test_network_stays_while_a_container_uses_it(rig: EngineRig) -> None:
    await rig.runtime.start(rig.spec("resize-a"))
    await rig.runtime.close()
    assert list(rig.engine.networks) == [rig.network.name]
    rig.restart()


async def test_network_is_removed_after_a_check_that_took_too_long(rig: EngineRig) -> None:
    """On a busy host one late answer marks the engine as unavailable; the next call may find it well."""
    await rig.runtime.destroy(await rig.runtime.start(rig.spec("resize-a")))
    rig.api._deadline_s = 0.2
    rig.engine.hanging.add("GET version")
    with pytest.raises(UnavailableError):
        await rig.runtime.check()
    rig.engine.hanging.clear()
    rig.api._deadline_s = 60.0
    assert rig.runtime.health
    await rig.runtime.close()
    assert rig.engine.networks == {}
    rig.restart()


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (403, "network has active endpoints"),
        (409, "network is being used"),
        (500, "failed to set IFF_DOWN: device or resource busy"),
    ],
)
async def test_network_that_stays_in_use_is_reported_and_bounded(
    rig: EngineRig, monkeypatch: pytest.MonkeyPatch, status: int, text: str
) -> None:
    await rig.runtime.destroy(await rig.runtime.start(rig.spec("resize-a")))
    monkeypatch.setattr("agent.adapters.engine.runtime.NETWORK_PAUSE_S", 0.01)
    rig.engine.refusals["DELETE networks"] = Refusal(status, text, times=20)
    await rig.runtime.close()
    assert rig.engine.networks == {}, "the engine needs as long as it needs, within the deadline"

    rig.restart()
    await rig.runtime.destroy(await rig.runtime.start(rig.spec("resize-a")))
    monkeypatch.setattr("agent.adapters.engine.runtime.LEAVE_DEADLINE_S", 0.2)
    rig.engine.refusals["DELETE networks"] = Refusal(status, text)
    with capture_logs() as lines:
        await rig.runtime.close()
    assert [line["event"] for line in lines] == ["engine.network_stays"]
    assert text in lines[0]["error"]
    rig.restart()


async def test_an_engine_that_is_gone_does_not_delay_the_end(rig: EngineRig) -> None:
    await rig.runtime.destroy(await rig.runtime.start(rig.spec("resize-a")))
    await rig.engine.down()
    with capture_logs() as lines:
        async with asyncio.timeout(LEAVE_DEADLINE_S / 3):
            await rig.runtime.close()
    assert [line["event"] for line in lines] == ["engine.network_stays"]
    await rig.engine.up()
    rig.restart()


async def test_removed_network_is_created_again(rig: EngineRig) -> None:
    await rig.runtime.destroy(await rig.runtime.start(rig.spec("resize-a")))
    rig.engine.networks.clear()
    handle = await rig.runtime.start(rig.spec("resize-b"))
    assert await rig.runtime.alive(handle)
    assert len(rig.engine.containers) == 1


async def test_network_of_another_owner_is_refused(rig: EngineRig) -> None:
    rig.engine.networks[rig.network.name] = {"Name": rig.network.name, "Id": rig.network.name, "Labels": {}}
    assert "belongs to another owner" in (await refused(rig, "NETWORK_FAILED")).message


async def test_concurrent_starts_of_one_uid_are_refused(rig: EngineRig) -> None:
    both = (rig.runtime.start(rig.spec("resize-a")) for _ in range(2))
    answers = await asyncio.gather(*both, return_exceptions=True)
    assert sum(isinstance(answer, ConflictError) for answer in answers) == 1
    assert len(rig.engine.containers) == 1


async def test_container_of_an_earlier_attempt_is_replaced(rig: EngineRig) -> None:
    left = rig.engine.make("hibernode-resize-a", {STATE_LABEL: rig.state_uuid}, "/bin/sleep", "1000")
    await rig.engine.run(left)
    handle = await rig.runtime.start(rig.spec("resize-a"))
    assert left.id not in rig.engine.containers
    second = await rig.runtime.start(rig.spec("resize-a"))
    assert not await rig.runtime.alive(handle)
    assert await rig.runtime.alive(second)
    assert list(rig.engine.containers) == [second.container_id]


async def test_container_of_another_owner_is_left_alone(rig: EngineRig) -> None:
    theirs = rig.engine.make("hibernode-resize-a", {STATE_LABEL: "another"}, "/bin/sleep", "1000")
    with pytest.raises(InstanceError, match="another owner's container is named hibernode-resize-a"):
        await rig.runtime.start(rig.spec("resize-a"))
    assert list(rig.engine.containers) == [theirs.id]


@pytest.mark.parametrize("uid", ["", "../up", "a/b", "x" * 129, "-x"])
async def test_invalid_uid_is_refused(rig: EngineRig, uid: str) -> None:
    with pytest.raises(InvalidArgumentError):
        await rig.runtime.start(rig.spec(uid))


async def test_accepted_functions(rig: EngineRig) -> None:
    with pytest.raises(PreconditionError):
        rig.runtime.accepts(FunctionSpec(name="resize", image="host", entrypoint=("x",)))
    image = rig.spec("resize-a").instance.function
    rig.runtime.accepts(image)
    await rig.engine.down()
    rig.runtime.accepts(image)  # the engine's state is unknown yet
    with pytest.raises(UnavailableError):
        await rig.runtime.check()
    with pytest.raises(UnavailableError, match="start docker or podman") as raised:
        rig.runtime.accepts(image)
    assert raised.value.reason == "ENGINE_UNAVAILABLE"
    await rig.engine.up()
    await rig.runtime.check()
    rig.runtime.accepts(image)


async def test_image_removed_between_pull_and_start(rig: EngineRig) -> None:
    await refused(rig, "IMAGE_NOT_FOUND", image="registry.example/gone:1")
    rig.engine.refusals["POST create"] = Refusal(404, "No such image: sha256:1111")
    rig.engine.networks[rig.network.name] = {"Id": rig.network.name, "Labels": {STATE_LABEL: rig.state_uuid}}
    await refused(rig, "IMAGE_NOT_FOUND")


async def test_start_on_a_hanging_engine_ends(rig: EngineRig) -> None:
    await rig.runtime.check()
    rig.api._deadline_s = 0.2
    rig.engine.hanging.add("POST start")
    await refused(rig, "ENGINE_UNAVAILABLE")


async def test_cancelled_start_leaves_nothing(rig: EngineRig) -> None:
    rig.engine.hanging.add("POST start")
    starting = asyncio.create_task(rig.runtime.start(rig.spec("resize-a")))
    await rig.engine.called("POST start")
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    assert rig.engine.containers == {}
    rig.engine.hanging.clear()
    await rig.runtime.start(rig.spec("resize-a"))


async def test_unsupported_disk_limit_is_dropped_if_allowed(rig: EngineRig) -> None:
    rig.engine.info["DriverStatus"] = [["Backing Filesystem", "xfs"]]
    quota = "--storage-opt is supported only for overlay over xfs with 'pquota' mount option"
    rig.engine.refusals["POST create"] = Refusal(400, quota, times=1)
    rig.engine.networks[rig.network.name] = {"Id": rig.network.name, "Labels": {STATE_LABEL: rig.state_uuid}}
    handle = await rig.runtime.start(rig.spec("resize-a"))
    assert "StorageOpt" not in rig.container(handle).config["HostConfig"]


async def test_required_disk_limit_is_kept(rig: EngineRig) -> None:
    await rig.runtime.close()
    rig.restart(EngineSettings(socket=rig.engine.socket, disk_limit="require"))
    await refused(rig, "DISK_LIMIT_UNAVAILABLE")
    rig.engine.info["DriverStatus"] = [["Backing Filesystem", "xfs"]]
    rig.engine.version["Version"] = "24.0.0"  # upgraded
    await rig.runtime.check()
    rig.engine.refusals["POST create"] = Refusal(400, "--storage-opt is supported only with 'pquota'")
    rig.engine.networks[rig.network.name] = {"Id": rig.network.name, "Labels": {STATE_LABEL: rig.state_uuid}}
    assert "pquota" in (await refused(rig, "START_FAILED")).message


async def test_volume_outside_the_allowed_folders_is_refused(rig: EngineRig) -> None:
    spec = rig.spec("resize-a")
    options = ContainerOptions(volumes=(Volume("/srv/models", "/models"),))
    function = replace(spec.instance.function, container=options)
    with pytest.raises(InstanceError) as raised:
        await rig.runtime.start(replace(spec, instance=replace(spec.instance, function=function)))
    assert raised.value.reason == "VOLUME_REFUSED"
    assert rig.engine.containers == {}


# ---- listing ---------------------------------------------------------------------------------------------------


async def test_only_own_containers_are_listed(rig: EngineRig) -> None:
    second = await rig.runtime.start(rig.spec("resize-b"))
    first = await rig.runtime.start(rig.spec("resize-a"))
    theirs = rig.engine.make("postgres", {STATE_LABEL: "another"}, "/bin/sleep", "1000")
    assert list(await rig.runtime.list_handles()) == [first, second]
    assert theirs.id in rig.engine.containers


async def test_recorded_containers_are_listed_without_the_engine(rig: EngineRig) -> None:
    handle = await rig.runtime.start(rig.spec("resize-a"))
    await rig.runtime.close()
    await rig.engine.down()
    runtime = rig.restart()
    assert list(await runtime.list_handles()) == [handle]
    assert await runtime.alive(handle)
    assert list(await runtime.pids(handle)) == [handle.process.pid]


async def test_running_container_without_a_record_is_adopted(rig: EngineRig) -> None:
    handle = await rig.runtime.start(rig.spec("resize-a"))
    rig.bundles.remove("resize-a")
    assert list(await rig.runtime.list_handles()) == [replace(handle, port=0)]
    assert rig.bundles.read("resize-a")


async def test_ended_container_without_a_record_is_removed(rig: EngineRig) -> None:
    labels = {STATE_LABEL: rig.state_uuid, INSTANCE_LABEL: "resize-a"}
    rig.engine.make("hibernode-resize-a", labels, "/bin/true")
    renamed = rig.engine.make("renamed", labels, "/bin/sleep", "1000")
    await rig.engine.run(renamed)
    assert list(await rig.runtime.list_handles()) == []
    assert list(rig.engine.containers) == [renamed.id], "whoever renamed it has taken it over"


async def test_label_is_not_used_as_a_path(rig: EngineRig) -> None:
    """A container started by hand from an image with our labels is not ours."""
    models = rig.folder / "models"
    models.mkdir()
    labels = {STATE_LABEL: rig.state_uuid, INSTANCE_LABEL: "../../models"}
    await rig.engine.run(rig.engine.make("debugging", labels, "/bin/sleep", "1000"))
    assert list(await rig.runtime.list_handles()) == []
    assert list(models.iterdir()) == [], "else it would be recorded there, and the folder removed with it"
    assert rig.bundles.all() == []
    assert len(rig.engine.containers) == 1, "his container is his"


async def test_listing_ignores_a_running_start(rig: EngineRig) -> None:
    rig.engine.hanging.add("POST start")
    starting = asyncio.create_task(rig.runtime.start(rig.spec("resize-a")))
    await rig.engine.called("POST start")
    assert list(await rig.runtime.list_handles()) == []
    assert len(rig.engine.containers) == 1
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)


async def test_start_that_ends_during_a_listing_is_no_orphan(rig: EngineRig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ListedContainer] = []
    run = rig.engine.run

    async def looked_at_before(one: StandInContainer) -> None:
        seen.extend(await rig.containers.list())
        await run(one)

    async def answer_of_then() -> list[ListedContainer]:
        return seen

    monkeypatch.setattr(rig.engine, "run", looked_at_before)
    handle = await rig.runtime.start(rig.spec("resize-a"))
    assert [one.running for one in seen] == [False]
    monkeypatch.setattr(rig.containers, "list", answer_of_then)
    assert list(await rig.runtime.list_handles()) == [handle]
    assert await rig.runtime.alive(handle)
