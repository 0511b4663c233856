"""`hibernode emulated up|env|ps|flip-byte`: an NVIDIA driver for machines without a GPU."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from agent.cli.options import asked, output_option

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
    """


@emulated.command()
@_directory
@click.option("--gpus", default=2, show_default=True, help="How many.")
@click.option("--profile", default="580", show_default=True, help="Driver version: 570 or 580.")
@click.option("--gib", default=16.0, show_default=True, help="Memory of each; paid for only as it is allocated.")
@click.option("--model", default="T4", show_default=True, help="Named `Emulated MODEL`.")
@click.option("--bandwidth", default="0", show_default=True, help="Of a restore, like 8GB/s; 0 = as fast as memory.")
@click.option("--fixed-us", default=0, show_default=True, help="What each operation takes besides, microseconds.")
@click.option("--persistence/--no-persistence", default=True, show_default=True, help="Persistence mode.")
def up(
    directory: Path, gpus: int, profile: str, gib: float, model: str, bandwidth: str, fixed_us: int, persistence: bool
) -> None:
    """Run the driver in the foreground until SIGINT or SIGTERM."""
    import uvloop

    from agent.emulated.options import GIB, Options, parse_bandwidth
    from agent.emulated.server import run

    options = Options(
        directory=directory,
        gpus=gpus,
        profile=profile,
        memory_bytes=int(gib * GIB),
        model=model,
        persistence=persistence,
        bandwidth_bytes_s=parse_bandwidth(bandwidth),
        fixed_us=fixed_us,
    )
    uvloop.run(run(options))


@emulated.command()
@_directory
def env(directory: Path) -> None:
    """Print the exports under which any program sees the driver, for eval "$(...)"."""
    from agent.emulated.env import exports

    for name, value in exports(directory).items():
        click.echo(f"export {name}={shlex.quote(value)}")


@emulated.command()
@_directory
@output_option
def ps(directory: Path) -> None:
    """Show the driver's own truth: its GPUs, and the CUDA processes with the state of their memory."""
    from dataclasses import asdict

    from agent.cli.output import show_json, show_table, show_text
    from agent.cli.units import size
    from agent.emulated.control import EmulatedDriver

    with EmulatedDriver(directory) as driver:
        devices, processes = driver.devices(), driver.processes()
    if asked().json:
        show_json({"devices": [asdict(one) for one in devices], "processes": [asdict(one) for one in processes]})
        return
    show_table(
        ("GPU", "MODEL", "UUID", "USED", "TOTAL"),
        ((str(one.index), one.name, one.uuid, size(one.used_bytes), size(one.total_bytes)) for one in devices),
        right=("GPU", "USED", "TOTAL"),
    )
    show_text("\n")
    show_table(
        ("PID", "STATE", "VRAM", "IMAGE", "OPERATION"),
        (
            (str(one.pid), one.state, size(sum(one.vram_bytes.values())), size(one.image_bytes), one.operation or "-")
            for one in processes
        ),
        right=("PID", "VRAM", "IMAGE"),
    )


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
