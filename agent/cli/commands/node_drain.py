"""`hibernode node drain --wait`: polls a node until it has no instances, and prints what delays the drain."""

from __future__ import annotations

import asyncio
from collections import Counter

from agent.cli.commands.functions import list_functions
from agent.cli.commands.ps import list_fleet
from agent.cli.console.output import note, warn
from agent.cli.daemon_calls import pages
from agent.core.errors import DeadlineError, NotFoundError, PreconditionError, UnavailableError
from agent.core.natural_order import natural_key
from agent.core.provisioning.model import parse_request_id
from agent.v1 import function_service_pb2, scheduler_service_pb2, types_pb2
from agent.wire.clients import DaemonChannel

POLL_S = 0.5
_DRAINS = (types_pb2.Node.SCHEDULING_DRAINED, types_pb2.Node.SCHEDULING_EMPTIED)
_ENDED = (types_pb2.Instance.STATE_STOPPED, types_pb2.Instance.STATE_FAILED)


async def list_nodes(channel: DaemonChannel) -> list[types_pb2.Node]:
    """Every node of the fleet."""
    listing = pages(channel, channel.scheduler.ListNodes, scheduler_service_pb2.ListNodesRequest())
    return [node async for page in listing for node in page.nodes]


async def wait_until_drained(channel: DaemonChannel, name: str, timeout_s: float) -> types_pb2.Node:
    """Waits until none of the scheduler's instances is left on the node, and returns the node. Prints each change on
    stderr.

    Raises DeadlineError DRAIN_TIMEOUT with what is left and why, PreconditionError DRAIN_TAKEN_BACK, NotFoundError
    NODE_NOT_FOUND, UnavailableError NODE_LOST.
    """
    printed: dict[str, str] = {}
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                found = next((one for one in await list_nodes(channel) if one.name == name), None)
                if found is None:
                    raise NotFoundError("NODE_NOT_FOUND", f"the scheduler no longer knows a node {name!r}")
                if found.scheduling not in _DRAINS:
                    text = f"the drain of {name} was cancelled by another command"
                    raise PreconditionError("DRAIN_TAKEN_BACK", text)
                here = [one for one in await list_fleet(channel, node=name) if one.state not in _ENDED]
                functions = {one.name: one for one in await list_functions(channel)}
                left = [one for one in here if _is_drained(one, functions)]
                if found.state == types_pb2.Node.STATE_LOST:
                    text = "is lost: its instances are replaced on other nodes, and drained when it comes back"
                    raise UnavailableError("NODE_LOST", f"{name} {text}")
                if not left:
                    _warn_of_unmanaged(name, here)
                    return found
                _print_changes(printed, _progress(name, left, functions))
                await asyncio.sleep(POLL_S)
    except TimeoutError as error:
        message = (
            f"{name} is not drained after {timeout_s:g} s; {'; '.join(printed.values()) or 'its state is unknown'}"
        )
        raise DeadlineError("DRAIN_TIMEOUT", message) from error


def _is_drained(one: types_pb2.Instance, functions: dict[str, function_service_pb2.Function]) -> bool:
    """Whether the instance goes: it is stopping, or the scheduler created it for a function that it knows."""
    created = parse_request_id(one.request_id) is not None and one.function in functions
    return created or one.state == types_pb2.Instance.STATE_STOPPING


def _progress(
    name: str, left: list[types_pb2.Instance], functions: dict[str, function_service_pb2.Function]
) -> dict[str, str]:
    """Lines by subject: "" = how many instances are left; a function's name = why its instances stay."""
    counts = Counter(one.function for one in left)
    ending = sum(one.state == types_pb2.Instance.STATE_STOPPING for one in left)
    listed = ", ".join(
        f"{count} of {function}" for function, count in sorted(counts.items(), key=lambda entry: natural_key(entry[0]))
    )
    lines = {"": f"{name} has {len(left)} instance(s) left ({listed}), {ending} of them finishing their requests"}
    for function in sorted(counts, key=natural_key):
        known = functions.get(function)
        if known is not None and known.current_error:
            lines[function] = f"{function}: {known.current_error} ({known.current_error_reason})"
    return lines


def _print_changes(printed: dict[str, str], lines: dict[str, str]) -> None:
    for subject, text in lines.items():
        if printed.get(subject) != text:
            note(text)
    printed.clear()
    printed.update(lines)


def _warn_of_unmanaged(name: str, instances: list[types_pb2.Instance]) -> None:
    if instances:
        uids = ", ".join(one.uid for one in instances)
        warn(f"{uids}: not created by this scheduler, so they stay; run `hibernode rm` on {name} to end them")
