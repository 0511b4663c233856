"""Tries operations inside the agent's sandbox (test_sandbox.py), with the machine's Python; prints JSON.

`python3 probe.py PID BRIDGE_PORT`: PID is a process of another user. Each value is "yes" or the error.
"""

import contextlib
import ctypes
import json
import os
import pwd
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
PTRACE_SEIZE, PTRACE_DETACH, PR_CAPBSET_DROP, CLONE_NEWUSER = 0x4206, 17, 24, 0x10000000
SYS_INIT_MODULE = {"x86_64": 175, "aarch64": 105}
CGROUPS = Path("/sys/fs/cgroup")


def call(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def in_a_child(work: Callable[[], None]) -> None:
    """Run in a child process, because it would change this one."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(OSError):
            work()
            code = 0
        os._exit(code)
    if os.waitpid(pid, 0)[1] != 0:
        raise PermissionError("refused in the child")


def ptrace(pid: int) -> None:
    """Attach without stopping the process, like a debugger: needs CAP_SYS_PTRACE."""
    call(LIBC.ptrace(PTRACE_SEIZE, pid, None, None))


def become_the_functions_account() -> None:
    account = pwd.getpwnam("hibernode-functions")

    def become() -> None:
        call(LIBC.prctl(PR_CAPBSET_DROP, 0, 0, 0, 0))
        os.setgroups([])
        os.setresgid(account.pw_gid, account.pw_gid, account.pw_gid)
        os.setresuid(account.pw_uid, account.pw_uid, account.pw_uid)

    in_a_child(become)


def own_cgroup() -> Path:
    path = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))[3:]
    top = CGROUPS / "unified" if (CGROUPS / "unified").is_dir() else CGROUPS
    return top / path.lstrip("/")


def freeze_a_child() -> None:
    """Freeze a child in a cgroup below our own, as with instances, and end it."""
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    folder = own_cgroup() / "probe"
    folder.mkdir()
    try:
        (folder / "cgroup.procs").write_text(str(pid))
        (folder / "cgroup.freeze").write_text("1")
        (folder / "cgroup.kill").write_text("1")
        os.waitpid(pid, 0)
    finally:
        (folder / "cgroup.freeze").write_text("0")
        folder.rmdir()


def signal_of(pid: int) -> None:
    descriptor = os.pidfd_open(pid)
    signal.pidfd_send_signal(descriptor, signal.SIGCONT)
    select.select([descriptor], [], [], 0)


def connect(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as engine:
        engine.connect(path)


def listen(port: int) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))


def write(path: str) -> None:
    file = Path(path)
    file.write_text("probe")
    file.unlink()


def own_a_file() -> None:
    account = pwd.getpwnam("hibernode-functions")
    file = Path("/var/lib/hibernode/agent/probe")
    file.write_text("x")
    file.chmod(0o600)
    os.chown(file, account.pw_uid, account.pw_gid)
    file.read_text()
    file.chmod(0o640)
    file.unlink()


def main() -> None:
    pid, port = int(sys.argv[1]), sys.argv[2]
    tries: dict[str, Callable[[], object]] = {
        "read another user's environment": lambda: Path(f"/proc/{pid}/environ").read_bytes(),
        "read another user's memory figures": lambda: Path(f"/proc/{pid}/smaps_rollup").read_text(),
        "signal another user's process": lambda: signal_of(pid),
        "attach to another user's process": lambda: ptrace(pid),
        "read trusted attributes of cgroups": lambda: os.getxattr(own_cgroup(), "trusted.delegate"),
        "freeze and kill by cgroup": freeze_a_child,
        "isolate a bridge port": lambda: Path(f"/sys/class/net/{port}/brport/isolated").write_text("1"),
        "reach Docker's socket": lambda: connect("/run/docker.sock"),
        "reach Podman's socket": lambda: connect("/run/podman/podman.sock"),
        "become the functions' account": become_the_functions_account,
        "give files to the functions' account": own_a_file,
        "map memory that is written and run": map_code,
        "listen below 1024": lambda: listen(1023),
        "write /run/lock": lambda: write("/run/lock/probe"),
        "write /tmp": lambda: write("/tmp/probe"),
        "write /usr": lambda: write("/usr/probe"),
        "write /etc": lambda: write("/etc/probe"),
        "write /root": lambda: write("/root/probe"),
        "write other services' state": lambda: write("/var/lib/probe"),
        "set the clock": lambda: time.clock_settime(time.CLOCK_REALTIME, time.time()),
        "mount": lambda: call(LIBC.mount(b"none", b"/tmp", b"tmpfs", 0, None)),
        "load a kernel module": lambda: call(LIBC.syscall(SYS_INIT_MODULE[os.uname().machine], 0, 0, 0)),
        "make a user namespace": lambda: in_a_child(lambda: call(LIBC.unshare(CLONE_NEWUSER))),
        "make a device node": lambda: os.mknod("/tmp/node", 0o20600, os.makedev(1, 3)),
        "make a set-uid file": make_set_uid,
        "open a raw socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).close(),
        "reboot": lambda: call(LIBC.reboot(0)),
    }
    answers = {}
    for name, attempt in tries.items():
        try:
            attempt()
            answers[name] = "yes"
        except OSError as error:
            answers[name] = str(error)
    print(json.dumps(answers))  # noqa: T201 - the program's output


def map_code() -> None:
    import mmap

    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()


def make_set_uid() -> None:
    file = Path("/tmp/set-uid")
    file.write_text("x")
    try:
        file.chmod(0o4755)
    finally:
        file.unlink()


if __name__ == "__main__":
    main()
