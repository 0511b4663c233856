"""CUDA processes in their own pid namespace, as in a container: the host uses host pids."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.adapters.emulated.harness import MIB, CudaProgram, RunningDriver, freeze, wake

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="a pid namespace needs root, unshare"),
]

IN_NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


def test_host_freezes_a_namespaced_process_by_its_host_pid(driver: RunningDriver, tool: CudaProgram) -> None:
    app = driver.program(*IN_NAMESPACE)
    app.must("init")
    app.must("context")
    address = app.must("alloc", size=MIB)["address"]
    digest = app.must("write", address=address, size=MIB, seed=2)["digest"]
    assert app.own_pid == 1
    host_pid = next(p.pid for p in driver.control.processes() if p.vram_bytes)
    assert host_pid not in (1, app.pid)

    tid = tool.must("restore_thread", pid=host_pid)["tid"]
    assert os.path.isdir(f"/proc/{host_pid}/task/{tid}")  # the tid on the host, not in the namespace
    freeze(tool, host_pid)
    wake(tool, host_pid)
    assert app.must("read", address=address, size=MIB)["digest"] == digest


def test_namespaced_caller_uses_pids_of_its_namespace(driver: RunningDriver) -> None:
    inside = driver.program(*IN_NAMESPACE)
    inside.must("init")
    assert inside.must("state", pid=1) == {"rc": 0, "state": 0}
    assert 1 < inside.must("restore_thread", pid=1)["tid"] < 100
    outside = driver.application()
    assert inside.ask("state", pid=outside.pid)["rc"] != 0
