"""The agent's own calls into an instance: readiness, lifecycle hooks, health probes (as in Function Compute)."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable

from agent.core.errors import DeadlineError, HibernodeError, InstanceError
from agent.core.types import SECOND_NS, FunctionSpec, HealthCheck, Hook
from agent.http.message import Header
from agent.http.pool import Pool

ACCOUNT_ID = "0"
"""Hibernode has no accounts; this value is for programs that only pass it on (log fields, paths)."""
CODE_PATH = "/code"
"""Where Function Compute puts a code package. An image has none: the folder is the image's own, or missing."""
READY_POLL_MIN_S = 0.005
READY_POLL_MAX_S = 0.25


def function_headers(function: FunctionSpec) -> list[Header]:
    """The `x-fc-*` headers that are the same for every call into an instance; made once per instance.

    `x-fc-access-key-*`, `x-fc-security-token` and `x-fc-service-log*` exist only in the cloud. A synchronous call is
    never repeated, so the retry count is always 0.
    """
    return [
        (b"x-fc-function-name", function.name.encode()),
        (b"x-fc-function-handler", function.handler.encode()),
        (b"x-fc-function-memory", str(function.memory_bytes >> 20).encode()),
        (b"x-fc-function-timeout", str(function.timeout_ns // SECOND_NS).encode()),
        (b"x-fc-region", function.region.encode()),
        (b"x-fc-account-id", ACCOUNT_ID.encode()),
        (b"x-fc-qualifier", b"LATEST"),
        (b"x-fc-version-id", function.revision.encode()),
        (b"x-fc-retry-count", b"0"),
    ]


async def wait_until_listening(host: str, port: int, deadline: float, ended: Callable[[], bool]) -> None:
    """Try to connect until the IPv4 address `host` listens. `deadline` is in loop time; `ended`: the process has died.

    Raises InstanceError FUNCTION_NOT_STARTED in Function Compute's words.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    pause = READY_POLL_MIN_S
    failure = "nothing was tried"
    while True:
        try:
            async with asyncio.timeout_at(min(deadline, loop.time() + 1.0)):
                with socket.socket() as probe:
                    probe.setblocking(False)
                    # Never through a gateway: once an instance's network is gone, a stranger there may answer for it.
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_DONTROUTE, 1)
                    await loop.sock_connect(probe, (host, port))
            return
        except (OSError, TimeoutError) as error:
            failure = os.strerror(error.errno) if error.errno else "connection timed out"
        if ended() or loop.time() + pause > deadline:
            why = "the process ended" if ended() else f"Ping CA failed due to: {failure}"
            raise InstanceError(
                "FUNCTION_NOT_STARTED",
                "The CA's http server cannot be started:"
                f"ContainerStartDuration:{int((loop.time() - began) * SECOND_NS)}. {why}. "
                f"It must listen on 0.0.0.0:$FC_CUSTOM_LISTEN_PORT ({port}).",
            )
        await asyncio.sleep(pause)  # no event tells when another process begins to listen
        pause = min(pause * 1.5, READY_POLL_MAX_S)


async def call_hook(pool: Pool, function: FunctionSpec, hook: Hook, method: bytes, path: str, request_id: str) -> int:
    """Call a hook; returns its status. Raises DeadlineError HOOK_TIMEOUT, or the connection's error."""
    timeout_s = hook.timeout_ns / SECOND_NS
    own = [(b"x-fc-request-id", request_id.encode()), (b"x-fc-control-path", path.encode())]
    headers = [*own, *function_headers(function)]
    try:
        async with asyncio.timeout(timeout_s):
            response = await pool.request(method, path.encode(), headers, timeout_s=timeout_s, whole=False)
    except TimeoutError:
        raise DeadlineError("HOOK_TIMEOUT", f"{path} did not answer within {timeout_s:g} s") from None
    return response.status


async def initialize(pool: Pool, function: FunctionSpec, request_id: str) -> None:
    """`POST /initialize`, once per container. Raises InstanceError INITIALIZATION_ERROR unless 2xx in time."""
    hook = function.hooks.initializer
    if hook is None:
        return
    try:
        status = await call_hook(pool, function, hook, b"POST", "/initialize", request_id)
    except HibernodeError as error:
        raise InstanceError("INITIALIZATION_ERROR", f"POST /initialize failed: {error.message}") from error
    if not 200 <= status < 300:
        raise InstanceError("INITIALIZATION_ERROR", f"POST /initialize answered {status}, 2xx is success")


async def probe(pool: Pool, function: FunctionSpec, check: HealthCheck) -> int:
    """One health probe: the status of its answer, 0 if there was none in time. A long body is not read to its end."""
    timeout_s = check.timeout_ns / SECOND_NS
    try:
        async with asyncio.timeout(timeout_s):
            response = await pool.request(
                b"GET", check.path.encode(), function_headers(function), timeout_s=timeout_s, whole=False
            )
    except (HibernodeError, TimeoutError, OSError):
        return 0
    return response.status


def is_healthy(status: int) -> bool:
    """Function Compute's rule for the status of a health probe."""
    return 200 <= status < 400
