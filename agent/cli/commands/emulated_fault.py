"""`hibernode emulated fault`: makes operations of emulated GPUs fail, to rehearse what happens to requests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from agent.cli.console.output import note, show_json, show_table
from agent.cli.options import cli_options, output_option
from agent.emulated.faults import KINDS, OPERATIONS

if TYPE_CHECKING:
    from agent.emulated.control import DeviceView, EmulatedDriver, FaultView

F = TypeVar("F", bound=Callable[..., Any])
_KEY = "agent.cli.emulated_directory"
COMPUTE_MODES = ("DEFAULT", "EXCLUSIVE_PROCESS", "PROHIBITED")


class AnyCase(click.Choice[str]):
    """A choice of upper-case words, accepted in any case."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return super().convert(value.upper(), param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        return super().shell_complete(ctx, param, incomplete.upper())


def _keep(context: click.Context, _parameter: click.Parameter, value: Path | None) -> None:
    if value is not None:
        context.find_root().meta[_KEY] = value


def directory_option(command: F) -> F:
    """The --dir option; it may come before or after the subcommand's name."""
    return click.option(
        "--dir",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        expose_value=False,
        callback=_keep,
        help="Folder of `hibernode emulated up`.",
    )(command)


def _driver() -> EmulatedDriver:
    from agent.emulated.control import EmulatedDriver

    context = click.get_current_context()
    directory = context.find_root().meta.get(_KEY)
    if directory is None:
        raise click.UsageError("Missing option '--dir': the folder of `hibernode emulated up`.", context)
    return EmulatedDriver(directory)


def _find_gpu(driver: EmulatedDriver, name: str) -> DeviceView:
    """The GPU with this index, UUID or unique prefix of a UUID. Raises BadParameter."""
    devices = driver.devices()
    found = [one for one in devices if name == str(one.index) or (len(name) > 4 and one.uuid.startswith(name))]
    if len(found) != 1:
        known = ", ".join(f"{one.index} ({one.uuid})" for one in devices)
        raise click.BadParameter(f"{name!r} is none of the driver's GPUs: {known}", param_hint="GPU")
    return found[0]


@click.group()
@directory_option
def fault() -> None:
    """Make an emulated GPU fail, to test how the agent reacts.

    \b
    Rehearse what happens to a request for a frozen instance when ...
      the wake finds no free GPU memory, once:
        hibernode emulated fault --dir /tmp/gpus add restore OUT_OF_MEMORY
      the driver does not answer until the fault is cleared:
        hibernode emulated fault --dir /tmp/gpus add restore HANG
        hibernode emulated fault --dir /tmp/gpus clear
      the process dies during its freeze:
        hibernode emulated fault --dir /tmp/gpus add checkpoint DEATH
      a lock reports an error although the process is locked:
        hibernode emulated fault --dir /tmp/gpus add lock NOT_READY --after
      GPU 0 falls off the bus:
        hibernode emulated fault --dir /tmp/gpus xid 0 79
        hibernode emulated fault --dir /tmp/gpus device 0 --nvml-error 15
      a process that the host cannot see takes 12 GiB:
        hibernode emulated fault --dir /tmp/gpus reserve 0 12GiB
    """


@fault.command()
@directory_option
@click.argument("operation", type=click.Choice(list(OPERATIONS)), metavar="OPERATION")
@click.argument("kind", type=AnyCase(KINDS), metavar="KIND")
@click.option("--pid", type=click.IntRange(min=1), help="Only this process; default: any.")
@click.option("--gpu", metavar="GPU", help="Only processes on this GPU (index or UUID); for a restore, the target GPU.")
@click.option(
    "--times", type=click.IntRange(min=0), default=1, show_default=True, help="How often it fails; 0 = always."
)
@click.option("--skip", type=click.IntRange(min=0), default=0, show_default=True, help="How many calls succeed first.")
@click.option("--after", is_flag=True, help="Do the operation, then fail.")
@click.option(
    "--delay",
    "delay_ms",
    metavar="MS",
    type=click.IntRange(min=0),
    default=0,
    help="Additional milliseconds; SLOW requires it.",
)
def add(
    operation: str, kind: str, pid: int | None, gpu: str | None, times: int, skip: int, after: bool, delay_ms: int
) -> None:
    """Plan a fault: an operation that fails. Prints the fault's number.

    OPERATION is lock, checkpoint, restore, unlock or state.

    \b
    KIND is the error returned instead of doing the operation: NOT_READY,
    NOT_SUPPORTED, OPERATING_SYSTEM, OUT_OF_MEMORY, INVALID_VALUE,
    ILLEGAL_STATE, NOT_INITIALIZED or NOT_PERMITTED; or one of:
      DEATH   the process dies during the call, which returns OPERATING_SYSTEM
      HANG    no answer until `clear`, even after SIGTERM; then the operation is done
      STALE   returns success without doing anything
      FAILED  OPERATING_SYSTEM, and the process's state is FAILED from then on
      SLOW    the operation takes --delay longer
      CHECKPOINTING, RESTORING  of state only: answers this state

    \b
    Examples:
      hibernode emulated fault --dir /tmp/gpus add lock NOT_READY --times 3
      hibernode emulated fault --dir /tmp/gpus add restore OUT_OF_MEMORY --gpu 0 --times 0
      hibernode emulated fault --dir /tmp/gpus add checkpoint SLOW --delay 5000
    """
    from agent.emulated.faults import Fault, check, find_operation

    check(Fault(0, find_operation(operation), kind, times=times, skip=skip, after=after, delay_ms=delay_ms))
    with _driver() as driver:
        uuid = _find_gpu(driver, gpu).uuid if gpu is not None else None
        number = driver.fault(
            operation, kind, pid=pid, gpu=uuid, times=times, skip=skip, after=after, delay_ms=delay_ms
        )
    click.echo(number)


@fault.command("list")
@directory_option
@output_option
def list_() -> None:
    """List the planned faults in their order."""
    from dataclasses import asdict

    with _driver() as driver:
        found = driver.faults()
    if cli_options().json:
        show_json({"faults": [asdict(one) for one in found]})
        return
    show_faults(found)


def show_faults(found: list[FaultView]) -> None:
    """Prints the table of faults on stdout."""
    show_table(
        ("FAULT", "OPERATION", "KIND", "PID", "GPU", "TIMES", "SKIP", "DELAY", "STRUCK"),
        (
            (
                str(one.id),
                one.operation,
                f"{one.kind} (after)" if one.after else one.kind,
                str(one.pid or "-"),
                one.gpu or "-",
                str(one.times) if one.times else "always",
                str(one.skip),
                f"{one.delay_ms} ms" if one.delay_ms else "-",
                str(one.hits),
            )
            for one in found
        ),
        right=("FAULT", "PID", "SKIP", "DELAY", "STRUCK"),
    )


@fault.command()
@directory_option
def clear() -> None:
    """Remove all planned faults and continue calls that hang.

    Calls held by a HANG are executed now, even if their caller has gone. Changes made by `device` and `reserve` stay.
    """
    with _driver() as driver:
        count = len(driver.faults())
        hung = sum(len(one.hung) for one in driver.processes())
        driver.clear_faults()
    note(f"{count} planned faults cleared, {hung} hanging calls continued")


@fault.command()
@directory_option
@click.argument("gpu")
@click.argument("code", type=click.IntRange(min=0))
def xid(gpu: str, code: int) -> None:
    """Report an XID error of a GPU, as a driver does when hardware fails.

    Codes: 79 = the GPU fell off the bus, 48 = a memory error.

    \b
    Example:
      hibernode emulated fault --dir /tmp/gpus xid 0 79
    """
    with _driver() as driver:
        driver.raise_xid(_find_gpu(driver, gpu).uuid, code)


@fault.command()
@directory_option
@click.argument("gpu")
@click.option("--persistence/--no-persistence", default=None, help="Persistence mode.")
@click.option("--mig/--no-mig", default=None, help="MIG mode (A100, H100, ...).")
@click.option("--compute-mode", type=AnyCase(COMPUTE_MODES), metavar="MODE", help=f"One of {', '.join(COMPUTE_MODES)}.")
@click.option(
    "--nvml-error", type=click.IntRange(0, 999), help="Error of NVML calls: 15 = GPU is lost, 999 = unknown; 0 = none."
)
@click.option("--silent/--no-silent", default=None, help="NVML calls on this GPU hang.")
def device(
    gpu: str,
    persistence: bool | None,
    mig: bool | None,
    compute_mode: str | None,
    nvml_error: int | None,
    silent: bool | None,
) -> None:
    """Change settings of a GPU until the driver ends. Options that are not given keep their value.

    \b
    Examples:
      hibernode emulated fault --dir /tmp/gpus device 0 --no-persistence
      hibernode emulated fault --dir /tmp/gpus device 0 --nvml-error 15
      hibernode emulated fault --dir /tmp/gpus device 1 --silent
    """
    changes = (persistence, mig, compute_mode, nvml_error, silent)
    if all(one is None for one in changes):
        raise click.UsageError("nothing to change: name at least one option", click.get_current_context())
    with _driver() as driver:
        driver.set_device(
            _find_gpu(driver, gpu).uuid,
            persistence=persistence,
            mig=mig,
            compute_mode=compute_mode,
            nvml_error=nvml_error,
            silent=silent,
        )


@fault.command()
@directory_option
@click.argument("gpu")
@click.argument("size")
def reserve(gpu: str, size: str) -> None:
    """Reserve SIZE of a GPU's memory, as a process that the host cannot see would; 0 releases it.

    \b
    Example:
      hibernode emulated fault --dir /tmp/gpus reserve 0 12GiB
    """
    from agent.config import parse_size_bytes

    try:
        bytes_ = 0 if size == "0" else parse_size_bytes(size)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="SIZE") from error
    with _driver() as driver:
        driver.reserve(_find_gpu(driver, gpu).uuid, bytes_)
