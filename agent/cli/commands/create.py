"""`hibernode create`: starts one instance on one node, without the scheduler."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import suppress
from pathlib import Path

import click

from agent.cli.commands.deploy import resource_option, spec_to_proto, template_option
from agent.cli.commands.ps import list_instances, state_of
from agent.cli.console.output import note, show_json, show_text, warn
from agent.cli.daemon_calls import SHORT_S, with_agent
from agent.cli.fc3.load import load_s_yaml
from agent.cli.options import agent_options, cli_options, output_option, timeout_option
from agent.core.errors import HibernodeError, InstanceError
from agent.v1 import instance_service_pb2 as pb
from agent.v1 import types_pb2
from agent.wire.clients import DaemonChannel
from agent.wire.json_view import to_json

POLL_S = 1.0


@click.command()
@template_option
@resource_option
@click.option("--wait", is_flag=True, help="Return once the instance is RUNNING; exit 1 if it fails.")
@click.option(
    "--request-id", default="", metavar="ID", help="A repeated ID returns the existing instance; default: a new ID."
)
@timeout_option("10m")
@agent_options
@output_option
def create(template: Path, resource: str, wait: bool, request_id: str, timeout_s: float) -> None:
    """Start one instance of a function directly on this node and print its uid.

    The instance has no URL and is not replaced when it ends; use `hibernode deploy` for that.

    \b
    Examples:
      uid=$(hibernode create -t s.yaml --wait)
      hibernode create -t s.yaml --resource ocr --output json | jq .state
    """
    deployments = load_s_yaml(template, resource)
    if len(deployments) > 1:
        names = ", ".join(one.resource for one in deployments)
        raise click.UsageError(f"{template} has several functions; choose one with --resource: {names}")
    deployment = deployments[0]
    for text in deployment.warnings:
        warn(text)
    # A create that was lost on its way can be repeated with this ID without starting two instances.
    request_id = request_id or f"cli-{secrets.token_hex(8)}"
    request = pb.CreateInstanceRequest(request_id=request_id, spec=spec_to_proto(deployment), wait=wait)

    async def create_instance(channel: DaemonChannel) -> types_pb2.Instance:
        deadline_s = timeout_s if wait else SHORT_S
        creating = asyncio.create_task(channel.call(channel.instances.CreateInstance, request, deadline_s))
        try:
            await _print_progress(channel, request, creating)
            return (await creating).instance
        except HibernodeError:
            await _show_failed(channel, request)
            raise
        finally:
            creating.cancel()

    found = with_agent(create_instance, f"starting an instance of {deployment.function.name}")
    if cli_options().json:
        show_json(to_json(found))
    else:
        note(f"{found.uid} of {found.function}: {state_of(found)}")
        show_text(f"{found.uid}\n")
    if found.state == types_pb2.Instance.STATE_FAILED:
        why = found.state_message or "it ended before it was ready; `hibernode logs` shows what it printed"
        raise InstanceError(found.state_reason or "INSTANCE_FAILED", f"{found.uid}: {why}")


async def _show_failed(channel: DaemonChannel, request: pb.CreateInstanceRequest) -> None:
    """Prints the uid of the instance that the failed call has made, if it made one, and how to see more of it."""
    with suppress(HibernodeError):  # the call's own error is reported
        for one in await list_instances(channel, request.spec.name, include_ended=True):
            if one.request_id == request.request_id:
                note(f"{one.uid} of {one.function}: {state_of(one)}; `hibernode logs {one.uid}` shows what it printed")
                show_text("" if cli_options().json else f"{one.uid}\n")


async def _print_progress(
    channel: DaemonChannel, request: pb.CreateInstanceRequest, creating: asyncio.Task[pb.CreateInstanceResponse]
) -> None:
    """Prints each step of the start, such as how much of an image is pulled, until `creating` is done."""
    printed = ""
    while not creating.done():
        await asyncio.wait([creating], timeout=POLL_S)
        with suppress(HibernodeError):  # `creating` reports the error
            for one in [] if creating.done() else await list_instances(channel, request.spec.name):
                if one.request_id == request.request_id and one.progress not in ("", printed):
                    printed = one.progress
                    note(f"{one.uid}: {printed}")
