"""User errors with images: each has a reason, an exit code and a fix, and leaves nothing."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.core.types import MIB
from agent.v1 import types_pb2
from tests.e2e.bad_world import HIBERNODE
from tests.e2e.stack import OWN_USER, Stack, running_stack, until
from tests.engines import images
from tests.engines.engines import Engine
from tests.fakes.oci_registry import OciRegistry, oci_registry

PASSWORD = "correct horse battery"
NOT_FOUND, PRECONDITION, UNAVAILABLE, UNEXPECTED = 3, 4, 5, 1
GIB = 1024 * MIB


@asynccontextmanager
async def a_node(socket: str, **runtime: object) -> AsyncIterator[Stack]:
    """A lone agent on this engine."""
    settings = {"runtime": {"process": OWN_USER, "engine": {"socket": socket}, **runtime}}
    async with running_stack(agent_settings=settings, engine_socket=socket, scheduler=False) as stack:
        yield stack


def props(image: str, **container: object) -> dict[str, Any]:
    """The props of a function with one instance in s.yaml."""
    return {
        "functionName": "wrong",
        "runtime": "custom-container",
        "cpu": 0.5,
        "memorySize": 128,
        "gpuConfig": {"gpuType": "fc.gpu.ada.1", "gpuMemorySize": 1024},
        "customContainerConfig": {"image": image, **container},
        "hibernode": {"freezeAfter": "1h"},
    }


async def hibernode(stack: Stack, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command line with the agent's own files. It has its own deadlines."""
    command = [str(HIBERNODE), *words, "--home", str(stack.folder)]
    return await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=120, check=False, env=stack.environment
    )


async def create(stack: Stack, given: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    file = stack.folder / "s.yaml"
    resources = {"wrong": {"component": "fc3", "props": given}}
    file.write_text(yaml.safe_dump({"edition": "3.0.0", "name": "app", "resources": resources}))
    return await hibernode(stack, "create", "-t", str(file), "--wait")


def assert_error(done: subprocess.CompletedProcess[str], reason: str, code: int, *words: str) -> None:
    """Expect one sentence without secrets or traceback."""
    assert reason in done.stderr, done.stderr
    assert done.returncode == code, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    assert PASSWORD not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def nothing_stays(engine: Engine, stack: Stack) -> None:
    state_uuid = (stack.folder / "agent" / "uuid").read_text().strip()
    assert engine.ps(state_uuid) == []


async def test_missing_images_and_commands(engine: Engine) -> None:
    async with oci_registry({"ann": PASSWORD}) as registry, a_node(engine.socket, ready_timeout="3s") as stack:
        private = registry.add("team/ocr", "3", {"model": os.urandom(1000)})
        login = {"registryConfig": {"authConfig": {"userName": "ann", "password": PASSWORD}}}
        absent = f"{registry.address}/team/nothing:1"
        assert_error(await create(stack, props(absent, **login)), "IMAGE_NOT_FOUND", NOT_FOUND, "team/nothing:1")
        assert_error(await create(stack, props(private)), "IMAGE_PULL_DENIED", PRECONDITION, "registryConfig")
        assert_error(await create(stack, props("127.0.0.1:9/ocr:1")), "IMAGE_PULL_FAILED", UNAVAILABLE, "127.0.0.1:9")
        nowhere = props(images.BUSYBOX, entrypoint=["/nowhere/server"])
        assert_error(await create(stack, nowhere), "COMMAND_NOT_FOUND", NOT_FOUND, "/nowhere/server")
        silent = props(images.BUSYBOX, entrypoint=["/bin/sleep", "86399"])
        assert_error(await create(stack, silent), "FUNCTION_NOT_STARTED", UNEXPECTED, "Ping CA failed", "9000")
        await until_all_ended(stack)
        nothing_stays(engine, stack)
        forget(engine, registry)


def forget(engine: Engine, registry: OciRegistry) -> None:
    """Remove the test registry's images from the shared engine."""
    for one in engine.must("GET", "/images/json"):
        for tag in one["RepoTags"] or ():
            if tag.startswith(registry.address):
                engine.must("DELETE", f"/images/{tag}", query={"force": "true"})


async def until_all_ended(stack: Stack) -> None:
    async def none() -> bool:
        return not await stack.instances()

    await until("all instances have ended", none)


async def test_forbidden_folder_is_refused_with_a_reason(engine: Engine, tmp_path: Path) -> None:
    allowed = tmp_path / "data"
    allowed.mkdir()
    (allowed / "etc").symlink_to("/etc")
    async with a_node(engine.socket, volumes_allowed=[str(allowed)]) as stack:
        for host_path in ("/proc", str(stack.folder / "agent"), str(allowed / "etc"), str(tmp_path)):
            given = props(images.BUSYBOX)
            given["hibernode"]["volumes"] = [{"hostPath": host_path, "containerPath": "/mnt/data"}]
            assert_error(await create(stack, given), "VOLUME_REFUSED", PRECONDITION, host_path)
        nothing_stays(engine, stack)


async def test_two_functions_may_use_the_same_port(engine: Engine) -> None:
    """Each has its own address and publishes nothing, so no port is shared."""
    async with a_node(engine.socket) as stack:
        made = [await create(stack, props(images.BUSYBOX, port=9000)) for _ in range(2)]
        assert [one.returncode for one in made] == [0, 0], made
        addresses = {one.address for one in await stack.instances()}
        assert len(addresses) == 2
        assert {address.rpartition(":")[2] for address in addresses} == {"9000"}
        for one in made:
            await hibernode(stack, "rm", "--force", one.stdout.strip())
        await until_all_ended(stack)


async def test_memory_limit_is_raised_for_the_image_but_a_full_host_refuses(engine: Engine) -> None:
    """300 MiB in device memory, 256 MiB of memory: the limit is raised while frozen and restored afterwards. If the
    node itself has too little memory, the freeze is refused with a fix."""
    images.load(engine, images.ECHO)
    given = props(images.ECHO)
    given.update(memorySize=256, environmentVariables={"VRAM_MIB": "300"})
    given["instanceLifecycleConfig"] = {"initializer": {"timeout": 60}}
    for limit, frozen in (("0B", True), ("8MiB", False)):
        settings = {"frozen_memory_limit": limit, "instances_per_gpu": 1}
        async with running_stack(gpu_settings=settings, engine_socket=engine.socket, scheduler=False) as stack:
            made = await create(stack, given)
            assert made.returncode == 0, made.stderr
            uid = made.stdout.strip()
            before = memory_limit(engine, uid)
            done = await hibernode(stack, "freeze", uid)
            if frozen:
                assert done.returncode == 0, done.stderr
                assert memory_limit(engine, uid) > before
                woken = await hibernode(stack, "wake", uid)
                assert woken.returncode == 0, woken.stderr

                async def as_before(uid: str = uid, before: int = before) -> bool:
                    return memory_limit(engine, uid) == before

                await until("its limit is what it was", as_before)
            else:
                assert_error(done, "HOST_MEMORY_SHORT", PRECONDITION, "frozen_memory_limit")
                assert (await stack.instances())[0].state == types_pb2.Instance.STATE_RUNNING
            gone = await hibernode(stack, "rm", "--force", uid)
            assert gone.returncode == 0, gone.stderr


def memory_limit(engine: Engine, uid: str) -> int:
    """The kernel's value, independent of the engine's."""
    pid = engine.container(uid)["State"]["Pid"]
    places = dict(line.split(":")[1:] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines())
    if "memory" in places:
        return int(Path("/sys/fs/cgroup/memory" + places["memory"], "memory.limit_in_bytes").read_text())
    return int(Path("/sys/fs/cgroup" + places[""], "memory.max").read_text())


@pytest.mark.parametrize("what", ["missing", "left behind"])
async def test_missing_engine_is_reported_at_once_and_the_agent_keeps_running(tmp_path: Path, what: str) -> None:
    socket = tmp_path / "docker.sock"
    if what == "left behind":
        import socket as sockets

        with sockets.socket(sockets.AF_UNIX) as dead:
            dead.bind(str(socket))
    words = {"missing": "there is no such socket", "left behind": "nothing listens on it"}
    async with a_node(str(socket)) as stack:
        assert_error(
            await create(stack, props(images.BUSYBOX)), "ENGINE_UNAVAILABLE", UNAVAILABLE, words[what], "start docker"
        )
        seen = await hibernode(stack, "node")
        assert seen.returncode == 0
        assert words[what] in seen.stdout + seen.stderr


async def test_forbidden_engine_socket_is_reported(engine: Engine) -> None:
    """As an ordinary user: the socket belongs to root."""
    if os.geteuid() != 0:
        pytest.skip("only root can switch to an unprivileged user")
    from agent.adapters.engine.api import EngineApi
    from agent.core.errors import UnavailableError

    def ask() -> str:
        async def story() -> str:
            api = EngineApi(engine.socket)
            try:
                await api.check()
            except UnavailableError as error:
                return f"{error.reason}: {error.message}"
            finally:
                await api.close()
            return "answered"

        return asyncio.run(story())

    os.chmod(engine.socket, 0o660)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # a separate process: the user id can't change for one thread
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        os.write(writer, ask().encode()[:4000])
        os._exit(0)
    os.close(writer)
    _, status = await asyncio.to_thread(os.waitpid, child, 0)
    with os.fdopen(reader) as answer:
        said = answer.read()
    assert status == 0
    assert said.startswith("ENGINE_UNAVAILABLE")
    assert "may not open the socket" in said
