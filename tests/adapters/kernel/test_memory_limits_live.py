"""Tests raised memory limits on this kernel: a CUDA program whose own limit is too tight for its image.

Needs root and a memory controller in which a cgroup can be made (v1 or v2); skips elsewhere.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.adapters.kernel import memory_cgroup
from agent.adapters.kernel.host_memory import ProcHostMemory
from agent.adapters.kernel.memory_cgroup import V1_CAPS, V2_CAPS, MemoryCgroup
from agent.core.types import MIB, Handle
from agent.host.instance.memory_reservations import MemoryReservations
from agent.ports import Outcome
from tests.adapters.freezer.host import Host, freeze
from tests.fakes.emulated_driver import CudaTarget
from tests.host.rig import eventually

VRAM, BLOCK, LEFT = 64 * MIB, 4 * MIB, 32 * MIB


@dataclass
class TightCgroup:
    """A memory cgroup of this test, below the test process's."""

    cgroup: MemoryCgroup

    def take_in(self, target: CudaTarget) -> None:
        (self.cgroup.path / "cgroup.procs").write_text(str(target.pid))

    def leave(self, room_bytes: int) -> None:
        """Set the limits (swap included) to the current use plus this much."""
        usage = self.cgroup.usage_bytes()
        assert usage is not None
        limit = (usage + room_bytes) // 4096 * 4096
        for name, _ in V1_CAPS if self.cgroup.version == 1 else V2_CAPS[:1]:
            if (self.cgroup.path / name).exists():
                (self.cgroup.path / name).write_text(str(limit))

    def limits(self) -> list[int]:
        return [cap.limit_bytes for cap in self.cgroup.own_caps()]


@pytest.fixture
def tight() -> Iterator[TightCgroup]:
    mine = memory_cgroup.find(os.getpid())
    if mine is None or os.geteuid() != 0:
        pytest.skip("needs root and a memory controller")
    # v2 allows no children with controllers beside processes, except below the top.
    parent = mine.path if mine.version == 1 else mine.top
    path = parent / f"hibernode-test-{os.getpid()}"
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error.strerror}")
    try:
        if not (path / ("memory.max" if mine.version == 2 else "memory.limit_in_bytes")).exists():
            pytest.skip("the v2 memory controller is not enabled for children of the top cgroup")
        yield TightCgroup(MemoryCgroup(mine.version, path, mine.top))
    finally:
        for pid in (path / "cgroup.procs").read_text().split():
            (parent / "cgroup.procs").write_text(pid)
        path.rmdir()


def started(host: Host, tight: TightCgroup, uid: str) -> tuple[CudaTarget, Handle]:
    """A program with 64 MiB on its GPU, 32 MiB below its limit."""
    target, handle = host.instances.start(uid, None)
    tight.take_in(target)
    for seed in range(VRAM // BLOCK):
        target.fill(BLOCK, seed)
    tight.leave(LEFT)
    return target, handle


async def test_checkpoint_without_raised_limit_is_an_oom_kill(host: Host, tight: TightCgroup) -> None:
    """The pitfall itself: if this one fails, the others prove nothing."""
    _, handle = started(host, tight, "vllm-1")
    freezer = host.freezer()
    assert (await freezer.lock(handle)).outcome is Outcome.OK
    assert (await freezer.checkpoint(handle)).outcome is Outcome.BROKEN
    assert tight.cgroup.oom_kills() == 1
    freezer.forget(handle)


async def test_instance_with_raised_limit_freezes_and_gets_its_limit_back(
    host: Host, tight: TightCgroup, tmp_path: Path
) -> None:
    target, handle = started(host, tight, "vllm-2")
    freezer, was = host.freezer(), tight.limits()
    memory = ProcHostMemory(limits=tmp_path / "limits", images=tmp_path / "images")
    desk = MemoryReservations(memory, limit_bytes=0, reserve_bytes=0)
    await desk.reserve(handle, await freezer.vram_bytes(handle))
    assert min(tight.limits()) > max(was)
    desk.took("vllm-2", await freeze(freezer, handle))
    memory.lower_limit("vllm-2")
    assert min(tight.limits()) > max(was), "its image is in the way: nothing is lowered, nobody is killed"
    assert memory.resident_bytes([target.pid]) >= VRAM
    assert (await freezer.wake(handle, {})).outcome is Outcome.OK
    desk.restored("vllm-2")
    await eventually(lambda: not memory.limit_raised("vllm-2"))
    assert tight.limits() == was
    assert target.verify()
    assert tight.cgroup.oom_kills() == 0
    desk.forget("vllm-2")
    await eventually(lambda: not list((tmp_path / "images").iterdir()))
    desk.close()
    freezer.forget(handle)


DYING_AGENT = """
import json, os, signal, sys
from pathlib import Path
from agent.adapters.kernel import process_table
from agent.adapters.kernel.host_memory import ProcHostMemory
from agent.core.types import Handle

pid, cgroup, limits, own = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
handle = Handle("vllm-3", process_table.identify(pid, process_table.boot_id()), "127.0.0.1", 9000, cgroup=cgroup)
names = [name for name in sys.argv[5:] if (own / name).exists()]

def now():
    return [(own / name).read_text().strip() for name in names]

write_text = Path.write_text
found = []
for writes in range(len(names) + 1):
    if not (child := os.fork()):
        left = writes
        def dies(path, text, **options):
            global left
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return write_text(path, text, **options)
        Path.write_text = dies
        ProcHostMemory(limits=limits).raise_limit(handle, 64 << 20)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    died = now()
    after = ProcHostMemory(limits=limits)
    raised = after.limit_raised("vllm-3")
    after.recover(["vllm-3"], ["vllm-3"])
    kept = now()
    after.recover(["vllm-3"], [])
    found.append({"died": died, "raised": raised, "kept": kept, "after": now(), "left": os.listdir(limits)})
print(json.dumps(found))
"""


async def test_limit_is_restored_wherever_the_agent_died(host: Host, tight: TightCgroup, tmp_path: Path) -> None:
    target, handle = started(host, tight, "vllm-3")
    names = [name for name, _ in (V1_CAPS if tight.cgroup.version == 1 else V2_CAPS)]
    was = [(tight.cgroup.path / name).read_text().strip() for name in names if (tight.cgroup.path / name).exists()]
    arguments = [str(target.pid), handle.cgroup, str(tmp_path / "limits"), str(tight.cgroup.path), *names]
    command = [sys.executable, "-c", DYING_AGENT, *arguments]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stderr
    deaths = json.loads(done.stdout)
    for death in deaths:
        assert death["raised"], "it is written down before anything changes"
        assert death["kept"] == death["died"], "a frozen one keeps what it has"
        assert (death["after"], death["left"]) == (was, [])
    assert deaths[0]["died"] == was
    assert deaths[-1]["died"] != was
    assert target.verify()
