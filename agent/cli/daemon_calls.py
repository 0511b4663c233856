"""Calls to a daemon from a command: find it, call it, show that something is under way, close."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import nullcontext
from typing import Protocol, TypeVar

from grpc import aio

from agent.cli.console.progress import progress
from agent.cli.daemon_locator import Daemon, DaemonAddress, find_daemon
from agent.cli.options import cli_options
from agent.core.errors import HibernodeError, UnauthenticatedError, UnavailableError
from agent.wire.clients import DaemonChannel

SHORT_S = 15.0
"""Deadline of a call that only reads."""
PAGE_SIZE = 500
MAX_PAGES = 10_000


class PageRequest(Protocol):
    """A request for a page of a list."""

    page_size: int
    page_token: str


class Page(Protocol):
    """A page of a list, and the token of the next one; "" after the last."""

    next_page_token: str


T = TypeVar("T")
_Request = TypeVar("_Request", bound=PageRequest)
_Page = TypeVar("_Page", bound=Page)


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


def with_agent(story: Callable[[DaemonChannel], Awaitable[T]], doing: str) -> T:
    """Runs `story` on a channel to the agent. `doing` is what a person sees after a second, as in "waking 3
    instances"; "" shows nothing."""
    return _run("agent", story, doing)


def with_scheduler(story: Callable[[DaemonChannel], Awaitable[T]], doing: str) -> T:
    """Runs `story` on a channel to the scheduler."""
    return _run("scheduler", story, doing)


def _run(daemon: Daemon, story: Callable[[DaemonChannel], Awaitable[T]], doing: str) -> T:
    options = cli_options()
    place = find_daemon(daemon, options)
    try:
        return asyncio.run(_told(place, options.insecure, story, doing))
    except HibernodeError as error:
        raise _with_advice(error, daemon, place) from error


async def _told(place: DaemonAddress, insecure: bool, story: Callable[[DaemonChannel], Awaitable[T]], doing: str) -> T:
    shown = progress(doing) if doing else nullcontext()
    async with shown, DaemonChannel(place.target, place.token, insecure) as channel:
        return await story(channel)


def _with_advice(error: HibernodeError, daemon: Daemon, place: DaemonAddress) -> HibernodeError:
    """gRPC's own words about a daemon that is not there help nobody."""
    if isinstance(error, UnavailableError) and error.reason == "UNREACHABLE":
        message = (
            f"no {daemon} answers at {place.target}: is it running? "
            f"`hibernode {daemon} --config FILE` starts it, --home or --{daemon} names another one"
        )
        return UnavailableError("UNREACHABLE", message, target=place.target)
    if isinstance(error, UnauthenticatedError) and error.reason == "TOKEN_MISSING":
        message = f"the {daemon} at {place.target} wants its token: name the file with --token-file"
        return UnauthenticatedError("TOKEN_MISSING", message, target=place.target)
    return error
