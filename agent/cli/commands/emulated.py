"""`hibernode emulated up|env|ps|fault|flip-byte`: an NVIDIA driver for machines without a GPU."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent.cli.commands.emulated_fault import COMPUTE_MODES, AnyCase, fault, show_faults
from agent.cli.options import cli_options, output_option
from agent.emulated.profiles import PROFILES

if TYPE_CHECKING:
    from agent.emulated.control import DeviceView

_directory = click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    metavar="DIR",
    help="Holds its sockets and libraries.",
)


@click.group()
def emulated() -> None:
    """An emulated NVIDIA driver: libcuda, libnvidia-ml and cuda-checkpoint for machines without a GPU.

    \b
    Examples:
      hibernode emulated up --dir /tmp/gpus --gpus 2 --profile 580
      eval "$(hibernode emulated env --dir /tmp/gpus)"
      hibernode doctor
      hibernode emulated fault --dir /tmp/gpus add restore OUT_OF_MEMORY
    """


emulated.add_command(fault)


@emulated.command()
@_directory
@click.option("--gpus", default=2, show_default=True, help="How many.")
@click.option("--profile", default="580", show_default=True, help=f"Driver: {', '.join(PROFILES)}.")
@click.option("--gib", default=16.0, show_default=True, help="Memory of each; paid for only as it is allocated.")
@click.option("--model", default="T4", show_default=True, help="Named `Emulated MODEL`.")
@click.option("--bandwidth", default="0", show_default=True, help="Of a restore, like 8GB/s; 0 = as fast as memory.")
@click.option("--fixed-us", default=0, show_default=True, help="What each operation takes besides, microseconds.")
@click.option("--persistence/--no-persistence", default=True, show_default=True, help="Persistence mode.")
@click.option("--mig/--no-mig", default=False, show_default=True, help="Partitioned (A100, H100, ...).")
@click.option(
    "--compute-mode",
    type=AnyCase(COMPUTE_MODES),
    default="DEFAULT",
    show_default=True,
    metavar="MODE",
    help=f"Who may use it: {', '.join(COMPUTE_MODES)}.",
)
def up(
    directory: Path,
    gpus: int,
    profile: str,
    gib: float,
    model: str,
    bandwidth: str,
    fixed_us: int,
    persistence: bool,
    mig: bool,
    compute_mode: str,
) -> None:
    """Run the driver in the foreground until SIGINT or SIGTERM."""
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
    )
    uvloop.run(run(options))


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
    """Print the settings under which programs and containers see the driver.

    \b
    Formats:
      sh    exports for eval "$(...)", for any program of this host
      yaml  the gpu: section of agent.yaml: containers get the libraries and the socket mounted;
            the agent itself is started under the exports of sh
      cdi   a CDI specification of kind nvidia.com/gpu (JSON), for gpu.attach: cdi and for
            podman run --device nvidia.com/gpu=all; needs the driver to run, for its UUIDs

    \b
    Examples:
      eval "$(hibernode emulated env --dir /tmp/gpus)"
      hibernode emulated env --dir /tmp/gpus --format yaml >> agent.yaml
      hibernode emulated env --dir /tmp/gpus --format cdi | sudo tee /etc/cdi/emulated.json
    """
    from agent.emulated import env as environment

    match form:
        case "yaml":
            import yaml

            section = {"gpu": environment.attachment(directory)}
            click.echo(yaml.safe_dump(section, sort_keys=False, width=1 << 16), nl=False)
        case "cdi":
            import json

            from agent.emulated.control import EmulatedDriver

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
    """Show the driver's own truth: its GPUs, the CUDA processes with the state of their memory, planned faults.

    Calls on a frozen process are counted, for on hardware they hang: who freezes and wakes in order makes none.
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
    """What is not as on a GPU fit for idle mode."""
    found = {
        "no persistence mode": not device.persistence,
        "MIG": device.mig,
        device.compute_mode: device.compute_mode != "DEFAULT",
        f"NVML error {device.nvml_error}": bool(device.nvml_error),
        "silent": device.silent,
    }
    return ", ".join(word for word, so in found.items() if so) or "-"


@emulated.command("flip-byte")
@_directory
@click.option("--pid", type=click.IntRange(min=1), help="Of the CUDA process; default: the first with GPU memory.")
@click.option("--offset", type=click.IntRange(min=0), default=0, show_default=True, help="Within its GPU memory.")
def flip_byte(directory: Path, pid: int | None, offset: int) -> None:
    """Damage one byte of a process's GPU memory, to see that a damaged wake is noticed. Prints the pid.

    In a frozen process the damage shows once it has woken.
    """
    from agent.emulated.control import EmulatedDriver

    with EmulatedDriver(directory) as driver:
        click.echo(driver.flip_byte(pid=pid, offset=offset))
