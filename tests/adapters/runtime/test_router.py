"""Tests processes and containers behind one runtime: which runtime serves which, also without an engine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.adapters.runtime.router import Runtimes
from agent.core.errors import PreconditionError, UnavailableError
from agent.core.types import FunctionSpec, Handle, InstanceSpec
from agent.ports import ExecSpec, StartSpec
from tests.fakes.runtime import FakeRuntime

PROCESS = FunctionSpec(name="resize", image="host", entrypoint=("serve",))
IMAGE = FunctionSpec(name="resize", image="registry.example/resize:1")


class FakeEngine(FakeRuntime):
    """A runtime whose instances have a container id."""

    def accepts(self, function: FunctionSpec) -> None:
        """Accepts any image."""

    async def start(self, spec: StartSpec) -> Handle:
        assert spec.instance.function.image != "host"
        handle = await super().start(spec)
        container = self.containers[handle.uid]
        container.handle = replace(handle, container_id=f"c-{handle.uid}")
        return container.handle

    async def check(self) -> None:
        """Always succeeds."""


def spec(uid: str, function: FunctionSpec) -> StartSpec:
    return StartSpec(InstanceSpec(uid, uid, function), {}, ())


async def test_images_go_to_their_runtime_and_all_handles_are_listed() -> None:
    process, engine = FakeRuntime(), FakeEngine()
    runtimes = Runtimes(process, engine, process_enabled=True)
    third = await runtimes.start(spec("c", PROCESS))
    first = await runtimes.start(spec("a", PROCESS))
    second = await runtimes.start(spec("b", IMAGE))
    assert list(process.containers) == ["c", "a"]
    assert list(engine.containers) == ["b"]
    assert list(await runtimes.list_handles()) == [first, second, third]
    for handle in (first, second, third):
        await runtimes.kill(handle)
        await runtimes.destroy(handle)
    assert list(await runtimes.list_handles()) == []
    assert runtimes.offered == ("process", "engine")


def test_host_processes_must_be_allowed() -> None:
    runtimes = Runtimes(FakeRuntime(), FakeEngine(), process_enabled=False)
    with pytest.raises(PreconditionError, match=r"runtime\.process\.enabled") as raised:
        runtimes.accepts(PROCESS)
    assert raised.value.reason == "PROCESS_RUNTIME_DISABLED"
    runtimes.accepts(IMAGE)
    assert runtimes.offered == ("engine",)


def test_image_without_an_engine_is_refused_with_a_fix() -> None:
    runtimes = Runtimes(FakeRuntime(), None, process_enabled=True)
    with pytest.raises(PreconditionError, match=r"runtime\.engine\.socket") as raised:
        runtimes.accepts(IMAGE)
    assert raised.value.reason == "IMAGE_RUNTIME_UNAVAILABLE"
    runtimes.accepts(PROCESS)
    assert runtimes.offered == ("process",)


async def test_container_without_its_engine_is_killed_but_not_destroyed() -> None:
    process, engine = FakeRuntime(), FakeEngine()
    container = await Runtimes(process, engine, process_enabled=True).start(spec("a", IMAGE))
    process.containers["a"] = engine.containers["a"]  # the kernel shows it to everyone
    runtimes = Runtimes(process, None, process_enabled=True)
    assert await runtimes.alive(container)
    await runtimes.kill(container)
    assert not await runtimes.alive(container)
    with pytest.raises(UnavailableError) as raised:
        await runtimes.destroy(container)
    assert raised.value.reason == "ENGINE_UNAVAILABLE"
    with pytest.raises(UnavailableError):
        await runtimes.exec(container, ExecSpec(("sh",)))


async def test_missing_engine_socket_blocks_starts_but_not_removal() -> None:
    engine = FakeEngine()
    container = await Runtimes(FakeRuntime(), engine, process_enabled=True).start(spec("a", IMAGE))
    runtimes = Runtimes(FakeRuntime(), engine, process_enabled=True, engine_enabled=False)
    with pytest.raises(PreconditionError):
        runtimes.accepts(IMAGE)
    assert (runtimes.offered, runtimes.engine) == (("process",), None)
    await runtimes.destroy(container)
    assert engine.containers == {}
