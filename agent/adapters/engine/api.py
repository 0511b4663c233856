"""Calls a container engine through Docker's API on a unix socket, which Podman also speaks (client: aiodocker).

The engine may stop, come back, hang or change its version while the agent runs. So it connects on first use, every call
has a deadline and takes one of few slots, and every failure becomes a `HibernodeError` with a fix. Each call uses its
own connection: an idle one would break unnoticed when the engine restarts.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Literal, TypeVar

import aiodocker
import aiohttp

from agent.adapters.engine.facts import EngineFacts, read_facts
from agent.core.errors import HibernodeError, InstanceError, UnavailableError
from agent.log import get_logger

SOCKETS = ("/run/docker.sock", "/run/podman/podman.sock")
"""The sockets that `runtime.engine.socket: auto` tries, in this order."""
DOCKER_API_MIN = (1, 41)
PODMAN_MIN = (4, 3)
MAX_CONCURRENT_CALLS = 8
CHECK_DEADLINE_S = 10.0
CONNECTION_FAILED = 900
"""aiodocker's status for an unreachable engine."""
NO_SPACE = "no space left on device"

Kind = Literal["docker", "podman"]
Call = TypeVar("Call")

log = get_logger()


class EngineError(InstanceError):
    """A refusal by the engine: its HTTP status (0 = sent within a stream) and its text. Callers classify it."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__("ENGINE_REFUSED", f"the container engine says: {text}", status=status)
        self.status = status
        self.text = text

    @property
    def not_found(self) -> bool:
        """Also Podman's 500 for a container that disappears during the call."""
        return self.status == 404 or (self.status == 500 and "no such container" in self.text)


class EngineApi:
    """Docker or Podman behind `socket` ("auto" = the first of `SOCKETS` that exists). Lives on one event loop.

    `kind`, `version` and `info` (GET /info) date from the last connect. `health` is "" while the engine answers, else
    why the last call or `check` could not use it."""

    def __init__(
        self, socket: str = "auto", deadline_s: float = 60.0, max_concurrent_calls: int = MAX_CONCURRENT_CALLS
    ) -> None:
        self._socket = socket
        self._deadline_s = deadline_s
        self._slots = asyncio.Semaphore(max_concurrent_calls)
        self._connecting = asyncio.Lock()
        self._docker: aiodocker.Docker | None = None
        self._connector: aiohttp.UnixConnector | None = None
        self._connected = False
        self.path = "" if socket == "auto" else socket
        self.kind: Kind = "docker"
        self.version = ""
        self.info: Mapping[str, Any] = {}
        self.health = ""

    @property
    def docker(self) -> aiodocker.Docker:
        """The client, for streams; use it inside `errors()` after `connect()`. Its calls have no deadline."""
        if self._docker is None:
            raise self._unavailable(self.health or "it is not connected yet")
        return self._docker

    @property
    def facts(self) -> EngineFacts:
        """What the engine reported about itself at the last connect."""
        return read_facts(self.kind, self.version, self.info, self.path)

    # ---- connection ---------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Identify the engine. Does nothing while it is known; runs again after the engine was unavailable.

        Raises UnavailableError ENGINE_UNAVAILABLE, ENGINE_TOO_OLD."""
        if self._connected:
            return
        async with self._connecting:
            if not self._connected:
                await self._check()

    async def check(self) -> None:
        """Check now whether the engine answers and is supported. Raises as `connect` does."""
        async with self._connecting:
            await self._check()

    async def _check(self) -> None:
        try:
            with self.errors():
                async with asyncio.timeout(min(CHECK_DEADLINE_S, self._deadline_s)):
                    await self._identify()
        except HibernodeError as error:
            if self._connected or not self.health:
                log.warning("engine.unavailable", socket=self.path or self._socket, error=str(error))
            self._connected, self.health = False, error.message
            if isinstance(error, EngineError):  # an engine that refuses /version or /info is unusable
                raise self._unavailable(error.message) from error
            raise

    async def _identify(self) -> None:
        docker = self._open()
        docker.api_version = "auto"  # aiodocker negotiates again: the engine may have been upgraded
        answer = await docker.version()
        kind: Kind = "podman" if _is_podman(answer) else "docker"
        version = str(answer["Version"])
        _refuse_old(kind, version, str(answer["ApiVersion"]))
        if not self._connected or (kind, version) != (self.kind, self.version):
            self.info = await docker.system.info()
            log.info("engine.connected", kind=kind, version=version, socket=self.path)
        self.kind, self.version = kind, version
        self._connected, self.health = True, ""

    def _open(self) -> aiodocker.Docker:
        """The client, created once a socket exists. That socket is kept even if another one appears."""
        if self._docker is None:
            if self._socket == "auto":
                self.path = next((path for path in SOCKETS if os.path.exists(path)), "")
                if not self.path:
                    raise UnavailableError(
                        "ENGINE_UNAVAILABLE",
                        f"no container engine: none of {', '.join(SOCKETS)} exists; start docker or podman, or set "
                        "runtime.engine.socket",
                    )
            # No connection limit: followed logs and terminals hold connections for hours.
            self._connector = aiohttp.UnixConnector(self.path, limit=0, force_close=True)
            self._docker = aiodocker.Docker(url="unix://localhost", connector=self._connector)
        return self._docker

    async def close(self) -> None:
        """Close the client; open streams break. Idempotent."""
        docker, self._docker, self._connected = self._docker, None, False
        if docker:
            await docker.close()
        if self._connector:
            await self._connector.close()
            self._connector = None

    # ---- calls --------------------------------------------------------------------------------------------------

    async def call(
        self, request: Callable[[aiodocker.Docker], Awaitable[Call]], deadline_s: float | None = None
    ) -> Call:
        """Make one call: `await api.call(lambda docker: docker.images.inspect(name))`.

        Connects if needed and waits for a slot, all within `deadline_s` (default: the configured operation timeout).
        After a timeout the engine may still complete the call: check before repeating it. Raises UnavailableError
        ENGINE_UNAVAILABLE or ENGINE_TOO_OLD, InstanceError DISK_FULL, and `EngineError` for every other refusal."""
        with self.errors():
            async with asyncio.timeout(self._deadline_s if deadline_s is None else deadline_s):
                await self.connect()
                async with self._slots:
                    return await request(self.docker)

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[aiodocker.Docker]:
        """The connected client for calls of any length (pull, logs, exec), with the errors of `call`. The caller sets
        the deadline and limits the number of streams; a timeout inside counts as the engine's fault."""
        with self.errors():
            await self.connect()
            yield self.docker

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Translate exceptions of aiodocker, aiohttp and `asyncio.timeout` into the errors of `call`."""
        try:
            yield
        except HibernodeError:
            raise
        except aiodocker.DockerError as error:
            raise self._refusal(error) from error
        except TimeoutError as error:
            raise self._unavailable(
                "it did not answer in time; check its log, and whether its disk is slow or full"
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._connection_lost(error) from error
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise self._unavailable(
                f"its answer is unintelligible ({type(error).__name__}); is it a container engine? Check "
                "runtime.engine.socket"
            ) from error

    def _refusal(self, error: aiodocker.DockerError) -> HibernodeError:
        if error.status == CONNECTION_FAILED:
            return self._connection_lost(error.__context__ or error)
        text = _single_line(_plain_message(str(error.message)))
        if NO_SPACE in text.lower():
            return InstanceError(
                "DISK_FULL", f"the container engine's disk is full; free space there ({text})", socket=self.path
            )
        return EngineError(error.status, text)

    def _connection_lost(self, error: BaseException) -> UnavailableError:
        """The engine was unreachable or vanished during a call; it is identified again on the next one."""
        refusal = self._unavailable(_advice(error))
        self._connected, self.health = False, refusal.message
        return refusal

    def _unavailable(self, why: str) -> UnavailableError:
        where = self.path or self._socket
        return UnavailableError(
            "ENGINE_UNAVAILABLE", f"the container engine at {where} can't be used: {why}", socket=where
        )


def _is_podman(version: Mapping[str, Any]) -> bool:
    return any("podman" in str(part.get("Name", "")).lower() for part in version.get("Components") or ())


def _refuse_old(kind: Kind, version: str, api: str) -> None:
    """Raise UnavailableError ENGINE_TOO_OLD if the API lacks cgroup v2 paths, CapDrop and the like."""
    if kind == "podman":
        if _numbers(version) < PODMAN_MIN:
            raise UnavailableError(
                "ENGINE_TOO_OLD", f"Podman {version} is too old; install 4.3 or newer", version=version
            )
    elif _numbers(api) < DOCKER_API_MIN:
        raise UnavailableError(
            "ENGINE_TOO_OLD",
            f"Docker {version} speaks API {api}, but 1.41 is needed; install Docker 20.10 or newer",
            version=version,
        )


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version: "4.3.1-rhel" -> (4, 3)."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _advice(error: BaseException) -> str:
    number = getattr(error, "errno", None) or getattr(getattr(error, "os_error", None), "errno", None)
    match number:
        case errno.ENOENT | errno.ENOTDIR:
            return "there is no such socket; start docker or podman, or set runtime.engine.socket"
        case errno.ECONNREFUSED:
            return "nothing listens on it (the socket was left behind); start docker or podman"
        case errno.EACCES | errno.EPERM:
            return (
                "the agent may not open the socket; run the agent as root, or add its user to the socket's group "
                "(members of that group have root's power)"
            )
        case _:
            return f"the connection broke ({_single_line(str(error)) or type(error).__name__}); it may be restarting"


def _plain_message(text: str) -> str:
    """The message field, where aiodocker returns a whole JSON body (it expects Docker's exact content type)."""
    if text.startswith("{"):
        with suppress(json.JSONDecodeError):
            return str(json.loads(text).get("message") or text)
    return text


def _single_line(text: str) -> str:
    """An engine's text on one line, truncated for a log line or an error."""
    return " ".join(text.split())[:2000]
