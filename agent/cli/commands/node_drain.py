"""What `hibernode node drain --wait` does: looks at a node until it has no instances, and says what keeps them."""

from __future__ import annotations

import asyncio
from collections import Counter

from agent.cli.commands.functions import list_functions
from agent.cli.commands.ps import list_fleet
from agent.cli.console.output import note, warn
from agent.cli.daemon_calls import PAGE_SIZE, SHORT_S
from agent.core.errors import DeadlineError, NotFoundError, PreconditionError, UnavailableError
from agent.core.provisioning.model import parse_request_id
from agent.v1 import function_service_pb2, scheduler_service_pb2, types_pb2
from agent.wire.clients import DaemonChannel

MAX_PAGES = 1000
POLL_S = 0.5
_DRAINS = (types_pb2.Node.SCHEDULING_DRAINED, types_pb2.Node.SCHEDULING_EMPTIED)
_ENDED = (types_pb2.Instance.STATE_STOPPED, types_pb2.Instance.STATE_FAILED)


async def list_nodes(channel: DaemonChannel) -> list[types_pb2.Node]:
    """Every node of the fleet."""
    found: list[types_pb2.Node] = []
    token = ""
    for _ in range(MAX_PAGES):
        request = scheduler_service_pb2.ListNodesRequest(page_size=PAGE_SIZE, page_token=token)
        page = await channel.call(channel.scheduler.ListNodes, request, SHORT_S)
        found += page.nodes
        token = page.next_page_token
        if not token:
            break
    return found


async def wait_until_drained(channel: DaemonChannel, name: str, timeout_s: float) -> types_pb2.Node:
    """The node once none of the scheduler's instances is left on it. Every change is told on stderr.

    Raises DeadlineError DRAIN_TIMEOUT with what is left and why, PreconditionError DRAIN_TAKEN_BACK, UnavailableError
    NODE_LOST.
    """
    said: dict[str, str] = {}
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                found = next((one for one in await list_nodes(channel) if one.name == name), None)
                if found is None:
                    raise NotFoundError("NODE_NOT_FOUND", f"the scheduler knows no node {name!r} any more")
                if found.scheduling not in _DRAINS:
                    raise PreconditionError(
                        "DRAIN_TAKEN_BACK", f"somebody has asked something else of {name} meanwhile"
                    )
                here = [one for one in await list_fleet(channel, node=name) if one.state not in _ENDED]
                functions = {one.name: one for one in await list_functions(channel)}
                foreign = [one for one in here if not _ours(one, functions)]
                left = [one for one in here if _ours(one, functions)]
                if found.state == types_pb2.Node.STATE_LOST:
                    text = "is lost: what it had is replaced elsewhere, and drained when it comes back"
                    raise UnavailableError("NODE_LOST", f"{name} {text}")
                if not left:
                    _say_what_stays(name, foreign)
                    return found
                _say_changes(said, _words(name, left, functions))
                await asyncio.sleep(POLL_S)
    except TimeoutError as error:
        message = f"{name} is not drained after {timeout_s:g} s; {'; '.join(said.values()) or 'nothing is known of it'}"
        raise DeadlineError("DRAIN_TIMEOUT", message) from error


def _ours(one: types_pb2.Instance, functions: dict[str, function_service_pb2.Function]) -> bool:
    """The scheduler moves it: it made it for a function it knows. What is ending is on its way in any case."""
    made = parse_request_id(one.request_id) is not None and one.function in functions
    return made or one.state == types_pb2.Instance.STATE_STOPPING


def _words(
    name: str, left: list[types_pb2.Instance], functions: dict[str, function_service_pb2.Function]
) -> dict[str, str]:
    """What there is to tell, by what it is about: how many are left, and why those of a function stay."""
    counts = Counter(one.function for one in left)
    ending = sum(one.state == types_pb2.Instance.STATE_STOPPING for one in left)
    listed = ", ".join(f"{count} of {function}" for function, count in sorted(counts.items()))
    words = {"": f"{name} has {len(left)} instance(s) left ({listed}), {ending} of them ending their requests"}
    for function in sorted(counts):
        known = functions.get(function)
        if known is not None and known.current_error:
            words[function] = f"{function}: {known.current_error} ({known.current_error_reason})"
    return words


def _say_changes(said: dict[str, str], words: dict[str, str]) -> None:
    for about, text in words.items():
        if said.get(about) != text:
            note(text)
    said.clear()
    said.update(words)


def _say_what_stays(name: str, foreign: list[types_pb2.Instance]) -> None:
    if foreign:
        uids = ", ".join(one.uid for one in foreign)
        warn(f"{uids}: not made by this scheduler, so they stay; `hibernode rm` at {name} ends them")
