"""`hibernode provision`: sets and shows instance targets, schedules and scaling policies."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click
import yaml

from agent.cli.commands.deploy import POLL_S, note_waiting
from agent.cli.commands.provision_view import QUALIFIER, fields_of, row_of
from agent.cli.console.output import note, show_json, show_table, show_text, warn
from agent.cli.daemon_calls import SHORT_S, pages, with_scheduler
from agent.cli.fc3.load import load_s_yaml
from agent.cli.fc3.provision import read_provision, target_of
from agent.cli.options import (
    cli_options,
    output_option,
    output_or_yaml_option,
    s_options,
    scheduler_options,
    timeout_option,
)
from agent.core.errors import ConfigError, DeadlineError, PreconditionError
from agent.core.provisioning.placement import PASSING
from agent.v1 import function_service_pb2 as pb
from agent.wire.clients import DaemonChannel
from agent.wire.json_view import to_json

_file = click.Path(path_type=Path, dir_okay=False)
_qualifier = click.option(
    "--qualifier", type=click.Choice([QUALIFIER]), default=QUALIFIER, help="The only version is the last one deployed."
)


@click.group()
def provision() -> None:
    """Set and show how many instances functions have: a target, schedules, and policies that follow a metric.

    Options and files have the names of Function Compute's PutProvisionConfig.

    \b
    Examples:
      hibernode provision put ocr --target 3
      hibernode provision put ocr --target 1 --targetTrackingPolicies provision.json
      hibernode provision list
      hibernode provision put ocr --target 0
    """


@provision.command()
@click.argument("function", required=False, default="")
@click.option("-t", "--template", type=_file, metavar="FILE", help="An s.yaml that names the function.")
@click.option("--resource", default="", metavar="NAME", help="Resource of the s.yaml, if it has several.")
@click.option(
    "--target", "--default-target", type=click.IntRange(0, 10_000), metavar="N",
    help="Instances while no schedule or policy is active; default: the file's defaultTarget.",
)  # fmt: skip
@click.option(
    "--targetTrackingPolicies", "--target-tracking-policies", "policies", type=_file, metavar="FILE",
    help="JSON or YAML with targetTrackingPolicies.",
)  # fmt: skip
@click.option(
    "--scheduledActions", "--scheduled-actions", "actions", type=_file, metavar="FILE",
    help="JSON or YAML with scheduledActions.",
)  # fmt: skip
@click.option(
    "--alwaysAllocateGPU/--no-alwaysAllocateGPU", "--always-allocate-gpu/--no-always-allocate-gpu", "always_on",
    default=None, help="Turn idle mode off or on and replace the instances; default: unchanged.",
)  # fmt: skip
@_qualifier
@click.option("--wait", is_flag=True, help="Return once the target is reached; exit 4 if it can't be.")
@click.option("--dry-run", is_flag=True, help="Only check, locally and at the scheduler.")
@timeout_option("5m")
@s_options
@scheduler_options
@output_option
def put(
    function: str,
    template: Path | None,
    resource: str,
    target: int | None,
    policies: Path | None,
    actions: Path | None,
    always_on: bool | None,
    qualifier: str,
    wait: bool,
    dry_run: bool,
    timeout_s: float,
) -> None:
    """Replace the provisioning of a function: target, schedules and policies. Those not given are removed.

    --target 0 without files releases all instances. Policies follow ProvisionedConcurrencyUtilization, CPUUtilization
    or GPUMemUtilization between minCapacity and maxCapacity. While actions or policies are active, the highest of them
    replaces the target.

    \b
    A file in the format of Function Compute:
      {"targetTrackingPolicies": [{"name": "day", "startTime": "2026-01-01T00:00:00Z",
        "endTime": "2027-01-01T00:00:00Z", "metricType": "ProvisionedConcurrencyUtilization",
        "metricTarget": 0.3, "minCapacity": 2, "maxCapacity": 30}],
       "scheduledActions": [{"name": "morning", "startTime": "2026-01-01T00:00:00Z",
        "endTime": "2027-01-01T00:00:00Z", "target": 5, "scheduleExpression": "cron(0 0 8 * * MON-FRI)",
        "timeZone": "Europe/Berlin"}]}

    \b
    Examples:
      hibernode provision put ocr --target 3 --wait
      hibernode provision put --target 1 --targetTrackingPolicies ./provision.json -t s.yaml
      hibernode provision put ocr --target 0
    """
    name = _function(function, template, resource)
    config = _config(target, policies, actions)
    if always_on is not None:
        config.always_allocate_gpu = always_on

    async def put_config(channel: DaemonChannel) -> pb.PutProvisionConfigResponse:
        request = pb.PutProvisionConfigRequest(function=name, config=config, validate_only=dry_run)
        answer = await channel.call(channel.functions.PutProvisionConfig, request, SHORT_S)
        for text in answer.warnings:
            warn(text)
        if wait and not dry_run:
            answer.provision.CopyFrom(await _wait_for_target(channel, name, timeout_s))
        return answer

    answer = with_scheduler(put_config, f"checking {name}" if dry_run else f"provisioning {name}")
    found = answer.provision
    if cli_options().json:
        show_json({"provision": to_json(found), "warnings": list(answer.warnings)})
        return
    decided = f" by {found.decided_by}" if found.decided_by else ""
    done = "could be provisioned" if dry_run else "provisioned"
    note(f"{name} {done}: target {found.target}{decided}, {found.current} now")


@provision.command("list")
@click.argument("function", required=False, default="")
@scheduler_options
@s_options
@output_or_yaml_option
def list_(function: str) -> None:
    """Show the provisioning of functions and its state: target, current, currentError.

    --output yaml has everything that Function Compute's `s provision list` prints.

    \b
    Examples:
      hibernode provision list
      hibernode provision list ocr --output yaml
      hibernode provision list ocr --output json | jq '.provisions[0].policies'
    """
    found = with_scheduler(lambda channel: list_provisions(channel, function), "listing the provisioning")
    if cli_options().json:
        show_json({"provisions": [to_json(one) for one in found]})
        return
    if cli_options().output == "yaml":
        for one in found:
            show_text(yaml.safe_dump({one.function: [fields_of(one)]}, sort_keys=False, allow_unicode=True))
        return
    columns = ("FUNCTION", "TARGET", "CURRENT", "DECIDED BY", "SCHEDULES", "POLICIES", "ERROR")
    show_table(columns, map(row_of, found), right=("TARGET", "CURRENT"))


@provision.command()
@click.argument("function")
@_qualifier
@scheduler_options
@output_option
def rm(function: str, qualifier: str) -> None:
    """Release all instances of a function: target 0, no schedules, no policies. The function stays deployed.

    \b
    Example:
      hibernode provision rm ocr
    """
    request = pb.DeleteProvisionConfigRequest(function=function)
    with_scheduler(
        lambda channel: channel.call(channel.functions.DeleteProvisionConfig, request, SHORT_S), f"releasing {function}"
    )
    if cli_options().json:
        show_json({"function": function})
    else:
        note(f"{function}: its instances finish their requests and end")


async def list_provisions(channel: DaemonChannel, function: str = "") -> list[pb.Provision]:
    """The provisioning of all functions, or of one."""
    request = pb.ListProvisionConfigsRequest(function=function)
    listing = pages(channel, channel.functions.ListProvisionConfigs, request)
    return [provision async for page in listing for provision in page.provisions]


def _function(function: str, template: Path | None, resource: str) -> str:
    if template is None:
        if not function:
            raise click.UsageError("name the function, or its s.yaml with -t")
        return function
    if function:
        raise click.UsageError("name the function or its s.yaml, not both")
    names = [one.function.name for one in load_s_yaml(template, resource)]
    if len(names) > 1:
        raise click.UsageError(f"{template} has {len(names)} functions; choose one with --resource")
    return names[0]


def _config(target: int | None, policies: Path | None, actions: Path | None) -> pb.ProvisionConfig:
    """The config of the options. Raises ConfigError naming file, line and key."""
    config = pb.ProvisionConfig()
    for path, other in ((policies, actions), (actions, policies)):
        if path is None:
            continue
        written, found = read_provision(path)
        if written.target_tracking_policies is None and written.scheduled_actions is None:
            text = f"{path} has neither targetTrackingPolicies nor scheduledActions; [] removes them"
            raise ConfigError("PROVISION_EMPTY", text)
        target = target_of(written) if target is None else target
        if written.always_allocate_gpu is not None:
            config.always_allocate_gpu = written.always_allocate_gpu
        if path is policies or other is None:
            config.target_tracking_policies.extend(found.target_tracking_policies)
        if path is actions or other is None:
            config.scheduled_actions.extend(found.scheduled_actions)
    if target is None:
        raise click.UsageError("--target is missing: the number of instances while no schedule or policy is active")
    config.default_target = target
    return config


async def _wait_for_target(channel: DaemonChannel, name: str, timeout_s: float) -> pb.Provision:
    """Polls until the function has as many instances as its target; the API has no watch.

    Raises PreconditionError with the scheduler's reason if the error is permanent, DeadlineError PROVISION_TIMEOUT."""
    printed = ""
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                for found in await list_provisions(channel, name):
                    if found.current == found.target:
                        return found
                    if found.current_error and found.current < found.target:
                        if found.current_error_reason not in PASSING:
                            raise PreconditionError(found.current_error_reason or "DEGRADED", found.current_error)
                        printed = note_waiting(printed, found.current_error)
                    break
                else:
                    return pb.Provision(function=name)
                await asyncio.sleep(POLL_S)
    except TimeoutError as error:
        why = f" ({printed})" if printed else ""
        message = f"the target is not reached after {timeout_s:g} s{why}; see `hibernode provision list`"
        raise DeadlineError("PROVISION_TIMEOUT", message) from error
