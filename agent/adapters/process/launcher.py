"""Becomes a workload: run as `python -I -S launcher.py CONTROL_FD CGROUP UID`.

It joins the cgroup, then waits for its plan. The agent sends the plan only after it has recorded the launcher's
identity, so an agent that dies at any point leaves either a recorded container or none. A program of its own, because
forking Python code in a process with threads (gRPC has them) can hang. It imports little (every cold start runs it),
nothing of the agent, and never returns.

Plan (`launch.py` writes it): records of one letter and a value, each ended by NUL; the last one is ".". Answer on
CONTROL_FD: "X" right before the exec; "E" and a text if something failed. The end of file means that the exec
succeeded, because exec closes the descriptor.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import warnings  # noqa: F401 - os.execvpe imports it, by then as a user who may not read the interpreter's files

PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
CAPABILITY_VERSION_3 = 0x20080522
KEYCTL_JOIN_SESSION_KEYRING = 1
IOPRIO_WHO_PROCESS = 1
IOPRIO_CLASS_SHIFT, IOPRIO_CLASS_RT = 13, 1
SYSCALLS = {  # keyctl, ioprio_set, ioprio_get
    "x86_64": (250, 251, 252),
    "aarch64": (219, 30, 31),
}
ORDINARY_POLICIES = (os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_IDLE)
EXIT_NO_PLAN = 126
EXIT_NOT_EXECUTED = 127


def main() -> None:
    control, cgroup = int(sys.argv[1]), sys.argv[2]
    os.set_inheritable(control, False)
    step = "join its cgroup"
    try:
        if cgroup:
            with open(os.path.join(cgroup, "cgroup.procs"), "w", encoding="ascii") as procs:
                procs.write("0")
        plan = read_plan(control)
        if plan is None:
            os._exit(EXIT_NO_PLAN)
        step = "enter its working directory"
        os.chdir(plan["D"][0])
        step = "take its user"
        reset_inherited()
        give_up_precedence()
        limit_open_files(plan)
        if "U" in plan:
            narrow_bounding_set()
        take_identity(plan)
        if os.geteuid() != 0:
            drop_capabilities()
        forbid_new_privileges()
        argv = plan["A"]
        step = f"execute {argv[0]!r}"
        os.write(control, b"X")
        environment = dict(entry.split("=", 1) for entry in plan.get("V", []))
        os.execvpe(argv[0], argv, environment)
    except OSError as error:
        os.write(control, f"Ecannot {step}: {error.strerror or error}".encode())
    os._exit(EXIT_NOT_EXECUTED)


def read_plan(control: int) -> dict[str, list[str]] | None:
    """The whole plan, or None if the agent went away before it was sent completely."""
    received = b""
    while not received.endswith(b"\0.\0"):
        part = os.read(control, 65536)
        if not part:
            return None
        received += part
    plan: dict[str, list[str]] = {}
    for record in received.split(b"\0")[:-2]:
        plan.setdefault(chr(record[0]), []).append(os.fsdecode(record[1:]))
    return plan


def reset_inherited() -> None:
    """Undo what the agent, its service manager or Python has set for the agent alone: signals, umask, the session
    keyring (a child could read it as its own), protection from the OOM killer."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if signal.getsignal(number) is not signal.SIG_DFL:  # an agent under nohup ignores SIGHUP, and so on
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.umask(0o022)
    if numbers := SYSCALLS.get(os.uname().machine):
        ctypes.CDLL(None).syscall(numbers[0], KEYCTL_JOIN_SESSION_KEYRING, None)  # ENOSYS: no keyrings
    try:
        with open("/proc/self/oom_score_adj", "r+", encoding="ascii") as score:
            if int(score.read()) < 0:  # the agent may be protected from the OOM killer; its instances are not
                score.write("0")
    except OSError:
        pass


def give_up_precedence() -> None:
    """Put an agent's precedence over the host's other programs aside; what is below the ordinary (nice 10) stays."""
    if os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK not in ORDINARY_POLICIES:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    if os.getpriority(os.PRIO_PROCESS, 0) < 0:
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    if numbers := SYSCALLS.get(os.uname().machine):
        libc = ctypes.CDLL(None)
        if libc.syscall(numbers[2], IOPRIO_WHO_PROCESS, 0) >> IOPRIO_CLASS_SHIFT == IOPRIO_CLASS_RT:
            libc.syscall(numbers[1], IOPRIO_WHO_PROCESS, 0, 0)


def limit_open_files(plan: dict[str, list[str]]) -> None:
    """Take back what the agent has raised its soft limit of open files to (programs size tables by it)."""
    if "L" in plan:
        _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(plan["L"][0]), hard))


def narrow_bounding_set() -> None:
    """Still as root: drop the bounding set, which a change of user keeps and no later program can widen."""
    libc = ctypes.CDLL(None, use_errno=True)
    capability = 0
    while libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:  # EINVAL after the last one
        capability += 1


def drop_capabilities() -> None:
    """Empty all sets of a user other than root. An agent that is not root has its capabilities as ambient ones, which
    pass through an exec; inheritable ones pass through a change of user too. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    if libc.capset(header, (ctypes.c_uint32 * 6)()) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def take_identity(plan: dict[str, list[str]]) -> None:
    """Set group list, gid and uid, in this order: the last one gives up the right to change the others."""
    if "U" not in plan:
        return
    uid, gid = int(plan["U"][0]), int(plan["G"][0])
    os.setgroups([int(group) for group in plan.get("S", [])])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def forbid_new_privileges() -> None:
    """Keep set-uid programs from giving the workload new privileges (prctl(2))."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    main()
