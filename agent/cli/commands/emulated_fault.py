"""`hibernode emulated fault`: what goes wrong on emulated GPUs, to rehearse what then becomes of a request."""

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
    """One of upper-case words, typed in any case."""

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
    """The driver's folder; it may stand before or after the subcommand's name."""
    return click.option(
        "--dir",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        expose_value=False,
        callback=_keep,
        help="Of `hibernode emulated up`.",
    )(command)


def _driver() -> EmulatedDriver:
    from agent.emulated.control import EmulatedDriver

    context = click.get_current_context()
    directory = context.find_root().meta.get(_KEY)
    if directory is None:
        raise click.UsageError("Missing option '--dir': the folder of `hibernode emulated up`.", context)
    return EmulatedDriver(directory)


def _find_gpu(driver: EmulatedDriver, wanted: str) -> DeviceView:
    """By index or uuid (its beginning is enough where it is the only one)."""
    devices = driver.devices()
    found = [one for one in devices if wanted == str(one.index) or (len(wanted) > 4 and one.uuid.startswith(wanted))]
    if len(found) != 1:
        known = ", ".join(f"{one.index} ({one.uuid})" for one in devices)
        raise click.BadParameter(f"{wanted!r} is none of the driver's GPUs: {known}", param_hint="GPU")
    return found[0]


@click.group()
@directory_option
def fault() -> None:
    """Make an emulated GPU fail, to see what the agent makes of it.

    \b
    Rehearse what happens to a request whose instance sleeps, when ...
      the wake finds no memory on the GPU, once:
        hibernode emulated fault --dir /tmp/gpus add restore OUT_OF_MEMORY
      the driver never answers, and goes on later:
        hibernode emulated fault --dir /tmp/gpus add restore HANG
        hibernode emulated fault --dir /tmp/gpus clear
      the process dies half-way through its freeze:
        hibernode emulated fault --dir /tmp/gpus add checkpoint DEATH
      a lock says no, but the process is locked:
        hibernode emulated fault --dir /tmp/gpus add lock NOT_READY --after
      GPU 0 falls off the bus:
        hibernode emulated fault --dir /tmp/gpus xid 0 79
        hibernode emulated fault --dir /tmp/gpus device 0 --nvml-error 15
      somebody outside of this host's view takes 12 GiB:
        hibernode emulated fault --dir /tmp/gpus reserve 0 12GiB
    """


@fault.command()
@directory_option
@click.argument("operation", type=click.Choice(list(OPERATIONS)), metavar="OPERATION")
@click.argument("kind", type=AnyCase(KINDS), metavar="KIND")
@click.option("--pid", type=click.IntRange(min=1), help="Only this process; default: any.")
@click.option("--gpu", metavar="GPU", help="Only where this GPU is used (of a restore: woken onto); index or uuid.")
@click.option("--times", type=click.IntRange(min=0), default=1, show_default=True, help="How often; 0 = always.")
@click.option("--skip", type=click.IntRange(min=0), default=0, show_default=True, help="So many go well first.")
@click.option("--after", is_flag=True, help="The operation is done, and then it goes wrong.")
@click.option("--delay", "delay_ms", metavar="MS", type=click.IntRange(min=0), default=0, help="Milliseconds longer.")
def add(
    operation: str,
    kind: str,
    pid: int | None,
    gpu: str | None,
    times: int,
    skip: int,
    after: bool,
    delay_ms: int,
) -> None:
    """Plan that an operation goes wrong. Prints the fault's number.

    OPERATION is lock, checkpoint, restore, unlock or state.

    \b
    KIND is what the caller is answered in place of the work: NOT_READY,
    NOT_SUPPORTED, OPERATING_SYSTEM, OUT_OF_MEMORY, INVALID_VALUE,
    ILLEGAL_STATE, NOT_INITIALIZED or NOT_PERMITTED; or what happens:
      DEATH   the process dies half-way; the caller is answered OPERATING_SYSTEM
      HANG    no answer, SIGTERM or not, until `clear`; and then it is done
      STALE   success is answered, and nothing was done
      FAILED  OPERATING_SYSTEM, and the process's state is FAILED for good
      SLOW    it takes --delay longer

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
    """List the faults still to come, in their order."""
    from dataclasses import asdict

    with _driver() as driver:
        found = driver.faults()
    if cli_options().json:
        show_json({"faults": [asdict(one) for one in found]})
        return
    show_faults(found)


def show_faults(found: list[FaultView]) -> None:
    """As a table: when and where each strikes, and how often it has."""
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
    """Plan nothing any more; what hangs goes on.

    Calls that a HANG holds are done now, whether or not their caller still waits. GPUs stay as
    `device` and `reserve` made them.
    """
    with _driver() as driver:
        count = len(driver.faults())
        hung = sum(len(one.hung) for one in driver.processes())
        driver.clear_faults()
    note(f"{count} planned faults cleared, {hung} calls that hung go on")


@fault.command()
@directory_option
@click.argument("gpu")
@click.argument("code", type=click.IntRange(min=0))
def xid(gpu: str, code: int) -> None:
    """Report an XID error of a GPU.

    As a driver does when the hardware fails: 79 = it fell off the bus, 48 = its memory failed.

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
@click.option("--mig/--no-mig", default=None, help="Partitioned (models that can be: A100, H100, ...).")
@click.option(
    "--compute-mode",
    type=AnyCase(COMPUTE_MODES),
    metavar="MODE",
    help=f"Who may use it: {', '.join(COMPUTE_MODES)}.",
)
@click.option("--nvml-error", type=click.IntRange(0, 999), help="Answer NVML so: 15 = GPU is lost, 999; 0 = soundly.")
@click.option("--silent/--no-silent", default=None, help="NVML calls on it hang.")
def device(
    gpu: str,
    persistence: bool | None,
    mig: bool | None,
    compute_mode: str | None,
    nvml_error: int | None,
    silent: bool | None,
) -> None:
    """Change what a GPU is like.

    For as long as the driver runs; what is not named stays as it is.

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
    """Take memory of a GPU; 0 gives it back.

    SIZE is taken in all, as by a process outside of this host's view.

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
