"""`hibernode emulated`: an NVIDIA driver for machines without a GPU."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent.cli.commands.emulated_fault import COMPUTE_MODES, AnyCase, fault, show_faults
from agent.cli.options import cli_options, output_option, timeout_option
from agent.core.errors import DeadlineError, UnavailableError
from agent.core.gpus.speeds import CARDS
from agent.emulated.profiles import PROFILES

if TYPE_CHECKING:
    from agent.emulated.control import DeviceView

POLL_S = 0.05

_directory = click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    metavar="DIR",
    help="Folder of the driver's sockets and libraries.",
)


@click.group()
def emulated() -> None:
    """Emulate an NVIDIA driver: libcuda, libnvidia-ml and cuda-checkpoint for machines without a GPU.

    \b
    Examples:
      hibernode emulated up --dir /tmp/gpus --gpus 2 --profile 580 &
      hibernode emulated wait --dir /tmp/gpus
      eval "$(hibernode emulated env --dir /tmp/gpus)"
      hibernode doctor
      hibernode emulated fault --dir /tmp/gpus add restore OUT_OF_MEMORY
    """


emulated.add_command(fault)


@emulated.command()
@_directory
@click.option("--gpus", default=2, show_default=True, help="Number of GPUs.")
@click.option("--profile", default="580", show_default=True, help=f"Driver version: {', '.join(PROFILES)}.")
@click.option("--gib", default=16.0, show_default=True, help="GiB of each GPU; uses host memory once allocated.")
@click.option("--model", default="T4", show_default=True, help="GPUs are named `Emulated MODEL`.")
@click.option("--bandwidth", default="0", show_default=True, help="Of a restore, such as 8GB/s; 0 = memory speed.")
@click.option(
    "--card", type=click.Choice(tuple(CARDS)), help="Be as slow as this card's driver, instead of --bandwidth."
)
@click.option("--fixed-us", default=0, show_default=True, help="Additional microseconds for each operation.")
@click.option("--persistence/--no-persistence", default=True, show_default=True, help="Persistence mode.")
@click.option("--mig/--no-mig", default=False, show_default=True, help="MIG mode (A100, H100, ...).")
@click.option(
    "--compute-mode",
    type=AnyCase(COMPUTE_MODES),
    default="DEFAULT",
    show_default=True,
    metavar="MODE",
    help=f"One of {', '.join(COMPUTE_MODES)}.",
)
def up(
    directory: Path,
    gpus: int,
    profile: str,
    gib: float,
    model: str,
    bandwidth: str,
    card: str | None,
    fixed_us: int,
    persistence: bool,
    mig: bool,
    compute_mode: str,
) -> None:
    """Run the driver in the foreground until SIGINT or SIGTERM.

    The first start compiles its libraries. `hibernode emulated wait` returns once the driver answers.
    """
    import uvloop

    from agent.emulated.options import GIB, Options, parse_bandwidth, parse_compute_mode
    from agent.emulated.server import run

    options = Options(
        directory=directory,
        gpus=gpus,
        profile=profile,
        memory_bytes=int(gib * GIB),
        model=model,
        persistence=persistence,
        mig=mig,
        compute_mode=parse_compute_mode(compute_mode),
        bandwidth_bytes_s=parse_bandwidth(bandwidth),
        fixed_us=fixed_us,
        card=card or "",
    )
    uvloop.run(run(options))


@emulated.command()
@_directory
@timeout_option("2m")
def wait(directory: Path, timeout_s: float) -> None:
    """Wait until the driver answers.

    For scripts that start `up` in the background. Exit code 5 if the driver does not answer in time.

    \b
    Example:
      hibernode emulated up --dir /tmp/gpus &
      hibernode emulated wait --dir /tmp/gpus --timeout 30s && hibernode emulated ps --dir /tmp/gpus
    """
    from agent.cli.console.progress import blocking_progress
    from agent.emulated.control import check_running

    deadline = time.monotonic() + timeout_s
    with blocking_progress(f"waiting for the emulated driver in {directory}"):
        while True:
            try:
                check_running(directory)
                return
            except UnavailableError as error:
                if time.monotonic() >= deadline:
                    fix = f"see what `hibernode emulated up --dir {directory}` printed, or allow a longer --timeout"
                    message = f"no emulated driver answers in {directory} after {timeout_s:g} s; {fix}"
                    raise DeadlineError("EMULATED_DRIVER_TIMEOUT", message) from error
            time.sleep(POLL_S)


@emulated.command()
@_directory
@click.option(
    "--format",
    "form",
    type=click.Choice(("sh", "yaml", "cdi")),
    default="sh",
    show_default=True,
    help="Exports for a shell, the gpu: section of agent.yaml, or a CDI specification.",
)
def env(directory: Path, form: str) -> None:
    """Print the settings that make programs use the driver.

    Exit code 5 if no driver runs in the folder; `hibernode emulated wait` waits for it.

    \b
    Formats:
      sh    exports for eval "$(...)", for any program on this host
      yaml  the gpu: section of agent.yaml, which mounts the libraries and the socket into
            containers; start the agent itself under the exports of sh
      cdi   a CDI specification of kind nvidia.com/gpu (JSON), for gpu.attach: cdi and for
            podman run --device nvidia.com/gpu=all

    \b
    Examples:
      eval "$(hibernode emulated env --dir /tmp/gpus)"
      hibernode emulated env --dir /tmp/gpus --format yaml >> agent.yaml
      hibernode emulated env --dir /tmp/gpus --format cdi | sudo tee /etc/cdi/emulated.json
    """
    from agent.emulated import env as environment
    from agent.emulated.control import EmulatedDriver, check_running

    check_running(directory)
    match form:
        case "yaml":
            import yaml

            section = {"gpu": environment.attachment(directory)}
            click.echo(yaml.safe_dump(section, sort_keys=False, width=1 << 16), nl=False)
        case "cdi":
            import json

            with EmulatedDriver(directory) as driver:
                uuids = [device.uuid for device in driver.devices()]
            click.echo(json.dumps(environment.cdi_spec(directory, uuids), indent=2))
        case _:
            for name, value in environment.exports(directory).items():
                click.echo(f"export {name}={shlex.quote(value)}")


@emulated.command()
@_directory
@output_option
def ps(directory: Path) -> None:
    """Show GPUs, CUDA processes and planned faults.

    The last line counts driver calls on processes whose cgroup was frozen. On hardware such calls hang, so the count
    must stay 0.
    """
    from dataclasses import asdict

    from agent.cli.console.output import show_json, show_table, show_text
    from agent.cli.console.units import size
    from agent.emulated.control import EmulatedDriver

    with EmulatedDriver(directory) as driver:
        devices, processes = driver.devices(), driver.processes()
        faults, frozen_calls = driver.faults(), driver.frozen_calls()
    if cli_options().json:
        tables: dict[str, Sequence[Any]] = {"devices": devices, "processes": processes, "faults": faults}
        rows = {name: [asdict(one) for one in table] for name, table in tables.items()}
        show_json({**rows, "frozen_calls": frozen_calls})
        return
    show_table(
        ("GPU", "MODEL", "UUID", "USED", "TOTAL", "UNUSUAL"),
        (
            (str(one.index), one.name, one.uuid, size(one.used_bytes), size(one.total_bytes), _unusual(one))
            for one in devices
        ),
        right=("GPU", "USED", "TOTAL"),
    )
    show_text("\n")
    show_table(
        ("PID", "STATE", "VRAM", "IMAGE", "OPERATION"),
        (
            (
                str(one.pid),
                one.state,
                size(sum(one.vram_bytes.values())),
                size(one.image_bytes),
                ", ".join([*([one.operation] if one.operation else []), *(f"{op} hangs" for op in one.hung)]) or "-",
            )
            for one in processes
        ),
        right=("PID", "VRAM", "IMAGE"),
    )
    if faults:
        show_text("\n")
        show_faults(faults)
    show_text(f"\nCalls on frozen processes: {frozen_calls}\n")


def _unusual(device: DeviceView) -> str:
    """Settings that idle mode does not support, and simulated errors."""
    unusual = {
        "no persistence mode": not device.persistence,
        "MIG": device.mig,
        device.compute_mode: device.compute_mode != "DEFAULT",
        f"NVML error {device.nvml_error}": bool(device.nvml_error),
        "silent": device.silent,
    }
    return ", ".join(word for word, applies in unusual.items() if applies) or "-"


@emulated.command("flip-byte")
@_directory
@click.option("--pid", type=click.IntRange(min=1), help="CUDA process; default: the first with GPU memory.")
@click.option("--offset", type=click.IntRange(min=0), default=0, show_default=True, help="Offset in its GPU memory.")
def flip_byte(directory: Path, pid: int | None, offset: int) -> None:
    """Invert one byte of a process's GPU memory.

    Tests that corruption is detected. Prints the pid. If the process is frozen, the change is visible after its wake.
    """
    from agent.emulated.control import EmulatedDriver

    with EmulatedDriver(directory) as driver:
        click.echo(driver.flip_byte(pid=pid, offset=offset))
