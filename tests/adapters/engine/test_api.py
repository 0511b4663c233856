"""The engine client: every failure of the engine gives a timely answer with a fix."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiodocker
import pytest
from aiohttp import web

from agent.adapters.engine import api as engine_api
from agent.adapters.engine.api import EngineApi, EngineError
from agent.core.errors import HibernodeError, InstanceError, UnavailableError
from tests.adapters.engine.stand_in import IMAGE, PODMAN, EngineStandIn, Refusal


@pytest.fixture
async def engine() -> AsyncIterator[EngineStandIn]:
    made = EngineStandIn()
    await made.up()
    yield made
    await made.close()


@pytest.fixture
async def api(engine: EngineStandIn) -> AsyncIterator[EngineApi]:
    made = EngineApi(engine.socket, deadline_s=5.0)
    yield made
    await made.close()


async def image_id(api: EngineApi) -> str:
    return str((await api.call(lambda docker: docker.images.inspect(IMAGE)))["Id"])


async def refused(api: EngineApi) -> UnavailableError:
    with pytest.raises(UnavailableError) as raised:
        await image_id(api)
    assert raised.value.reason == "ENGINE_UNAVAILABLE"
    return raised.value


async def test_first_call_identifies_the_engine(api: EngineApi, engine: EngineStandIn) -> None:
    assert await image_id(api) == "sha256:1111"
    assert (api.kind, api.version, api.health) == ("docker", "20.10.24", "")
    assert (api.facts.title, api.facts.cpus) == ("Docker 20.10.24", 2)
    asked = engine.calls["GET version"]
    await image_id(api)
    assert engine.calls["GET version"] == asked, "who it is was known"


async def test_podman_is_recognised_by_its_components(api: EngineApi, engine: EngineStandIn) -> None:
    engine.version = dict(PODMAN)
    await api.connect()
    assert (api.kind, api.version) == ("podman", "4.3.1")


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ({"Version": "19.03.15", "ApiVersion": "1.40", "Components": []}, "Docker 20.10"),
        ({**PODMAN, "Version": "4.2.0"}, "4.3 or newer"),
        ({**PODMAN, "Version": "3.4.4"}, "4.3 or newer"),
    ],
)
async def test_old_engines_are_refused(
    api: EngineApi, engine: EngineStandIn, version: dict[str, object], says: str
) -> None:
    engine.version = version
    with pytest.raises(HibernodeError, match=says) as raised:
        await api.connect()
    assert raised.value.reason == "ENGINE_TOO_OLD"
    assert api.health == raised.value.message


@pytest.mark.parametrize("version", ["5.4.0-rhel", "4.10.1"])
async def test_versions_compare_as_numbers(api: EngineApi, engine: EngineStandIn, version: str) -> None:
    engine.version = {**PODMAN, "Version": version}
    await api.connect()
    assert api.version == version


# ---- no engine -------------------------------------------------------------------------------------------------


async def test_missing_socket(tmp_path: Path) -> None:
    api = EngineApi(str(tmp_path / "docker.sock"))
    error = await refused(api)
    assert "no such socket; start docker or podman, or set runtime.engine.socket" in error.message
    assert api.health == error.message
    await api.close()


async def test_stale_socket(tmp_path: Path) -> None:
    left = tmp_path / "docker.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(left))
    api = EngineApi(str(left))
    assert "nothing listens on it" in (await refused(api)).message
    await api.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can switch to an unprivileged user")
async def test_forbidden_socket(engine: EngineStandIn) -> None:
    os.chmod(engine.socket, 0o600)
    engine.folder.chmod(0o711)
    api = EngineApi(engine.socket)
    os.seteuid(65534)
    try:
        error = await refused(api)
    finally:
        os.seteuid(0)
    assert "run the agent as root, or add its user to the socket's group" in error.message
    await api.close()


async def test_auto_uses_the_first_existing_socket_and_keeps_it(
    engine: EngineStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docker, podman = tmp_path / "docker.sock", Path(engine.socket)
    monkeypatch.setattr(engine_api, "SOCKETS", (str(docker), str(tmp_path / "podman.sock")))
    api = EngineApi("auto")
    assert str(docker) in (await refused(api)).message
    monkeypatch.setattr(engine_api, "SOCKETS", (str(docker), str(podman)))
    assert await image_id(api) == "sha256:1111"
    docker.touch()
    await api.check()
    assert api.path == str(podman)
    await api.close()


async def test_socket_of_another_server(tmp_path: Path) -> None:
    async def page(_request: web.Request) -> web.Response:
        return web.Response(text="<h1>welcome</h1>", content_type="text/html")

    application = web.Application()
    application.router.add_route("*", "/{tail:.*}", page)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "web.sock")).start()
    api = EngineApi(str(tmp_path / "web.sock"))
    assert "is it a container engine?" in (await refused(api)).message
    await api.close()
    await runner.cleanup()


# ---- restarts and hangs ----------------------------------------------------------------------------------------


async def test_engine_is_used_again_after_an_upgrade(api: EngineApi, engine: EngineStandIn) -> None:
    await image_id(api)
    await engine.down()
    await refused(api)
    assert api.health
    engine.version["Version"] = "25.0.1"
    await engine.up()
    assert await image_id(api) == "sha256:1111"
    assert (api.version, api.health) == ("25.0.1", "")


async def test_check_updates_kind_and_version(api: EngineApi, engine: EngineStandIn) -> None:
    await api.check()
    await engine.down()
    with pytest.raises(UnavailableError):
        await api.check()
    assert "start docker or podman" in api.health
    await engine.up()
    await api.check()
    assert api.health == ""


async def test_hanging_call_ends_at_its_deadline(api: EngineApi, engine: EngineStandIn) -> None:
    await api.connect()
    engine.hanging.add("GET json")
    with pytest.raises(UnavailableError, match="did not answer in time") as raised:
        await api.call(lambda docker: docker.images.inspect(IMAGE), deadline_s=0.05)
    assert raised.value.reason == "ENGINE_UNAVAILABLE"
    engine.hanging.clear()
    assert await image_id(api) == "sha256:1111", "the place of the call that hung is free again"


async def test_check_detects_a_hanging_engine(engine: EngineStandIn) -> None:
    engine.hanging.add("GET version")
    api = EngineApi(engine.socket, deadline_s=0.05)
    with pytest.raises(UnavailableError, match="did not answer in time"):
        await api.check()
    assert "did not answer in time" in api.health
    await api.close()


async def test_engine_dies_during_a_call(api: EngineApi, engine: EngineStandIn) -> None:
    await api.connect()
    engine.hanging.add("GET json")
    asking = asyncio.create_task(image_id(api))
    await engine.called("GET json")
    await engine.down()
    with pytest.raises(HibernodeError):
        await asking


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 404, 409, 500])
async def test_refusal_keeps_status_and_text(api: EngineApi, engine: EngineStandIn, status: int) -> None:
    engine.refusals["GET json"] = Refusal(status, "conflict with\nsomething")
    with pytest.raises(EngineError) as raised:
        await image_id(api)
    assert (raised.value.status, raised.value.text) == (status, "conflict with something")
    assert raised.value.not_found == (status == 404)
    assert raised.value.reason == "ENGINE_REFUSED"
    assert api.health == "", "it answers"


async def test_podman_loses_a_container_during_a_call(api: EngineApi, engine: EngineStandIn) -> None:
    engine.refusals["GET json"] = Refusal(500, "container 1234 does not exist in database: no such container")
    with pytest.raises(EngineError) as raised:
        await image_id(api)
    assert raised.value.not_found


async def test_full_disk_has_its_own_reason(api: EngineApi, engine: EngineStandIn) -> None:
    engine.refusals["GET json"] = Refusal(500, "mkdir /var/lib/docker/overlay2/x: no space left on device")
    with pytest.raises(InstanceError, match="free space there") as raised:
        await image_id(api)
    assert raised.value.reason == "DISK_FULL"


async def test_engine_that_refuses_its_version_is_unusable(api: EngineApi, engine: EngineStandIn) -> None:
    engine.refusals["GET info"] = Refusal(500, "database is locked")
    assert "database is locked" in (await refused(api)).message


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.EACCES, "denied"), "run the agent as root"),
        (OSError(errno.ECONNRESET, "reset by peer"), "it may be restarting"),
        (aiodocker.DockerError(0, "toomanyrequests: slow down"), "toomanyrequests: slow down"),
        (TimeoutError(), "did not answer in time"),
        (KeyError("Id"), "is unintelligible"),
        (AttributeError("'str' object has no attribute 'get'"), "is unintelligible"),
    ],
)
async def test_stream_errors_are_translated_like_call_errors(api: EngineApi, error: Exception, says: str) -> None:
    with pytest.raises(HibernodeError, match=says):
        async with api.stream():
            raise error


# ---- limits ----------------------------------------------------------------------------------------------------


async def test_concurrent_calls_are_limited_and_all_complete(engine: EngineStandIn) -> None:
    api = EngineApi(engine.socket, max_concurrent_calls=3)
    await asyncio.gather(*(image_id(api) for _ in range(20)))
    assert engine.calls["GET json"] == 20
    assert engine.most_open <= 3
    await api.close()


async def test_no_descriptor_leaks(engine: EngineStandIn) -> None:
    before = len(os.listdir("/proc/self/fd"))
    api = EngineApi(engine.socket)
    await asyncio.gather(*(image_id(api) for _ in range(10)))
    await api.close()
    await api.close()
    for _look in range(500):  # the server closes its ends with a delay
        if len(os.listdir("/proc/self/fd")) <= before:
            break
        await asyncio.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= before
