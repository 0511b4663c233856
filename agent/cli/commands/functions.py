"""`hibernode functions`: lists, shows and removes deployed functions."""

from __future__ import annotations

import click

from agent.cli.console.output import note, show_json, show_pairs, show_table
from agent.cli.console.units import clock, duration, size
from agent.cli.daemon_calls import SHORT_S, pages, with_scheduler
from agent.cli.options import cli_options, output_option, scheduler_options
from agent.v1 import function_service_pb2 as pb
from agent.wire.clients import DaemonChannel
from agent.wire.json_view import short_name, to_json

_NEXT = {
    pb.StartFailure.NEXT_TRY_UNDER_WAY: "the next is under way",
    pb.StartFailure.NEXT_TRY_WAITING: "the next once there is room",
    pb.StartFailure.NEXT_TRY_GIVEN_UP: "given up until the next deploy",
}


@click.group(invoke_without_command=True)
@scheduler_options
@output_option
@click.pass_context
def functions(context: click.Context) -> None:
    """List the deployed functions, show one, remove one.

    \b
    Examples:
      hibernode functions
      hibernode functions show ocr
      hibernode functions rm ocr
      hibernode functions --output json | jq -r '.functions[].url'
    """
    if context.invoked_subcommand is None:
        context.invoke(list_)


@functions.command("list")
@scheduler_options
@output_option
def list_() -> None:
    """List the functions by name."""
    found = with_scheduler(list_functions, "listing the functions")
    if cli_options().json:
        show_json({"functions": [to_json(one) for one in found]})
        return
    show_table(
        ("FUNCTION", "REVISION", "STATE", "INSTANCES", "AWAKE", "QUEUED", "URL", "DEPLOYED", "ERROR"),
        (
            (
                one.name,
                revisions_of(one),
                state_of(one),
                f"{one.current}/{one.target}",
                str(one.awake),
                str(one.queued),
                one.url or "-",
                clock(one.update_time),
                error_of(one),
            )
            for one in found
        ),
        right=("INSTANCES", "AWAKE", "QUEUED"),
    )


@functions.command()
@click.argument("name")
@scheduler_options
@output_option
def show(name: str) -> None:
    """Show one function, and why it has fewer instances than its target."""
    found = with_scheduler(lambda channel: get_function(channel, name), f"getting {name}")
    if cli_options().json:
        show_json(to_json(found))
        return
    _show(found)


@functions.command()
@click.argument("name")
@scheduler_options
def rm(name: str) -> None:
    """Delete a function: its instances are drained and stopped. Its usage is kept."""
    request = pb.DeleteFunctionRequest(name=name)
    with_scheduler(lambda channel: channel.call(channel.functions.DeleteFunction, request, SHORT_S), f"removing {name}")
    note(f"{name} is being removed: its instances finish their requests first")


async def get_function(channel: DaemonChannel, name: str) -> pb.Function:
    """One function. Raises NotFoundError."""
    return (await channel.call(channel.functions.GetFunction, pb.GetFunctionRequest(name=name), SHORT_S)).function


async def list_functions(channel: DaemonChannel) -> list[pb.Function]:
    """All functions."""
    listing = pages(channel, channel.functions.ListFunctions, pb.ListFunctionsRequest())
    return [function async for page in listing for function in page.functions]


def state_of(function: pb.Function) -> str:
    """The function's state, such as READY."""
    return short_name(pb.Function.State.DESCRIPTOR, function.state)


def last_failure(failure: pb.StartFailure) -> str:
    """When and where the last start failed, which attempt it was, and when the next one follows."""
    where = " ".join(filter(None, (failure.node and f"on {failure.node}", failure.uid)))
    attempt = f"attempt {failure.attempt} of {failure.max_attempts}"
    return ", ".join(filter(None, (clock(failure.time), where, attempt, next_try(failure))))


def next_try(failure: pb.StartFailure) -> str:
    """When the failed start is tried again."""
    if failure.next_try == pb.StartFailure.NEXT_TRY_SCHEDULED:
        return f"the next at {clock(failure.next_try_time)}"
    return _NEXT.get(failure.next_try, "")


def _failure_lines(found: pb.Function) -> list[tuple[str, str]]:
    if not found.HasField("last_failure"):
        return []
    failure = found.last_failure
    lines = [("Last failure", f"{failure.reason}, {last_failure(failure)}")]
    if failure.uid:
        lines.append(("Its log", f"hibernode logs {failure.uid}, on {failure.node}"))
    return lines


def error_of(one: pb.Function) -> str:
    """What is in the way, and the last failed start: `NO_FREE_GPU; IMAGE_PULL_FAILED 2/5`."""
    if not one.HasField("last_failure"):
        return one.current_error_reason or "-"
    failure = one.last_failure
    failed = f"{failure.reason} {failure.attempt}/{failure.max_attempts}"
    return failed if one.current_error_reason == failure.reason else f"{one.current_error_reason}; {failed}"


def revisions_of(one: pb.Function) -> str:
    """The deployed revision, and those that run if they are others: `3 (runs 2)`."""
    running = [found.revision for found in one.running]
    deployed = one.spec.revision
    return deployed if running in ([], [deployed]) else f"{deployed} (runs {', '.join(running)})"


def _show(found: pb.Function) -> None:
    spec = found.spec
    idle = spec.idle_policy
    gpu = spec.gpu
    freezes = f"after {duration(idle.freeze_after_ns)}" if idle.freeze_after_ns else "at once"
    never = idle.mode == type(idle).MODE_NEVER
    show_pairs(
        (
            ("Function", f"{found.name} (revision {spec.revision})"),
            ("State", " ".join(filter(None, (state_of(found), found.current_error_reason, found.current_error)))),
            *_failure_lines(found),
            ("Running", ", ".join(f"revision {one.revision}: {one.current}" for one in found.running)),
            ("URL", found.url),
            ("Instances", f"{found.current} of {found.target}, {found.awake} awake"),
            ("Queued", f"{found.queued} of {spec.queue_length} at most"),
            ("Image", spec.image),
            ("Command", " ".join((*spec.entrypoint, *spec.command))),
            ("Variables", ", ".join(sorted(spec.environment))),
            ("GPU", f"{gpu.count} x {gpu.model or gpu.gpu_type or 'any'}, {size(gpu.memory_bytes)} billed"),
            ("CPU, memory", f"{spec.vcpu_millis / 1000:g} vCPU, {size(spec.memory_bytes)}"),
            ("Concurrency", f"{spec.instance_concurrency} requests at once per instance"),
            ("Timeout", duration(spec.timeout_ns)),
            ("Freezes", "never" if never else freezes),
            ("Deployed", f"{clock(found.update_time)}, first {clock(found.create_time)}"),
        )
    )
