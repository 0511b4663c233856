"""An agent with peculiar state of every kind: it starts one workload and prints what both of them have, as JSON.

    python -m tests.adapters.process.burdened_agent FOLDER WORLD PYTHON

WORLD is "user" (an agent with root's rights, functions as nobody) or "own" (functions as the agent's own user; with
root's rights at first it becomes nobody, with capabilities that pass through an exec). PYTHON runs the workload. What
this host does not let it set stays as it is.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from agent.adapters.kernel import cgroup
from agent.adapters.kernel.clock import SystemClock
from agent.adapters.process.runtime import ProcessRuntime, ProcessRuntimeOptions
from agent.core.types import MIB, FunctionSpec, InstanceSpec
from agent.ports import StartSpec

STATE_UUID = "5b0d6f9e-6c7f-4d0e-9a52-0d9a3a5d7c12"
UID = "resize-a"
OPEN_FILES_AT_START = 512
SECRETS = {
    "AGENT_TOKEN": "1",
    "GRPC_VERBOSITY": "NONE",
    "HIBERNODE_HOME": "/x",
    "INVOCATION_ID": "1",
    "JOURNAL_STREAM": "8:1",
    "LC_ALL": "C",
    "LD_PRELOAD": "",
    "LISTEN_FDS": "1",
    "MEMORY_PRESSURE_WATCH": "/x",
    "NOTIFY_SOCKET": "/run/x",
    "PYTHONPATH": "/x",
    "WATCHDOG_USEC": "1",
    "XDG_RUNTIME_DIR": "/run/x",
}
DAC_READ_SEARCH, NET_BIND_SERVICE = 2, 10
"""Capabilities of the agent that is not root. The first lets it start an interpreter from a folder of root."""

# First by a shell, because Python ignores signals of its own; without a child, since it blocks signals to make one.
SHELL = 'while read -r line; do echo "$line"; done </proc/$$/status; echo; exec "$0" -I -S -c "$1"'
PROBE = """
import ctypes, json, os, resource
libc = ctypes.CDLL(None)
numbers = {"x86_64": (250, 252), "aarch64": (219, 31)}[os.uname().machine]
stat = open("/proc/self/stat").read().rpartition(")")[2].split()
names = [name for name in dir(resource) if name.startswith("RLIMIT_")]
descriptors = {}
for number in os.listdir("/proc/self/fd"):
    try:
        descriptors[number] = os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        pass  # the listing's own
print(json.dumps({
    "affinity": sorted(os.sched_getaffinity(0)),
    "cgroup": open("/proc/self/cgroup").read(),
    "descriptors": descriptors,
    "dumpable": libc.prctl(3, 0, 0, 0, 0),
    "environment": dict(os.environ),
    "folder": os.getcwd(),
    "groups": sorted(os.getgroups()),
    "ids": [*os.getresuid(), *os.getresgid()],
    "io_class": libc.syscall(numbers[1], 1, 0) >> 13,
    "keyring": libc.syscall(numbers[0], 0, -3, 0),
    "limits": {name: resource.getrlimit(getattr(resource, name)) for name in names},
    "nice": os.getpriority(os.PRIO_PROCESS, 0),
    "oom_score_adj": int(open("/proc/self/oom_score_adj").read()),
    "parent_death_signal": (value := ctypes.c_int(), libc.prctl(2, ctypes.byref(value), 0, 0, 0))[0].value,
    "policy": os.sched_getscheduler(0),
    "securebits": libc.prctl(27, 0, 0, 0, 0),
    "session": [os.getsid(0) == os.getpid(), int(stat[4])],
    "timer_slack": libc.prctl(30, 0, 0, 0, 0),
    "umask": os.umask(0),
}))
"""


def burden(*, favoured: bool) -> None:
    """Set what an agent, its service manager or its shell may have set. `favoured`: with precedence over others."""

    def attempt(step: Callable[[], object]) -> None:
        with suppress(OSError):
            step()

    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES_AT_START * 2, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    resource.setrlimit(resource.RLIMIT_STACK, (4 * MIB, resource.getrlimit(resource.RLIMIT_STACK)[1]))
    for number in (signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGUSR1, signal.SIGRTMAX):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2})
    os.umask(0o077)
    os.environ.update(SECRETS)
    for descriptor in (os.open("/dev/null", os.O_RDONLY), *os.pipe()):
        os.set_inheritable(descriptor, True)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    ctypes.CDLL(None).prctl(29, 70_000, 0, 0, 0)  # PR_SET_TIMERSLACK
    adjust = Path("/proc/self/oom_score_adj").write_text
    attempt(lambda: adjust("100"))
    if not favoured:
        attempt(lambda: os.setpriority(os.PRIO_PROCESS, 0, 5))
        return
    ctypes.CDLL(None).prctl(28, 1 << 6, 0, 0, 0)  # PR_SET_SECUREBITS: NO_CAP_AMBIENT_RAISE
    attempt(lambda: adjust("-100"))
    attempt(lambda: os.setpriority(os.PRIO_PROCESS, 0, -5))
    ctypes.CDLL(None).syscall({"x86_64": 251, "aarch64": 30}[os.uname().machine], 1, 0, 1 << 13 | 4)
    attempt(lambda: os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1)))


def become_nobody_with_capabilities() -> None:
    """As a unit with User= and AmbientCapabilities= starts a service."""
    libc = ctypes.CDLL(None, use_errno=True)
    kept = 1 << DAC_READ_SEARCH | 1 << NET_BIND_SERVICE
    libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(kept, kept, kept, 0, 0, 0)
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())
    libc.prctl(8, 0, 0, 0, 0)
    for capability in (DAC_READ_SEARCH, NET_BIND_SERVICE):
        assert libc.prctl(47, 2, capability, 0, 0) == 0, os.strerror(ctypes.get_errno())  # PR_CAP_AMBIENT_RAISE


async def main() -> None:
    folder, world, python = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    is_root = os.geteuid() == 0
    slice_ = cgroup.open_slice(STATE_UUID) if world == "user" or not is_root else None
    burden(favoured=world == "user")
    if world == "own" and is_root:
        become_nobody_with_capabilities()
    options = ProcessRuntimeOptions(
        folder / "state",
        STATE_UUID,
        slice_,
        user="nobody" if world == "user" and is_root else "",
        open_files=OPEN_FILES_AT_START,
    )
    runtime = ProcessRuntime(options, SystemClock())
    function = FunctionSpec("resize", entrypoint=("sh", "-c", SHELL, python, PROBE), environment=(("MINE", "1"),))
    handle = await runtime.start(StartSpec(InstanceSpec(UID, "resize/1/1", function), {}, ()))
    ended = await runtime.wait(handle)
    workload = (await runtime.read_log(handle, MIB)).decode()
    await runtime.destroy(handle)
    runtime.close()
    own: dict[str, object] = {}
    exec(PROBE, {"print": lambda text: own.update(json.loads(text))})
    sys.stdout.write(json.dumps({"agent": own, "code": ended.code, "cgroups": bool(slice_), "workload": workload}))


if __name__ == "__main__":
    asyncio.run(main())
