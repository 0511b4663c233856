"""Pulls: shared by callers, limited in every way, with errors that name a fix and hide passwords.

The engine is a script of its answers; `tests/engines/test_pull.py` pulls from a real registry.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import aiodocker
import pytest

from agent.adapters.engine.api import EngineApi, EngineError
from agent.adapters.engine.images import Images, Policy
from agent.adapters.engine.pull_errors import pull_refused
from agent.adapters.engine.pull_progress import PullProgress
from agent.adapters.engine.registry_credentials import Login
from agent.core.errors import InstanceError
from agent.core.types import MIB, RegistryLogin
from tests.adapters.engine.test_registry_credentials import basic

OCR = "registry.example/ocr:3"
PULLED: list[dict[str, Any]] = [
    {"status": "Pulling from ocr", "id": "3"},
    {"status": "Pulling fs layer", "id": "a1", "progressDetail": {}},
    {"status": "Downloading", "id": "a1", "progressDetail": {"current": 45 * MIB, "total": 100 * MIB}},
    {"status": "Download complete", "id": "a1", "progressDetail": {}},
    {"status": "Pull complete", "id": "a1", "progressDetail": {}},
]


class ScriptedEngine(EngineApi):
    """Has the images in `here`. A pull plays `script` (messages, or the error that ends it) and then adds the image.

    `gate`: open by default; a pull waits for it before its first message. `begun` counts pulls, `sent` lists their
    arguments."""

    def __init__(self, *here: str, script: Sequence[dict[str, Any] | Exception] = tuple(PULLED)) -> None:
        super().__init__("/nowhere/engine.sock")
        self.here = set(here)
        self.script = script
        self.architecture = "amd64"
        self.gate = asyncio.Event()
        self.gate.set()
        self.changed = asyncio.Condition()
        self.begun = 0
        self.running = 0
        self.most = 0
        self.sent: list[tuple[str, object]] = []

    async def connect(self) -> None: ...

    async def call(self, make: Callable[[Any], Awaitable[Any]], deadline_s: float | None = None) -> Any:
        return await make(self)

    @property
    def images(self) -> ScriptedEngine:
        return self

    async def inspect(self, name: str) -> dict[str, Any]:
        if name not in self.here:
            raise EngineError(404, f"No such image: {name}")
        config = {"Env": ["PATH=/bin", "LD_LIBRARY_PATH=/image/lib", "ODD"], "User": "app"}
        return {"Id": f"sha256:{name}", "Architecture": self.architecture, "Config": config}

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[aiodocker.Docker]:
        yield cast("aiodocker.Docker", self)

    async def until_begun(self, count: int) -> None:
        """Wait until this many pulls have begun."""
        async with asyncio.timeout(10), self.changed:
            await self.changed.wait_for(lambda: self.begun >= count)

    async def pull(self, _docker: object, name: str, auth: Mapping[str, str]) -> AsyncGenerator[dict[str, Any], None]:
        async with self.changed:
            self.begun += 1
            self.changed.notify_all()
        self.running += 1
        self.most = max(self.most, self.running)
        self.sent.append((name, dict(auth)))
        try:
            await self.gate.wait()
            for step in self.script:
                if isinstance(step, Exception):
                    raise step
                yield step
            self.here.add(name)
        finally:
            self.running -= 1


def images(engine: ScriptedEngine, policy: Policy = "missing", **more: Any) -> Images:
    return Images(engine, policy, **{"auth_files": (), "machine": "x86_64", "messages": engine.pull, **more})


async def test_local_image_is_not_pulled() -> None:
    engine = ScriptedEngine(OCR)
    found = await images(engine).ensure(OCR)
    assert (found.id, found.user) == (f"sha256:{OCR}", "app")
    assert found.environment["LD_LIBRARY_PATH"] == "/image/lib"
    assert engine.begun == 0


async def test_missing_image_is_pulled_with_progress() -> None:
    engine = ScriptedEngine()
    said: list[str] = []
    assert (await images(engine).ensure(OCR, progress=said.append)).id == f"sha256:{OCR}"
    assert said[:2] == [f"waiting to pull {OCR}", f"pulling {OCR}"]
    assert engine.begun == 1


async def test_policies_always_and_never() -> None:
    engine = ScriptedEngine(OCR)
    await images(engine, "always").ensure(OCR)
    assert engine.begun == 1
    with pytest.raises(InstanceError, match=r"runtime\.engine\.pull is never; pull or load it") as caught:
        await images(engine, "never").ensure("other:1")
    assert caught.value.reason == "IMAGE_NOT_FOUND"
    with pytest.raises(InstanceError, match="an id can't be pulled"):
        await images(engine).ensure("sha256:" + "0" * 64)
    assert engine.begun == 1


async def test_local_image_of_another_architecture_is_refused() -> None:
    engine = ScriptedEngine(OCR)
    engine.architecture = "arm64"
    with pytest.raises(InstanceError, match="is made for arm64, this node is amd64") as caught:
        await images(engine).ensure(OCR)
    assert caught.value.reason == "IMAGE_PULL_FAILED"
    engine.architecture = ""  # an imported file system names none
    await images(engine).ensure(OCR)


# ---- sharing ---------------------------------------------------------------------------------------------------


async def test_callers_share_a_pull_and_may_leave_it() -> None:
    engine = ScriptedEngine()
    engine.gate.clear()
    store = images(engine)
    first, second = (asyncio.create_task(store.ensure(OCR)) for _ in range(2))
    await engine.until_begun(1)
    said: list[str] = []
    late = asyncio.create_task(store.ensure(OCR, progress=said.append))
    first.cancel()
    with suppress(asyncio.CancelledError):
        await first
    engine.gate.set()
    assert (await second).id == (await late).id
    assert said[0] == f"pulling {OCR}"  # the last text before it joined
    assert engine.begun == 1


async def test_pull_without_callers_is_cancelled() -> None:
    engine = ScriptedEngine()
    engine.gate.clear()
    store = images(engine)
    alone = asyncio.create_task(store.ensure(OCR))
    await engine.until_begun(1)
    alone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await alone
    assert engine.running == 0
    engine.gate.set()
    await store.ensure(OCR)  # starts a new pull
    assert engine.begun == 2


async def test_pulls_with_different_logins_are_separate() -> None:
    engine = ScriptedEngine()
    engine.gate.clear()
    store = images(engine)
    logins = RegistryLogin("ann", "a"), RegistryLogin("bob", "b")
    tasks = [asyncio.create_task(store.ensure(OCR, login)) for login in logins]
    await engine.until_begun(2)
    engine.gate.set()
    await asyncio.gather(*tasks)
    assert [auth for _, auth in engine.sent] == [
        {"username": "ann", "password": "a"},
        {"username": "bob", "password": "b"},
    ]


async def test_at_most_two_concurrent_pulls() -> None:
    engine = ScriptedEngine()
    engine.gate.clear()
    store = images(engine)
    said: list[str] = []
    tasks = [asyncio.create_task(store.ensure(f"r.example/i:{n}", progress=said.append)) for n in range(5)]
    await engine.until_begun(2)
    assert "waiting to pull r.example/i:4" in said
    engine.gate.set()
    await asyncio.gather(*tasks)
    assert (engine.begun, engine.most) == (5, 2)


async def test_close_ends_pulls_and_fails_their_callers() -> None:
    engine = ScriptedEngine()
    engine.gate.clear()
    store = images(engine)
    waiting = asyncio.create_task(store.ensure(OCR))
    await engine.until_begun(1)
    await store.close()
    with pytest.raises(InstanceError, match="was given up"):
        await waiting
    assert engine.running == 0


# ---- limits ----------------------------------------------------------------------------------------------------


async def test_stalled_pull_is_cancelled() -> None:
    engine = ScriptedEngine()
    engine.gate.clear()
    with pytest.raises(InstanceError, match=r"no more data arrived .*can this node reach its registry\?") as caught:
        await images(engine, stall_s=0.05).ensure(OCR)
    assert caught.value.reason == "IMAGE_PULL_FAILED"
    assert engine.running == 0


async def test_pull_has_a_deadline() -> None:
    engine = ScriptedEngine()
    engine.gate.clear()
    with pytest.raises(InstanceError, match=r"longer than 0\.05 s; raise runtime\.engine\.pull_timeout"):
        await images(engine, pull_timeout_s=0.05).ensure(OCR)


async def test_pull_ends_without_the_image() -> None:

    class Forgetful(ScriptedEngine):
        async def inspect(self, name: str) -> dict[str, Any]:
            self.here.clear()
            return await super().inspect(name)

    engine = Forgetful()
    with pytest.raises(InstanceError, match="the image is missing"):
        await images(engine).ensure(OCR)


# ---- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason", "advice"),
    [
        ("manifest unknown", "IMAGE_NOT_FOUND", "check name and tag"),
        ("reading manifest 1 in r.example/none: name unknown", "IMAGE_NOT_FOUND", "check name and tag"),
        ('short-name "ocr:3" did not resolve to an alias', "IMAGE_NOT_FOUND", "check name and tag"),
        ("no basic auth credentials", "IMAGE_PULL_DENIED", "give the function a registryConfig"),
        ("unauthorized", "IMAGE_PULL_DENIED", "docker login registry.example"),
        (
            "pull access denied for ocr, repository does not exist or may require 'docker login'",
            "IMAGE_PULL_DENIED",
            "or has no such image",
        ),
        ("no matching manifest for linux/amd64 in the manifest list entries", "IMAGE_PULL_FAILED", "architecture"),
        ("toomanyrequests: You have reached your pull rate limit", "IMAGE_PULL_FAILED", "log in there, or wait"),
        ("http: server gave HTTP response to HTTPS client", "IMAGE_PULL_FAILED", "insecure-registries"),
        ("x509: certificate signed by unknown authority", "IMAGE_PULL_FAILED", "/etc/docker/certs.d/registry.example"),
        ("dial tcp: lookup registry.example: no such host", "IMAGE_PULL_FAILED", "can't be reached from this node"),
        ("net/http: TLS handshake timeout", "IMAGE_PULL_FAILED", "can't be reached from this node"),
        ("something new", "IMAGE_PULL_FAILED", "something new"),
    ],
)
async def test_pull_errors_have_a_reason_and_advice(text: str, reason: str, advice: str) -> None:
    with pytest.raises(InstanceError) as caught:
        await images(ScriptedEngine(script=[EngineError(500, text)])).ensure(OCR)
    assert caught.value.reason == reason
    assert advice in caught.value.message
    assert caught.value.metadata["image"] == OCR


async def test_full_disk_and_lost_engine_keep_their_reasons() -> None:
    full = InstanceError("DISK_FULL", "the container engine's disk is full")
    with pytest.raises(InstanceError) as caught:
        await images(ScriptedEngine(script=[full])).ensure(OCR)
    assert caught.value.reason == "DISK_FULL"


async def test_unreadable_answer() -> None:
    with pytest.raises(InstanceError, match=r"can't be read \(ValueError\)"):
        await images(ScriptedEngine(script=[ValueError("Chunk too big")])).ensure(OCR)


async def test_errors_hide_passwords_that_the_engine_repeats() -> None:
    text = "unauthorized: hunter2 is not the password of ann"
    engine = ScriptedEngine(script=[EngineError(500, text)])
    with pytest.raises(InstanceError) as caught:
        await images(engine).ensure(OCR, RegistryLogin("ann", "hunter2"))
    assert "hunter2" not in str(caught.value) + str(caught.value.metadata)
    assert "refused the function's registryConfig" in caught.value.message
    assert "hunter2" not in repr(Login({"password": "hunter2"}))
    assert "hunter2" not in str(pull_refused(OCR, text, Login({"password": "hunter2"}, "x")))


# ---- progress --------------------------------------------------------------------------------------------------


def test_sentence_covers_all_layers() -> None:
    progress = PullProgress("ocr:3")
    sentences = []
    for message in PULLED:
        progress.update(message)
        sentences.append(progress.sentence)
    assert sentences == ["pulling ocr:3", "pulling ocr:3", "pulling ocr:3: 45 % of 100 MiB", *["unpacking ocr:3"] * 2]


def test_repeated_message_is_no_progress() -> None:
    progress = PullProgress("ocr:3")
    message: dict[str, Any] = {"status": "Downloading", "id": "a1", "progressDetail": {"current": 5, "total": 10}}
    assert [progress.update(message) for _ in range(3)] == [True, False, False]
    assert progress.update({**message, "progressDetail": {"current": 6, "total": 10}})
    assert progress.downloading


def test_existing_layers_count_as_complete() -> None:
    progress = PullProgress("ocr:3")
    progress.update({"status": "Already exists", "id": "a1"})
    assert not progress.downloading
    progress.update({"status": "Waiting", "id": "a2"})
    assert progress.downloading


def test_endless_and_odd_messages_cost_no_memory() -> None:
    progress = PullProgress("ocr:3")
    for number in range(10_000):
        progress.update({"status": "Downloading", "id": str(number), "progressDetail": {"current": 1, "total": 2}})
    assert "of 1 MiB" in progress.sentence
    odd: dict[str, Any]
    for odd in ({}, {"id": 7, "status": None, "progressDetail": []}, {"progressDetail": {"current": "x"}}):
        progress.update(odd)


# ---- logins ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", [{"credHelpers": {"r.example": "ecr-login"}}, {"credsStore": "secretservice"}])
async def test_refusal_names_an_unused_credential_helper(tmp_path: Path, document: dict[str, object]) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(document))
    engine = ScriptedEngine(script=[EngineError(500, "unauthorized")])
    with pytest.raises(InstanceError, match=r"the credential helper named in .* is not run"):
        await images(engine, auth_files=(file,)).ensure("r.example/ocr")


async def test_logins_are_sent_to_docker_but_not_to_podman(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"auths": {"registry.example": basic("ann:secret"), "docker.io": basic("hub:pw")}}))
    engine = ScriptedEngine()
    await images(engine, "always", auth_files=(file,)).ensure(OCR)
    engine.here.add("team/ocr")
    await images(engine, "always", auth_files=(file,)).ensure("team/ocr")
    engine.kind = "podman"
    await images(engine, "always", auth_files=(file,)).ensure(OCR)
    assert engine.sent == [
        (OCR, {"username": "ann", "password": "secret"}),
        ("docker.io/team/ocr", {"username": "hub", "password": "pw"}),
        (OCR, {}),
    ]
