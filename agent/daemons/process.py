"""Process setup of both daemons: command line, logging, uvloop, signals, systemd."""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import gc
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from agent import log
from agent.adapters.daemon.sd_notify import notify, watchdog_interval_s
from agent.config import load
from agent.core.errors import HibernodeError
from agent.exit_codes import exit_of
from agent.settings import AgentConfig, SchedulerConfig

_Config = TypeVar("_Config", AgentConfig, SchedulerConfig)

OPEN_FILES = 65536
"""LimitNOFILE of our units; a login shell's 1,024 is too few for `limits.connections`."""
OPEN_FILES_AT_START = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
"""The soft limit before `daemon_main` raises it: instances get this one."""
GC_THRESHOLD = 10_000
"""Allocations between two garbage collections. Python's 700 costs a tenth of a request, and requests leave no
cycles."""
OTHER_OPEN_FILES = 512
"""Descriptors for everything but client and upstream connections."""


def _name_process(name: str) -> None:
    """Name this process in `ps -e`, `top` and `pgrep`, which would show `python`; the kernel keeps 15 characters."""
    with suppress(OSError):
        Path("/proc/self/comm").write_text(name, encoding="ascii")


def daemon_main(name: str, kind: type[_Config], run: Callable[[_Config], Coroutine[Any, Any, None]]) -> None:
    """Load `--config FILE` and run `run` on uvloop. An error exits with the exit code of its kind."""
    parser = argparse.ArgumentParser(prog=f"hibernode {name}", description=f"The Hibernode {name} daemon.")
    parser.add_argument("--config", type=Path, default=Path(f"/etc/hibernode/{name}.yaml"), help="default: %(default)s")
    arguments = parser.parse_args()
    try:
        config = load(arguments.config, kind)
    except HibernodeError as error:
        sys.exit(_print_error(error))
    log.configure(config.log_level, config.log_format)
    _name_process(f"hibernode-{name}")
    _allow_open_files(config.limits.connections)
    faulthandler.enable()  # on the watchdog's SIGABRT the stacks of all threads go to the journal
    try:
        uvloop.run(run(config))
    except HibernodeError as error:
        code = _print_error(error)
        # Everything closable is closed. A thread that hangs in a database or driver must not delay the restart.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _allow_open_files(connections: int) -> None:
    """Raise the limit of open files to that of our units if allowed; warn if it is too low for `connections`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = max(soft, OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES))
    if soft == resource.RLIM_INFINITY:
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < 2 * connections + OTHER_OPEN_FILES:
        text = "too few for limits.connections and their upstream connections; raise ulimit -n or LimitNOFILE"
        log.get_logger().warning("process.open_files_short", allowed=allowed, connections=connections, message=text)


def _print_error(error: HibernodeError) -> int:
    print(f"hibernode: {error.reason}: {error.message}", file=sys.stderr)  # noqa: T201 - before and after logging
    return exit_of(error)


async def run_until_signal(services: Sequence[Awaitable[None]]) -> None:
    """Report READY, run `services` until SIGTERM or SIGINT, report STOPPING and cancel them.

    A service that ends by itself is a fault and ends the daemon."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    tasks = [asyncio.ensure_future(service) for service in (*services, feed_watchdog())]
    stopped = asyncio.ensure_future(stop.wait())
    # Objects of the start-up live forever; a full collection during a wake need not scan them.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
    notify("READY=1")
    try:
        done, _ = await asyncio.wait([stopped, *tasks], return_when=asyncio.FIRST_COMPLETED)
    finally:
        notify("STOPPING=1")
        for task in (stopped, *tasks):
            task.cancel()
        await asyncio.gather(stopped, *tasks, return_exceptions=True)
    for task in done - {stopped}:
        task.result()


async def stand_by(turn: Coroutine[Any, Any, None], status: str) -> bool:
    """Report READY with `status` (systemd must not wait for a turn that may never come) and wait for `turn`. Returns
    False if SIGTERM or SIGINT came first. Raises what `turn` raises."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    turn_task = asyncio.ensure_future(turn)
    tasks = [turn_task, asyncio.ensure_future(stop.wait()), asyncio.ensure_future(feed_watchdog())]
    notify(f"READY=1\nSTATUS={status}")
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
    notify("STATUS=")
    if stop.is_set():
        return False
    turn_task.result()
    return True


async def feed_watchdog() -> None:
    """Feed the watchdog from the main event loop, so systemd restarts a daemon whose loop is stuck.

    Other threads do not count: one that hangs in NVML or a disk write would hang in a restarted agent too, which
    then serves nothing. This agent keeps serving and reports the problem (cordons, STORE_FAILED)."""
    interval_s = watchdog_interval_s()
    if interval_s is None:
        await asyncio.Event().wait()
        return
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval_s)
