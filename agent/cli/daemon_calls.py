"""Calls the agent or the scheduler for a command: finds the daemon, shows progress, explains connection errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import nullcontext
from typing import Protocol, TypeVar

from grpc import aio

from agent.cli.console.progress import progress
from agent.cli.daemon_locator import Daemon, DaemonAddress, find_daemon
from agent.cli.options import cli_options
from agent.core.errors import ConfigError, HibernodeError, UnauthenticatedError, UnavailableError
from agent.wire.clients import DaemonChannel

SHORT_S = 15.0
"""Deadline of a call that only reads."""
PAGE_SIZE = 500
MAX_PAGES = 10_000


class PageRequest(Protocol):
    """A request for a page of a list."""

    page_size: int
    page_token: str


class ListPage(Protocol):
    """A page of a list, and the token of the next one; "" after the last."""

    next_page_token: str


T = TypeVar("T")
_Request = TypeVar("_Request", bound=PageRequest)
_Page = TypeVar("_Page", bound=ListPage)


async def pages(
    channel: DaemonChannel, method: aio.UnaryUnaryMultiCallable[_Request, _Page], request: _Request
) -> AsyncIterator[_Page]:
    """Calls a list method until its last page. Sets the page size and token of `request`."""
    request.page_size = PAGE_SIZE
    for _ in range(MAX_PAGES):
        page = await channel.call(method, request, SHORT_S)
        yield page
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


def with_agent(operation: Callable[[DaemonChannel], Awaitable[T]], doing: str) -> T:
    """Runs `operation` on a channel to the agent. After a second it shows `doing`, such as "waking 3 instances", unless
    that is empty."""
    return _run("agent", operation, doing)


def with_scheduler(operation: Callable[[DaemonChannel], Awaitable[T]], doing: str) -> T:
    """Runs `operation` on a channel to the scheduler, as `with_agent` does."""
    return _run("scheduler", operation, doing)


def _run(daemon: Daemon, operation: Callable[[DaemonChannel], Awaitable[T]], doing: str) -> T:
    options = cli_options()
    address = find_daemon(daemon, options)

    async def run() -> T:
        shown = progress(doing) if doing else nullcontext()
        async with shown, DaemonChannel(address.target, address.token, options.insecure) as channel:
            return await operation(channel)

    try:
        return asyncio.run(run())
    except HibernodeError as error:
        raise _with_advice(error, daemon, address) from error


def _with_advice(error: HibernodeError, daemon: Daemon, address: DaemonAddress) -> HibernodeError:
    """Replaces gRPC's message about an unreachable daemon by one that says what to do."""
    if isinstance(error, UnavailableError) and error.reason == "UNREACHABLE":
        message = (
            f"no {daemon} answers at {address.target}; start it with `hibernode {daemon} --config FILE`, "
            f"or name another one with --home or --{daemon}"
        )
        return UnavailableError("UNREACHABLE", message, target=address.target)
    if error.reason == "TARGET_INSECURE":
        message = (
            f"refusing to send the token unencrypted to {address.target}; use a tunnel (ssh -L), or --insecure if the "
            "network itself is trusted"
        )
        return ConfigError("TARGET_INSECURE", message, target=address.target)
    if isinstance(error, UnauthenticatedError) and error.reason == "TOKEN_MISSING":
        message = f"the {daemon} at {address.target} requires a token; name its file with --token-file"
        return UnauthenticatedError("TOKEN_MISSING", message, target=address.target)
    return error
