"""`hibernode deploy`: deploys the functions of an s.yaml to the scheduler."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from agent.cli.commands.functions import get_function, state_of
from agent.cli.console.output import note, show_json, show_text, warn
from agent.cli.daemon_calls import SHORT_S, with_scheduler
from agent.cli.fc3.load import Deployment, HttpTrigger, load_s_yaml
from agent.cli.options import cli_options, output_option, s_options, scheduler_options, timeout_option
from agent.core.errors import DeadlineError, HibernodeError, NotFoundError, PreconditionError
from agent.core.provisioning.placement import PASSING
from agent.v1 import function_service_pb2 as pb
from agent.v1 import types_pb2
from agent.wire.clients import DaemonChannel
from agent.wire.convert_function import function_to_proto
from agent.wire.json_view import to_json

POLL_S = 0.5
DEFAULT_TARGET = 1

template_option = click.option(
    "-t",
    "--template",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("s.yaml"),
    show_default=True,
    metavar="FILE",
    help="The s.yaml.",
)
resource_option = click.option(
    "--resource", default="", metavar="NAME", help="Only this resource of the file; default: all of them."
)

_AUTH = {
    "anonymous": pb.HttpTrigger.AUTH_TYPE_ANONYMOUS,
    "function": pb.HttpTrigger.AUTH_TYPE_FUNCTION,
    "jwt": pb.HttpTrigger.AUTH_TYPE_JWT,
}


@click.command()
@template_option
@resource_option
@click.option(
    "--target",
    type=click.IntRange(0, 10_000),
    metavar="N",
    help="Number of instances; default: the file's provisionConfig, else unchanged, else 1.",
)
@click.option("--wait", is_flag=True, help="Return once the target is reached; exit 4 if it can't be.")
@click.option("--dry-run", is_flag=True, help="Only check the file, locally and at the scheduler.")
@timeout_option("5m")
@s_options
@scheduler_options
@output_option
def deploy(template: Path, resource: str, target: int | None, wait: bool, dry_run: bool, timeout_s: float) -> None:
    """Deploy the functions of an s.yaml (fc3) and print their URLs.

    Files for Function Compute work unchanged; keys without a meaning here are named in warnings. Hibernode's own keys
    are under `hibernode:` in the props: freezeAfter, minAwake, idle, dispatch, wakeFactor, queueLength, queueTimeout,
    gpus, nodeLabels, and for images volumes, shmSize, pidsLimit, openFiles, user, readOnlyRoot, extraHosts. Secrets are
    read from the environment: `${env('NAME')}`.

    \b
    Examples:
      hibernode deploy -t s.yaml --target 3 --wait
      curl "$(hibernode deploy -t s.yaml)invoke" -d 'Nice to meet you'
      hibernode deploy -t s.yaml --dry-run --output json | jq '.functions[0].spec'
    """
    deployments = load_s_yaml(template, resource)
    for one in deployments:
        for text in one.warnings:
            warn(text)

    failures: list[HibernodeError] = []

    async def deploy_all(channel: DaemonChannel) -> list[pb.DeployFunctionResponse]:
        answers: list[pb.DeployFunctionResponse] = []
        requests = [deploy_request(one, await _target(channel, one, target)) for one in deployments]
        # Check all before deploying the first, so that a file with an error deploys nothing.
        for request in requests if dry_run or len(requests) > 1 else ():
            request.validate_only = True
            answers.append(await channel.call(channel.functions.DeployFunction, request, SHORT_S))
        if dry_run:
            return answers
        answers.clear()
        for request in requests:
            request.validate_only = False
            answers.append(await channel.call(channel.functions.DeployFunction, request, SHORT_S))
        if wait:
            try:
                await _wait(channel, answers, timeout_s)
            except HibernodeError as error:  # they are deployed: print their URLs first
                failures.append(error)
        return answers

    names = ", ".join(one.function.name for one in deployments)
    answers = with_scheduler(deploy_all, f"checking {names}" if dry_run else f"deploying {names}")
    for answer in answers:
        for text in answer.warnings:
            warn(text)
    if cli_options().json:
        texts = [*(w for one in deployments for w in one.warnings), *(w for one in answers for w in one.warnings)]
        show_json({"functions": [to_json(one.function) for one in answers], "warnings": texts})
    else:
        _show(answers, dry_run)
    if failures:
        raise failures[0]


def _show(answers: list[pb.DeployFunctionResponse], dry_run: bool) -> None:
    for answer in answers:
        found = answer.function
        done = "could be deployed" if dry_run else "deployed"
        note(f"{found.name} {done}: revision {found.spec.revision}, target {found.target}, {state_of(found)}")
        show_text(f"{found.url}\n" if not dry_run else "")


def deploy_request(deployment: Deployment, target: int) -> pb.DeployFunctionRequest:
    """The request. Fields that the file does not set stay absent, so that the scheduler's defaults apply."""
    return pb.DeployFunctionRequest(
        spec=spec_to_proto(deployment),
        target=target,
        triggers=map(_trigger_to_proto, deployment.triggers),
        provision=deployment.provision,
    )


def spec_to_proto(deployment: Deployment) -> types_pb2.FunctionSpec:
    """The spec with its environment in plain text; only for deploy and create requests."""
    spec = function_to_proto(deployment.function, reveal_secrets=True)
    spec.ClearField("revision")
    for name in sorted(deployment.unset_fields):
        spec.ClearField(name)  # type: ignore[arg-type]  # the stubs list each name
    return spec


def _trigger_to_proto(trigger: HttpTrigger) -> pb.HttpTrigger:
    return pb.HttpTrigger(name=trigger.name, auth_type=_AUTH[trigger.auth_type], methods=trigger.methods)


async def _target(channel: DaemonChannel, deployment: Deployment, option: int | None) -> int:
    """The target of the option or the file; without either, the function's current one."""
    target = deployment.target if option is None else option
    if target is not None:
        return target
    try:
        return (await get_function(channel, deployment.function.name)).default_target
    except NotFoundError:
        return DEFAULT_TARGET


async def _wait(channel: DaemonChannel, answers: list[pb.DeployFunctionResponse], timeout_s: float) -> None:
    """Waits until all functions are READY and updates the answers with them. Raises DeadlineError DEPLOY_TIMEOUT."""
    try:
        async with asyncio.timeout(timeout_s):
            for answer in answers:
                answer.function.CopyFrom(await _wait_until_ready(channel, answer.function.name))
    except TimeoutError as error:
        message = f"the target is not reached after {timeout_s:g} s; `hibernode functions` shows the progress and why"
        raise DeadlineError("DEPLOY_TIMEOUT", message) from error


async def _wait_until_ready(channel: DaemonChannel, name: str) -> pb.Function:
    """Polls until the function is READY; the API has no watch. Prints temporary errors and waits.

    Raises PreconditionError with the scheduler's reason if the error is permanent.
    """
    printed = ""
    while True:
        found = await get_function(channel, name)
        if found.state == pb.Function.STATE_READY:
            return found
        if found.state == pb.Function.STATE_DEGRADED:
            why = found.current_error or "it is degraded"
            why = why if name in why else f"{name}: {why}"
            if found.current_error_reason not in PASSING:
                raise PreconditionError(found.current_error_reason or "DEGRADED", why)
            printed = note_waiting(printed, why)
        await asyncio.sleep(POLL_S)


def note_waiting(printed: str, text: str) -> str:
    """Prints why a command waits, unless `text` was `printed` last. Returns `text`."""
    if text != printed:
        note(f"waiting: {text}")
    return text
