"""Finds images on the engine and pulls missing ones; concurrent callers share one pull per image and login.

A pull ends early when its last caller leaves. The engine contacts the registry; this module supplies the credentials
(`registry_credentials`).
"""

from __future__ import annotations

import asyncio
import platform
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import aiodocker

from agent.adapters.engine.api import EngineApi, EngineError
from agent.adapters.engine.pull_errors import no_such_image, pull_refused, wrong_architecture
from agent.adapters.engine.pull_progress import PullProgress
from agent.adapters.engine.pull_stream import pull_messages
from agent.adapters.engine.registry_credentials import Login, docker_auth_files, find_login, qualified
from agent.core.errors import InstanceError
from agent.core.types import RegistryLogin
from agent.log import get_logger

Policy = Literal["missing", "always", "never"]

MAX_CONCURRENT_PULLS = 2
STALL_S = 60.0
UNPACK_S = 600.0
"""Podman sends no messages while it unpacks a layer."""
REPORT_INTERVAL_S = 1.0

Messages = Callable[[aiodocker.Docker, str, Mapping[str, str]], AsyncGenerator[dict[str, Any], None]]

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

log = get_logger()


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """An image on this node. `id` identifies it even when its tag moves; `user` and `environment` are the image's."""

    id: str
    architecture: str = ""
    user: str = ""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(slots=True)
class _Pull:
    """A running pull: its callers' progress callbacks, and the last text they received."""

    task: asyncio.Task[None] | None = None
    listeners: list[Callable[[str], None]] = field(default_factory=list)
    last_text: str = ""

    def report(self, text: str) -> None:
        if text != self.last_text:
            self.last_text = text
            for listener in tuple(self.listeners):
                listener(text)


class Images:
    """The images of one engine. `auth_files`: the administrator's credential files (None = those of Docker's command;
    Podman reads its own)."""

    def __init__(
        self,
        api: EngineApi,
        policy: Policy = "missing",
        pull_timeout_s: float = 1800.0,
        auth_files: Sequence[Path] | None = None,
        *,
        stall_s: float = STALL_S,
        messages: Messages = pull_messages,
        machine: str = platform.machine(),
    ) -> None:
        self._api = api
        self._policy = policy
        self._timeout_s = pull_timeout_s
        self._auth_files = auth_files
        self._stall_s = stall_s
        self._messages = messages
        self._architecture = _ARCHITECTURES.get(machine, machine)
        self._pulls: dict[tuple[str, RegistryLogin | None], _Pull] = {}
        self._slots = asyncio.Semaphore(MAX_CONCURRENT_PULLS)

    async def ensure(
        self, image: str, registry: RegistryLogin | None = None, progress: Callable[[str], None] = lambda text: None
    ) -> ImageFacts:
        """Return the image, after a pull where the policy requires one. `progress` receives a sentence now and then.

        Raises InstanceError IMAGE_NOT_FOUND, IMAGE_PULL_DENIED, IMAGE_PULL_FAILED, DISK_FULL; UnavailableError
        ENGINE_UNAVAILABLE. Each message names a fix, and none contains a password."""
        found = None if self._policy == "always" else await self.inspect(image)
        if found is None:
            if self._policy == "never" or image.startswith("sha256:"):
                raise no_such_image(image, self._policy)
            await self._join(image, registry, progress)
            found = await self.inspect(image)
            if found is None:
                raise pull_refused(image, "the pull ended but the image is missing; is something removing images?")
        if found.architecture not in ("", self._architecture):
            raise wrong_architecture(image, found.architecture, self._architecture)
        return found

    async def inspect(self, image: str) -> ImageFacts | None:
        """The local image of that name, or None. Raises as `EngineApi.call`."""
        try:
            answer: Mapping[str, Any] = await self._api.call(lambda docker: docker.images.inspect(image))
        except EngineError as error:
            if error.not_found:
                return None
            raise
        config = answer.get("Config") or {}
        variables = dict(str(entry).partition("=")[::2] for entry in config.get("Env") or ())
        architecture, user = (str(where.get(key) or "") for where, key in ((answer, "Architecture"), (config, "User")))
        return ImageFacts(str(answer["Id"]), architecture, user, variables)

    # ---- pulling ------------------------------------------------------------------------------------------------

    async def _join(self, image: str, registry: RegistryLogin | None, progress: Callable[[str], None]) -> None:
        # The key includes the credentials: one caller's login never gives another caller the image.
        key = (image, registry)
        pull = self._pulls.get(key)
        if pull is None:
            pull = self._pulls[key] = _Pull()
            pull.task = asyncio.create_task(self._pull(image, registry, pull), name=f"pull {image}")
            pull.task.add_done_callback(lambda task: self._ended(key, task))
        assert pull.task is not None
        pull.listeners.append(progress)
        if pull.last_text:
            progress(pull.last_text)
        try:
            await asyncio.shield(pull.task)
        except asyncio.CancelledError:
            if (caller := asyncio.current_task()) is None or caller.cancelling():
                raise
            raise InstanceError("IMAGE_PULL_FAILED", f"the pull of {image} was given up", image=image) from None
        finally:
            pull.listeners.remove(progress)
            if not pull.listeners and not pull.task.done():
                self._pulls.pop(key, None)  # the next caller starts a new pull
                pull.task.cancel()
                await asyncio.wait([pull.task])

    def _ended(self, key: tuple[str, RegistryLogin | None], task: asyncio.Task[None]) -> None:
        if (pull := self._pulls.get(key)) is not None and pull.task is task:
            del self._pulls[key]
        if not task.cancelled():
            task.exception()  # waiters have received it; mark it as retrieved if there are none

    async def _pull(self, image: str, registry: RegistryLogin | None, pull: _Pull) -> None:
        pull.report(f"waiting to pull {image}")
        async with self._slots:
            pull.report(f"pulling {image}")
            login = await self._login(image, registry)
            log.info("image.pull", image=image, login=login.source)
            try:
                await self._stream(image, login, pull)
            except EngineError as error:
                raise pull_refused(image, error.text, login) from error
            except ValueError as error:  # a line too long, or not JSON
                raise pull_refused(image, f"the engine's answer can't be read ({type(error).__name__})") from error
            log.info("image.pulled", image=image)

    async def _login(self, image: str, registry: RegistryLogin | None) -> Login:
        if registry is not None:
            return Login(
                {"username": registry.username, "password": registry.password}, "the function's registryConfig"
            )
        await self._api.connect()
        if self._api.kind == "podman":
            return Login({})  # Podman reads the administrator's credentials itself, helpers included
        files = docker_auth_files() if self._auth_files is None else self._auth_files
        return await asyncio.to_thread(find_login, image, files)

    async def _stream(self, image: str, login: Login, pull: _Pull) -> None:
        """Apply the deadlines outside `EngineApi.errors`: a timeout here is the registry's fault, not the engine's."""
        progress = PullProgress(image)
        stall = asyncio.timeout(self._stall_s)
        try:
            async with asyncio.timeout(self._timeout_s), stall:
                await self._follow(image, login, pull, progress, stall)
        except TimeoutError:
            why = f"it took longer than {self._timeout_s:g} s; raise runtime.engine.pull_timeout, or pull it manually"
            if stall.expired():
                why = f"no more data arrived ({progress.sentence}); can this node reach its registry?"
            raise InstanceError("IMAGE_PULL_FAILED", f"the pull of {image} was given up: {why}", image=image) from None

    async def _follow(
        self, image: str, login: Login, pull: _Pull, progress: PullProgress, stall: asyncio.Timeout
    ) -> None:
        loop = asyncio.get_running_loop()
        name = qualified(image) if login.auth else image
        reported_at = 0.0
        async with self._api.stream() as docker, aclosing(self._messages(docker, name, login.auth)) as messages:
            async for message in messages:
                if progress.update(message):
                    patience_s = self._stall_s if progress.downloading else max(self._stall_s, UNPACK_S)
                    stall.reschedule(loop.time() + patience_s)
                if loop.time() - reported_at >= REPORT_INTERVAL_S:
                    reported_at = loop.time()
                    pull.report(progress.sentence)

    async def close(self) -> None:
        """Cancel all running pulls."""
        tasks = [pull.task for pull in self._pulls.values() if pull.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
