"""`python -m agent.emulated up|env`: the driver without the rest of Hibernode's commands."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click
import uvloop

from agent.core.errors import HibernodeError
from agent.emulated.env import exports
from agent.emulated.options import GIB, Options, parse_bandwidth
from agent.emulated.server import run


@click.group()
def main() -> None:
    """An emulated NVIDIA driver: GPUs, libcuda, libnvidia-ml and cuda-checkpoint for machines without a GPU."""


_directory = click.option(
    "--dir", "directory", type=click.Path(path_type=Path), required=True, help="Holds sockets and libraries."
)


@main.command()
@_directory
@click.option("--gpus", default=2, show_default=True)
@click.option("--profile", default="580", show_default=True, help="Driver version: 570 or 580.")
@click.option("--gib", default=16.0, show_default=True, help="Memory of each GPU; paid for only as it is allocated.")
@click.option("--model", default="T4", show_default=True)
@click.option("--bandwidth", default="0", show_default=True, help="Of a restore, like 8GB/s; 0 = as fast as memory.")
@click.option("--fixed-us", default=0, show_default=True, help="What each operation takes besides, microseconds.")
@click.option("--persistence/--no-persistence", default=True, show_default=True)
def up(
    directory: Path, gpus: int, profile: str, gib: float, model: str, bandwidth: str, fixed_us: int, persistence: bool
) -> None:
    """Run the driver in the foreground until SIGINT or SIGTERM."""
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


@main.command()
@_directory
def env(directory: Path) -> None:
    """Print the exports under which any program sees the driver: eval "$(... env --dir DIR)"."""
    for name, value in exports(directory).items():
        click.echo(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    try:
        main()
    except HibernodeError as error:
        click.echo(str(error), err=True)
        sys.exit(4)
