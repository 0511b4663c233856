"""The agent's half of the launcher handshake: spawn it, and, once it is on record, let it go."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

from agent.adapters.process.launch_plan import LaunchPlan
from agent.core.errors import InstanceError

LAUNCHER = Path(__file__).with_name("launcher.py")
ANSWER_LIMIT_BYTES = 4096


def spawn(uid: str, cgroup: str, log_fd: int) -> tuple[int, socket.socket]:
    """Start the launcher in a session of its own; returns its pid (unreaped child) and the control socket.

    Call it on the loop's thread. Popen without preexec_fn uses vfork: no fork handlers of gRPC run, no warnings.
    Raises OSError.
    """
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            ours.setblocking(False)
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(LAUNCHER), str(theirs.fileno()), cgroup, uid],
                stdin=subprocess.DEVNULL,
                stdout=log_fd,
                stderr=log_fd,
                pass_fds=(theirs.fileno(),),
                cwd="/",
                # Only what the interpreter itself may need to start; the workload gets a clean environment.
                env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
                start_new_session=True,
            )
    except BaseException:
        ours.close()
        raise
    # ExitWatch reaps it through its pidfd. Told that it has ended, Popen neither waits for it nor complains when the
    # agent leaves and the container stays.
    process.returncode = 0
    return process.pid, ours


async def release(control: socket.socket, plan: LaunchPlan) -> None:
    """Send the plan and wait until the workload's program runs. InstanceError START_FAILED says why it does not.

    The caller has recorded the launcher by now, holds a deadline over this and closes `control`.
    """
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_sendall(control, plan.encode())
        answer = b""
        while len(answer) < ANSWER_LIMIT_BYTES and (part := await loop.sock_recv(control, ANSWER_LIMIT_BYTES)):
            answer += part
    except ConnectionError:
        answer = b""
    if answer == b"X":
        return
    detail = answer.partition(b"E")[2].decode(errors="replace")
    if not detail:
        detail = "the launcher ended before the program started; its log may say why"
    raise InstanceError("START_FAILED", f"the instance could not be started: {detail}")
