"""The one way to a container engine: Docker's API on a unix socket, which Podman speaks too (aiodocker is the client).

The engine may be away, come back, hang or be another one after an upgrade; the agent must live through all of it. So
nothing is connected before it is needed, every call has a deadline and a place among few, and every failure becomes a
`HibernodeError` that says what to do. A connection serves one call: a kept one dies unseen when the engine restarts.
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
"""Where `runtime.engine.socket: auto` looks, in this order."""
DOCKER_API_MIN = (1, 41)
PODMAN_MIN = (4, 3)
MAX_CONCURRENT_CALLS = 8
CHECK_DEADLINE_S = 10.0
CONNECTION_FAILED = 900
"""aiodocker's own status for an engine that could not be reached."""
NO_SPACE = "no space left on device"

Kind = Literal["docker", "podman"]
Call = TypeVar("Call")

log = get_logger()


class EngineError(InstanceError):
    """The engine's own refusal: its HTTP status and its text. Callers classify it; unclassified it is still an answer
    that a user can read. `status` 0 = told in the middle of a stream."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__("ENGINE_REFUSED", f"the container engine says: {text}", status=status)
        self.status = status
        self.text = text

    @property
    def not_found(self) -> bool:
        """Podman says 500 where the container goes away while it looks."""
        return self.status == 404 or (self.status == 500 and "no such container" in self.text)


class EngineApi:
    """Docker or Podman behind `socket` ("auto" = the first of `SOCKETS` that is there). Lives on one event loop.

    `kind`, `version` and `info` (GET /info) are those of the last connect; read them after `connect`. `health` is ""
    while the engine answers, else why it can't be used, as found by the last call or `check`.
    """

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
        """The client itself, for streams; use it within `errors()` after `connect()`. Its calls have no deadline."""
        if self._docker is None:
            raise self._unavailable(self.health or "it was not connected yet")
        return self._docker

    @property
    def facts(self) -> EngineFacts:
        """What the engine said of itself at the last connect; after `connect`."""
        return read_facts(self.kind, self.version, self.info, self.path)

    # ---- being connected ----------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Know which engine it is; costs nothing while that is known. Done again after the engine was away.

        Raises UnavailableError ENGINE_UNAVAILABLE, ENGINE_TOO_OLD.
        """
        if self._connected:
            return
        async with self._connecting:
            if not self._connected:
                await self._check()

    async def check(self) -> None:
        """Does it answer now, and is it one we can use? Asks always. Raises as `connect` does."""
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
            if isinstance(error, EngineError):  # whatever it refuses here, it can't be used
                raise self._unavailable(error.message) from error
            raise

    async def _identify(self) -> None:
        docker = self._open()
        docker.api_version = "auto"  # it may have been upgraded; asks /version by itself where need be
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
        """The client; made when the first engine was found. That socket stays ours, also when another one appears."""
        if self._docker is None:
            if self._socket == "auto":
                self.path = next((path for path in SOCKETS if os.path.exists(path)), "")
                if not self.path:
                    raise UnavailableError(
                        "ENGINE_UNAVAILABLE",
                        f"no container engine: none of {', '.join(SOCKETS)} is there; start docker or podman, or set "
                        "runtime.engine.socket",
                    )
            # Without a limit of its own: followed logs and terminals hold connections for hours.
            self._connector = aiohttp.UnixConnector(self.path, limit=0, force_close=True)
            self._docker = aiodocker.Docker(url="unix://localhost", connector=self._connector)
        return self._docker

    async def close(self) -> None:
        """The agent leaves. Streams that are still open break. Idempotent."""
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

        Connects where need be, waits for one of a few places, and gives it all `deadline_s` (default: the settings'
        operation timeout). After a deadline nobody knows whether the engine still does it: ask before doing it again.

        Raises UnavailableError ENGINE_UNAVAILABLE or ENGINE_TOO_OLD, InstanceError DISK_FULL, and `EngineError` for
        everything that the engine refuses.
        """
        with self.errors():
            async with asyncio.timeout(self._deadline_s if deadline_s is None else deadline_s):
                await self.connect()
                async with self._slots:
                    return await request(self.docker)

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[aiodocker.Docker]:
        """For answers that take as long as they take (pull, logs, exec): connected, errors told as `call` tells them.
        The caller has the deadline, and the bound on how many there are; deadlines inside are the engine's fault."""
        with self.errors():
            await self.connect()
            yield self.docker

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what aiodocker, aiohttp and `asyncio.timeout` raise inside into the errors of `call`."""
        try:
            yield
        except HibernodeError:
            raise
        except aiodocker.DockerError as error:
            raise self._refusal(error) from error
        except TimeoutError as error:
            raise self._unavailable(
                "it did not answer in time; see its log, and whether its disk is slow or full"
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._connection_lost(error) from error
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise self._unavailable(
                f"its answer is not to be understood ({type(error).__name__}); is it an engine at all? Set "
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
        """Not reached, or gone in the middle of a call: who it is must be asked again."""
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
    """UnavailableError ENGINE_TOO_OLD: it lacks what we rely on (cgroups v2 paths, CapDrop and the like by API)."""
    if kind == "podman":
        if _numbers(version) < PODMAN_MIN:
            raise UnavailableError(
                "ENGINE_TOO_OLD", f"Podman {version} is too old; install 4.3 or newer", version=version
            )
    elif _numbers(api) < DOCKER_API_MIN:
        raise UnavailableError(
            "ENGINE_TOO_OLD",
            f"Docker {version} speaks API {api}, 1.41 is needed; install Docker 20.10 or newer",
            version=version,
        )


def _numbers(version: str) -> tuple[int, ...]:
    """ "4.3.1-rhel" as (4, 3): a version is compared by its first two numbers."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _advice(error: BaseException) -> str:
    number = getattr(error, "errno", None) or getattr(getattr(error, "os_error", None), "errno", None)
    match number:
        case errno.ENOENT | errno.ENOTDIR:
            return "there is no such socket; start docker or podman, or set runtime.engine.socket"
        case errno.ECONNREFUSED:
            return "nobody listens there (the socket was left behind); start docker or podman"
        case errno.EACCES | errno.EPERM:
            return (
                "the agent may not open the socket; run the agent as root, or add its user to the socket's group "
                "(members of it are as good as root)"
            )
        case _:
            return f"the connection broke ({_single_line(str(error)) or type(error).__name__}); it may be restarting"


def _plain_message(text: str) -> str:
    """aiodocker hands on the whole body where its type is written in another way than Docker does."""
    if text.startswith("{"):
        with suppress(json.JSONDecodeError):
            return str(json.loads(text).get("message") or text)
    return text


def _single_line(text: str) -> str:
    """An engine's text, bounded, for a log line or an error."""
    return " ".join(text.split())[:2000]
