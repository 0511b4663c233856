"""`hibernode inspect|freeze|wake|rm`: acts on instances given by uid or unambiguous prefix."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import click

from agent.cli.commands.ps import show_instances, show_instances_json, state_of
from agent.cli.console.output import note, show_json, show_pairs
from agent.cli.console.units import clock, duration, seconds, size
from agent.cli.daemon_calls import SHORT_S, with_agent
from agent.cli.options import agent_options, cli_options, output_option, seconds_of, timeout_option
from agent.core.errors import HibernodeError
from agent.core.types import SECOND_NS
from agent.v1 import instance_service_pb2 as pb
from agent.v1 import types_pb2
from agent.wire.clients import DaemonChannel
from agent.wire.json_view import to_json

MAX_AT_ONCE = 16
"""Concurrent calls."""

_uids = click.argument("uids", nargs=-1, required=True, metavar="UID...")


@click.command()
@click.argument("uid")
@agent_options
@output_option
def inspect(uid: str) -> None:
    """Show everything about one instance. Environment variables are never shown.

    \b
    Examples:
      hibernode inspect i-3f9a
      hibernode inspect i-3f9a --output json | jq .last_wake
    """

    async def get(channel: DaemonChannel) -> types_pb2.Instance:
        answer = await channel.call(channel.instances.GetInstance, pb.GetInstanceRequest(uid=uid), SHORT_S)
        return answer.instance

    found = with_agent(get, f"getting {uid}")
    if cli_options().json:
        show_json(to_json(found))
        return
    _show(found)


@click.command()
@_uids
@timeout_option("3m")
@agent_options
@output_option
def freeze(uids: tuple[str, ...], timeout_s: float) -> None:
    """Freeze idle instances now: their GPU memory moves to host memory. Returns once they are FROZEN.

    An instance that is serving a request is not frozen (exit 4).

    \b
    Example:
      hibernode freeze i-3f9a
    """

    async def call(channel: DaemonChannel, uid: str) -> types_pb2.Instance:
        request = pb.FreezeInstanceRequest(uid=uid)
        return (await channel.call(channel.instances.FreezeInstance, request, timeout_s)).instance

    _each("freezing", uids, call)


@click.command()
@_uids
@timeout_option("3m")
@click.option(
    "--hold",
    "hold_s",
    type=seconds_of,
    default="0",
    metavar="DURATION",
    help="How long to stay awake for the first request; default: the agent's (2s).",
)
@agent_options
@output_option
def wake(uids: tuple[str, ...], timeout_s: float, hold_s: float) -> None:
    """Wake instances, waiting for a GPU if necessary. Returns once they are RUNNING.

    \b
    Example:
      hibernode wake i-3f9a --hold 30s
    """

    async def call(channel: DaemonChannel, uid: str) -> types_pb2.Instance:
        request = pb.WakeInstanceRequest(uid=uid, hold_ns=round(hold_s * SECOND_NS))
        return (await channel.call(channel.instances.WakeInstance, request, timeout_s)).instance

    _each("waking", uids, call)


@click.command()
@_uids
@timeout_option("5m")
@click.option("--force", is_flag=True, help="Kill at once: its requests fail with 502, /pre-stop is not called.")
@click.option(
    "--grace",
    "grace_s",
    type=seconds_of,
    default="0",
    metavar="DURATION",
    help="Longest drain, and longest wait from SIGTERM to SIGKILL; default: the agent's.",
)
@agent_options
@output_option
def rm(uids: tuple[str, ...], timeout_s: float, force: bool, grace_s: float) -> None:
    """Drain, stop and remove instances of this node. Returns once they have ended.

    The scheduler replaces instances of deployed functions; remove the function with `hibernode functions rm NAME`.

    \b
    Examples:
      hibernode rm i-3f9a
      hibernode rm --force $(hibernode ps -q)
    """

    async def call(channel: DaemonChannel, uid: str) -> types_pb2.Instance:
        request = pb.StopInstanceRequest(uid=uid, force=force, grace_ns=round(grace_s * SECOND_NS))
        return (await channel.call(channel.instances.StopInstance, request, timeout_s)).instance

    _each("stopping", uids, call)


_Call = Callable[[DaemonChannel, str], Awaitable[types_pb2.Instance]]


def _each(doing: str, uids: Sequence[str], call: _Call) -> None:
    """Makes the call for every uid, shows those that succeeded, then raises the first error."""

    async def call_all(channel: DaemonChannel) -> list[types_pb2.Instance | HibernodeError]:
        free = asyncio.Semaphore(MAX_AT_ONCE)

        async def attempt(uid: str) -> types_pb2.Instance | HibernodeError:
            async with free:
                try:
                    return await call(channel, uid)
                except HibernodeError as error:
                    return error

        return list(await asyncio.gather(*map(attempt, uids)))

    results = with_agent(call_all, f"{doing} {uids[0] if len(uids) == 1 else f'{len(uids)} instances'}")
    done = [result for result in results if isinstance(result, types_pb2.Instance)]
    failures = [(uid, result) for uid, result in zip(uids, results, strict=True) if isinstance(result, HibernodeError)]
    if cli_options().json:
        show_instances_json(done)
    elif done:
        show_instances(done)
    for uid, error in failures[1:]:
        note(f"hibernode: {uid}: {error.message} ({error.reason})")
    if failures:
        raise failures[0][1]


def _show(found: types_pb2.Instance) -> None:
    spec = found.spec
    awake = f"{duration(found.last_wake.total_ns)}, {duration(found.last_wake.driver_ns)} of it the driver's"
    show_pairs(
        (
            ("Uid", found.uid),
            ("Function", f"{found.function} (revision {found.revision})"),
            ("Node", found.node),
            ("State", f"{state_of(found)} since {clock(found.state_time)}"),
            ("Starting", found.progress),
            ("Reason", " ".join(filter(None, (found.state_reason, found.state_message)))),
            ("Healthy", "yes" if found.healthy else "no"),
            ("Requests", f"{found.in_flight} in it, {found.waiting} waiting, {spec.instance_concurrency} at once"),
            ("GPUs", ", ".join(found.gpu_uuids)),
            ("GPU memory", size(found.vram_bytes)),
            ("In host memory", size(found.frozen_bytes)),
            ("Wakes", f"{found.wake_count} (last: {awake})" if found.HasField("last_wake") else str(found.wake_count)),
            ("Freezes", str(found.freeze_count)),
            (
                "Metered",
                ", ".join(
                    (
                        f"{seconds(found.active_ns)} s active",
                        f"{seconds(found.idle_ns)} s idle",
                        f"{seconds(found.unbilled_ns)} s unbilled",
                    )
                ),
            ),
            ("Image", spec.image),
            ("Command", " ".join((*spec.entrypoint, *spec.command))),
            ("Variables", ", ".join(sorted(spec.environment))),
            ("Address", found.address),
            ("Pid", str(found.pid) if found.pid else ""),
            ("Container", found.container_id[:12]),
            ("Created", clock(found.create_time)),
            ("Request id", found.request_id),
        )
    )
