"""A container's limits and isolation from its neighbours, checked in the kernel."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.adapters.kernel import cgroup
from agent.core.types import MIB, ContainerOptions, Handle
from agent.settings import DEFAULT_CAPABILITIES
from tests.contract.runtime_worlds import until_said
from tests.engines.engines import Engine
from tests.engines.world import MEMORY_BYTES, EngineWorld

CAPABILITY_BITS = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
)  # fmt: skip
"""linux/capability.h, in order."""

GET = r"printf 'GET / HTTP/1.0\r\n\r\n' | nc -w 2"
SERVE = "httpd -p 9000 -h /www; echo hello from it; exec sleep 86399"


@pytest.fixture
async def world(engine: Engine) -> AsyncIterator[EngineWorld]:
    made = EngineWorld(engine)
    yield made
    await made.close()


def limit(handle: Handle, controller: str, name_v1: str, name_v2: str) -> str:
    """A limit's file in the container's cgroup, in the hierarchy that has the controller."""
    membership = cgroup.parse_membership("\n".join(proc(handle, "cgroup")))
    for mount in cgroup.parse_mounts(Path("/proc/self/mountinfo").read_text()):
        if mount.version == 1 and controller in mount.controllers:
            place, name = mount.locate(membership[controller]), name_v1
            break
    else:
        place, name = Path(handle.cgroup), name_v2
    assert place is not None
    return (place / name).read_text().strip()


def status_of(handle: Handle) -> dict[str, str]:
    return {key: value.strip() for key, value in (line.split(":", 1) for line in proc(handle, "status"))}


def may_raise_limits() -> bool:
    lines = Path("/proc/self/status").read_text().splitlines()
    (held,) = (int(line.split()[1], 16) for line in lines if line.startswith("CapEff"))
    return bool(held >> CAPABILITY_BITS.index("SYS_RESOURCE") & 1)


async def answer_of(world: EngineWorld, handle: Handle, command: str) -> str:
    """A command's output in the container, with `status N` at the end."""
    mark = os.urandom(4).hex()
    world.tell(handle, f"echo {mark}; {{ {command}; }} 2>&1; echo {mark} status $?.")
    await until_said(world.runtime, handle, f"{mark} status".encode())
    _before, text, status = (await world.runtime.read_log(handle, 65536)).decode().split(mark)
    return text.lstrip("\n") + status.strip(" .\n")


def proc(handle: Handle, name: str) -> list[str]:
    """The lines of a file in /proc/PID."""
    return Path(f"/proc/{handle.process.pid}/{name}").read_text().splitlines()


# ---- limits --------------------------------------------------------------------------------------------------------


async def test_limits_are_set_in_the_kernel(world: EngineWorld) -> None:
    handle = await world.runtime.start(world.spec("resize-a", options=ContainerOptions(pids_limit=64)))
    assert limit(handle, "memory", "memory.limit_in_bytes", "memory.max") == str(MEMORY_BYTES)
    assert limit(handle, "pids", "pids.max", "pids.max") == "64"
    period = limit(handle, "cpu", "cpu.cfs_period_us", "cpu.max").split()[-1]
    quota = limit(handle, "cpu", "cpu.cfs_quota_us", "cpu.max").split()[0]
    assert int(quota) / int(period) == pytest.approx(0.35, rel=0.01)


async def test_fork_bomb_is_bounded_and_ends(world: EngineWorld) -> None:
    handle = await world.runtime.start(world.spec("resize-a", options=ContainerOptions(pids_limit=32)))
    await world.settled(handle)
    world.tell(handle, "while :; do sleep 86399 & done")
    await until_said(world.runtime, handle, b"fork")
    assert len(await world.runtime.pids(handle)) <= 32
    await world.runtime.kill(handle)
    assert list(await world.runtime.pids(handle)) == []


async def test_container_settings_are_applied(world: EngineWorld) -> None:
    # Given one limit, Podman raises another, which needs a right that a test host may lack.
    open_files = 777 if may_raise_limits() or world.engine.kind == "docker" else 0
    options = ContainerOptions(
        shm_bytes=96 * MIB,
        open_files=open_files,
        user="nobody",
        read_only_root=True,
        extra_hosts=(("model-store", "192.0.2.7"),),
    )
    handle = await world.runtime.start(world.spec("resize-a", options=options))
    await world.settled(handle)
    inside = Path(f"/proc/{handle.process.pid}/root")
    shm = os.statvfs(inside / "dev/shm")
    assert shm.f_blocks * shm.f_frsize == 96 * MIB
    (line,) = (line for line in proc(handle, "limits") if line.startswith("Max open files"))
    assert not open_files or line.split()[3:5] == ["777", "777"]
    assert status_of(handle)["Uid"].split() == ["65534"] * 4
    assert "192.0.2.7" in (inside / "etc/hosts").read_text()
    assert "Read-only" in await answer_of(world, handle, "touch /www/x")
    assert await answer_of(world, handle, "touch /tmp/x") == "status 0"


# ---- rights --------------------------------------------------------------------------------------------------------


async def test_few_capabilities_and_no_new_ones(world: EngineWorld) -> None:
    handle = await world.runtime.start(world.spec("resize-a"))
    status = status_of(handle)
    assert status["NoNewPrivs"] == "1"
    for kind in ("CapPrm", "CapEff", "CapBnd"):
        bits = int(status[kind], 16)
        held = {name for number, name in enumerate(CAPABILITY_BITS) if bits >> number & 1}
        assert held == set(DEFAULT_CAPABILITIES), kind
        assert bits >> len(CAPABILITY_BITS) == 0


async def test_namespaces_are_private(world: EngineWorld) -> None:
    handle = await world.runtime.start(world.spec("resize-a"))
    for kind in ("net", "pid", "ipc", "mnt", "uts"):
        assert os.readlink(f"/proc/{handle.process.pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"), kind


async def test_engine_neither_probes_nor_restarts_the_container(world: EngineWorld) -> None:
    await world.runtime.start(world.spec("resize-a"))
    found = world.engine.container("resize-a")
    assert (found["Config"].get("Healthcheck") or {}).get("Test", ["NONE"]) == ["NONE"]
    assert found["HostConfig"]["RestartPolicy"]["Name"] in ("", "no")
    assert "Health" not in found["State"] or found["State"]["Health"]["Status"] in ("", "none")


# ---- network and sockets -------------------------------------------------------------------------------------------


async def reaches(handle: Handle) -> bool:
    """Whether the host reaches it, like the agent does."""
    try:
        async with asyncio.timeout(5):
            reader, writer = await asyncio.open_connection(handle.host, handle.port)
            writer.write(b"GET / HTTP/1.0\r\n\r\n")
            answer = await reader.read()
            writer.close()
    except (OSError, TimeoutError):
        return False
    return answer.endswith(b"hello from busybox\n")


async def test_host_reaches_containers_but_they_not_each_other(world: EngineWorld) -> None:
    neighbour = await world.runtime.start(world.spec("resize-b", script=SERVE))
    await world.settled(neighbour)
    curious = await world.runtime.start(world.spec("resize-a"))
    await world.settled(curious)
    assert await reaches(neighbour)
    itself = await answer_of(world, curious, f"httpd -p 9000 -h /www; {GET} 127.0.0.1 9000")
    assert itself.endswith("hello from busybox\nstatus 0"), "it can ask, as such"
    assert await reaches(curious)
    answer = await answer_of(world, curious, f"{GET} {neighbour.host} 9000")
    assert "hello from busybox" not in answer
    assert answer.endswith("status 1")


async def test_new_container_is_isolated_from_the_start(world: EngineWorld) -> None:
    neighbour = await world.runtime.start(world.spec("resize-b", script=SERVE))
    await world.settled(neighbour)
    for number in range(3):  # a single one may be too slow to try
        script = f"{GET} {neighbour.host} 9000; echo status $?; exec sleep 86399"
        hasty = await world.runtime.start(world.spec(f"resize-a{number}", script=script))
        await until_said(world.runtime, hasty, b"status")
        assert b"hello from busybox" not in await world.runtime.read_log(hasty, 4096)


async def test_no_port_is_published(world: EngineWorld) -> None:
    await world.runtime.start(world.spec("resize-a", script=SERVE))
    found = world.engine.container("resize-a")
    assert not any((found["NetworkSettings"].get("Ports") or {}).values())
    assert not any((found["HostConfig"].get("PortBindings") or {}).values())


async def test_sockets_of_agent_and_engine_are_unreachable(world: EngineWorld) -> None:
    with socket.create_server(("127.0.0.1", 0)) as agent_port:
        handle = await world.runtime.start(world.spec("resize-a"))
        await world.settled(handle)
        assert [line for line in proc(handle, "mountinfo") if ".sock" in line] == []
        places = (world.engine.socket, str(world.folder), "/run/docker.sock", "/var/run/docker.sock", "/run/podman")
        for place in places:
            assert not (Path(f"/proc/{handle.process.pid}/root") / place.lstrip("/")).exists(), place
        gateway = (await answer_of(world, handle, "ip route")).split()[2]
        port = agent_port.getsockname()[1]
        answer = await answer_of(world, handle, f"{GET} {gateway} {port}")
        assert answer.endswith("status 1"), "what listens on the host's loopback is not there for containers"
