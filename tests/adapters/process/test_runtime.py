"""Tests what the process runtime promises beyond the contract: a clean workload, a bounded log, others untouched."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import socket
import stat as stat_module
import subprocess
import sys
import uuid
import warnings
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop
from structlog.testing import capture_logs

from agent.adapters.kernel import cgroup, memory_cgroup, process_table
from agent.adapters.process.launch import LaunchPlan, make_plan, resolve_user
from agent.adapters.process.runtime import ProcessRuntime, ProcessRuntimeOptions
from agent.adapters.runtime.exits import ExitWatch
from agent.core.errors import ConfigError, ConflictError, InstanceError, InvalidArgumentError
from agent.core.types import MIB, FunctionSpec, Handle, InstanceSpec, ProcessId
from agent.ports import StartSpec
from tests.contract.runtime_worlds import ProcessWorld, until_said
from tests.fakes.clock import FakeClock

SECRET = "correct horse battery staple"


def spec(uid: str, script: str, *, ours: dict[str, str] | None = None, gpus: tuple[str, ...] = ()) -> StartSpec:
    function = FunctionSpec(
        name="resize",
        entrypoint=("sh",),
        command=("-c", script),
        environment=(("API_KEY", SECRET), ("PORT", "1"), ("LD_LIBRARY_PATH", "/opt/model/lib")),
    )
    return StartSpec(InstanceSpec(uid, f"resize/1/{uid}", function), ours or {}, gpus)


@pytest.fixture
async def world() -> AsyncIterator[ProcessWorld]:
    made = ProcessWorld(fenced=True)
    yield made
    await made.close()


async def run(world: ProcessWorld, request: StartSpec) -> tuple[Handle, str]:
    """Start it, wait for its end, return its output."""
    handle = await world.runtime.start(request)
    exit_ = await asyncio.wait_for(world.runtime.wait(handle), 20)
    output = (await world.runtime.read_log(handle, MIB)).decode()
    assert exit_.code == 0, output
    return handle, output


async def test_environment_holds_only_the_functions_and_our_variables(
    world: ProcessWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENT_TOKEN", "must not leak")
    request = spec(
        "resize-a", "env", ours={"FC_REGION": "local", "LD_LIBRARY_PATH": "/emulated"}, gpus=("GPU-1", "GPU-2")
    )
    handle, output = await run(world, request)
    found = dict(line.split("=", 1) for line in output.splitlines())
    found.pop("PWD", None)  # sh sets it
    found.pop("SHLVL", None)
    found.pop("_", None)
    scratch, own = str(world.folder / "state/instances/resize-a/scratch"), pwd.getpwuid(os.geteuid()).pw_name
    assert found == {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": scratch,
        "USER": own,
        "LOGNAME": own,
        "LANG": "C.UTF-8",
        "API_KEY": SECRET,
        "FC_REGION": "local",
        "LD_LIBRARY_PATH": "/emulated:/opt/model/lib",
        "CUDA_VISIBLE_DEVICES": "GPU-1,GPU-2",
        "NVIDIA_VISIBLE_DEVICES": "GPU-1,GPU-2",
        "FC_CUSTOM_LISTEN_PORT": str(handle.port),
        "PORT": str(handle.port),
        "HIBERNODE_INSTANCE": f"{world.state_uuid}/resize-a",
    }


def test_arguments_get_the_port_and_no_other_variable() -> None:
    words = ("serve", "--port=$FC_CUSTOM_LISTEN_PORT", "${FC_CUSTOM_LISTEN_PORT}", "$PORT", "$FC_CUSTOM_LISTEN_PORTS")
    request = spec("resize-a", "env")
    function = replace(request.instance.function, entrypoint=words[:2], command=words[2:])
    request = replace(request, instance=replace(request.instance, function=function))
    plan = make_plan(request, port=4711, folder=Path("/"), user=None, state_uuid="u")
    assert plan.argv == ("serve", "--port=4711", "4711", "$PORT", "$FC_CUSTOM_LISTEN_PORTS")


async def test_the_ports_that_an_instance_listens_on_are_its_own(world: ProcessWorld) -> None:
    script = "import socket; s = socket.create_server(('', 0)); print(s.getsockname()[1], flush=True); s.accept()"
    request = spec("resize-a", f'{sys.executable} -c "{script}" & wait')
    with socket.create_server(("127.0.0.1", 0)):  # the agent's own, which is not the instance's
        handle = await world.runtime.start(request)
        await until_said(world.runtime, handle, b"\n")
        port = (await world.runtime.read_log(handle, MIB)).decode().strip()
        assert await world.runtime.listening(handle) == [f"0.0.0.0:{port}"]
    await world.runtime.destroy(handle)
    assert await world.runtime.listening(handle) == []


def test_function_without_gpus_sees_none() -> None:
    plan = make_plan(spec("resize-a", "env"), port=1, folder=Path("/"), user=None, state_uuid="u")
    assert (plan.environment["CUDA_VISIBLE_DEVICES"], plan.environment["NVIDIA_VISIBLE_DEVICES"]) == ("", "void")


def test_process_gets_the_numbers_of_its_gpus() -> None:
    """It sees every GPU of the host, also where it cannot be moved."""
    request = replace(spec("resize-a", "env", gpus=("GPU-1", "GPU-2")), all_gpus=True, gpu_numbers=(3, 0))
    plan = make_plan(request, port=1, folder=Path("/"), user=None, state_uuid="u")
    assert plan.environment["CUDA_VISIBLE_DEVICES"] == "3,0"
    assert plan.environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert plan.environment["NVIDIA_VISIBLE_DEVICES"] == "all"


@pytest.mark.parametrize(("gpus", "expected"), [((), ""), (("GPU-1",), "3")])
def test_function_cannot_grant_itself_gpus(gpus: tuple[str, ...], expected: str) -> None:
    taken = {"CUDA_VISIBLE_DEVICES": "0,1", "CUDA_DEVICE_ORDER": "FASTEST_FIRST", "NVIDIA_VISIBLE_DEVICES": "all"}
    request = spec("resize-a", "env", gpus=gpus)
    function = replace(request.instance.function, environment=(*taken.items(), ("PORT", "80")))
    request = replace(request, instance=replace(request.instance, function=function), gpu_numbers=(3,))
    with capture_logs() as lines:
        plan = make_plan(request, port=1, folder=Path("/"), user=None, state_uuid="u")
    assert plan.environment["CUDA_VISIBLE_DEVICES"] == expected
    assert plan.environment["PORT"] == "1"
    assert plan.environment["NVIDIA_VISIBLE_DEVICES"] == "all", "no part of the driver reads it"
    order = ["CUDA_DEVICE_ORDER"] if gpus else []
    assert [line["names"] for line in lines] == [",".join([*order, "CUDA_VISIBLE_DEVICES", "PORT"])]


def test_attachment_may_set_the_visible_gpus() -> None:
    request = spec("resize-a", "env", ours={"NVIDIA_VISIBLE_DEVICES": "void"}, gpus=("GPU-1",))
    plan = make_plan(request, port=1, folder=Path("/"), user=None, state_uuid="u")
    assert plan.environment["NVIDIA_VISIBLE_DEVICES"] == "void"


@pytest.mark.root
async def test_workload_runs_as_the_configured_user_without_privileges() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can start a process as another user")
    world = ProcessWorld(fenced=True, user="nobody")
    try:
        script = "id -u; id -G; grep -E 'NoNewPrivs|Cap' /proc/self/status | cut -f2; touch mine"
        script += "; echo again >>/dev/stdout"
        handle, output = await run(world, spec("resize-a", script))
        user = resolve_user("nobody")
        assert user
        groups = " ".join(map(str, user.groups))
        no_capabilities = ["0000000000000000"] * 5  # inheritable, permitted, effective, bounding, ambient
        assert output.splitlines() == [str(user.uid), groups, *no_capabilities, "1", "again"]
        assert (world.folder / "state/instances/resize-a/scratch/mine").stat().st_uid == user.uid
        log = os.stat(handle.log_path)
        assert (log.st_uid, log.st_gid) == (0, user.gid), "an owner could lease it and hold the agent up"
    finally:
        await world.close()


def test_unknown_user_is_a_config_error() -> None:
    with pytest.raises(ConfigError) as raised:
        resolve_user("nobody-of-that-name")
    assert raised.value.reason == "RUNTIME_USER_UNKNOWN"


@pytest.mark.parametrize("euid", [0, 1000])
def test_functions_run_as_root_only_if_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, euid: int) -> None:
    def runtime(user: str) -> ProcessRuntime:
        return ProcessRuntime(ProcessRuntimeOptions(tmp_path, "1c7e", None, enabled=True, user=user), FakeClock())

    monkeypatch.setattr(os, "geteuid", lambda: euid)
    if euid == 0:
        runtime("root")
        with pytest.raises(ConfigError, match="owns nothing") as raised:
            runtime("")
        assert raised.value.reason == "RUNTIME_USER_MISSING"
    else:
        runtime("")


def test_only_root_can_use_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    with pytest.raises(ConfigError) as raised:
        resolve_user("nobody")
    assert raised.value.reason == "RUNTIME_USER_NEEDS_ROOT"
    assert resolve_user("") is None


async def test_secrets_are_in_no_file_and_no_repr(world: ProcessWorld) -> None:
    request = spec("resize-a", "sleep 86390")
    await world.runtime.start(request)
    for file in (world.folder / "state").rglob("*"):
        if file.is_file():
            assert SECRET.encode() not in file.read_bytes(), file
    record = world.folder / "state/instances/resize-a/handle.json"
    assert stat_module.S_IMODE(record.stat().st_mode) == 0o600
    plan = make_plan(request, port=1, folder=Path("/"), user=None, state_uuid="u")
    assert SECRET not in repr(plan)
    assert SECRET.encode() in plan.encode()


@pytest.mark.parametrize("uid", ["", "../escape", ".hidden", "a/b", "x" * 129, "new\nline"])
async def test_uid_that_is_no_file_name_is_refused(world: ProcessWorld, uid: str) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        await world.runtime.start(spec(uid, "true"))
    assert raised.value.reason == "BAD_INSTANCE_UID"


@pytest.mark.parametrize(("argv", "environment"), [(("a\0b",), {}), (("a",), {"N": "x\0y"}), (("a",), {"N=M": "x"})])
def test_values_that_no_program_can_be_given_are_refused(argv: tuple[str, ...], environment: dict[str, str]) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        LaunchPlan(argv, environment, Path("/"), None).encode()
    assert raised.value.reason == "BAD_COMMAND"


async def test_start_of_a_non_executable_names_it(world: ProcessWorld) -> None:
    function = FunctionSpec(name="resize", entrypoint=("/etc/passwd",))
    with pytest.raises(InstanceError, match="cannot execute '/etc/passwd': Permission denied"):
        await world.runtime.start(StartSpec(InstanceSpec("resize-a", "r", function), {}, ()))
    assert world.traces("resize-a") == []


async def test_big_environment_arrives_completely(world: ProcessWorld) -> None:
    ours = {f"TABLE_{number}": "x" * 100_000 for number in range(10)}
    _, output = await run(world, spec("resize-a", "env | wc -c", ours=ours))
    assert int(output) > 1_000_000


async def test_full_disk_fails_the_start_and_leaves_nothing(
    world: ProcessWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device", "handle.partial")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InstanceError, match="No space left on device"):
        await world.runtime.start(spec("resize-a", "sleep 86390"))
    assert world.traces("resize-a") == []


async def test_cancelled_start_leaves_nothing(world: ProcessWorld) -> None:
    starting = asyncio.create_task(world.runtime.start(spec("resize-a", "sleep 86390")))
    assert await cgroup.poll_until(lambda: world.pids_marked("resize-a") != [], 10.0)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    assert starting.cancelled()
    assert world.traces("resize-a") == []


async def test_no_zombie_stays(world: ProcessWorld) -> None:
    handle, _ = await run(world, spec("resize-a", "true"))
    assert process_table.read_stat(handle.process.pid) is None


async def test_handle_of_another_boot_is_gone_and_can_be_destroyed(world: ProcessWorld) -> None:
    handle = await world.runtime.start(spec("resize-a", "sleep 86390"))
    before = Handle(
        handle.uid,
        ProcessId("00000000-0000-4000-8000-000000000000", handle.process.pid, handle.process.start_time),
        handle.host,
        handle.port,
    )
    assert not await world.runtime.alive(before)
    await world.runtime.terminate(before)
    await world.runtime.kill(before)
    assert (await world.runtime.wait(before)).message.startswith("exit status unknown")
    assert await world.runtime.alive(handle), "the process that has its pid today is not touched"


@pytest.mark.root
async def test_oom_kill_is_recognised(world: ProcessWorld) -> None:
    top = memory_cgroup.find(os.getpid())
    if os.geteuid() != 0 or top is None or top.oom_kills() is None:
        pytest.skip("needs root and a memory cgroup that counts OOM kills")
    folder = top.path / f"hibernode-test-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    limit = folder / ("memory.max" if top.version == 2 else "memory.limit_in_bytes")
    if not limit.exists():
        folder.rmdir()
        pytest.skip("the memory controller is not delegated to here")
    limit.write_text(str(48 * MIB))
    hungry = "import sys; sys.stdin.readline(); data = b'x' * (256 << 20)"
    process = subprocess.Popen([sys.executable, "-c", hungry], stdin=subprocess.PIPE)  # noqa: ASYNC220
    (folder / "cgroup.procs").write_text(str(process.pid))
    boot = process_table.boot_id()
    identity = process_table.identify(process.pid, boot)
    assert identity
    watch = ExitWatch(boot)
    ended = watch.watch(Handle("resize-a", identity, "127.0.0.1", 1))
    assert process.stdin
    process.stdin.write(b"\n")
    process.stdin.close()
    exit_ = await asyncio.wait_for(ended, 20)
    process.returncode = -9  # reaped by the watch
    folder.rmdir()
    assert (exit_.signal, exit_.oom_killed) == (9, True)
    assert "out of memory" in exit_.message


def test_uvloop_start_prints_no_warnings() -> None:
    """The fork handlers of gRPC and uvloop print warnings when Python forks; this start does not fork."""

    async def story() -> int:
        world = ProcessWorld(fenced=True)
        try:
            handle = await world.runtime.start(spec("resize-a", "exit 7"))
            return (await asyncio.wait_for(world.runtime.wait(handle), 20)).code
        finally:
            await world.close()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            assert runner.run(story()) == 7


async def test_bundle_of_another_state_directory_is_not_touched(world: ProcessWorld) -> None:
    handle = await world.runtime.start(spec("resize-a", "sleep 86390"))
    other_uuid = str(uuid.uuid4())
    slice_ = cgroup.open_slice(other_uuid)
    copied = ProcessRuntime(ProcessRuntimeOptions(world.folder / "state", other_uuid, slice_), FakeClock())
    assert list(await copied.list_handles()) == []
    with pytest.raises(ConflictError) as raised:
        await copied.start(spec("resize-a", "true"))
    assert raised.value.reason == "FOREIGN_BUNDLE"
    assert await world.runtime.alive(handle)
    copied.close()


@pytest.mark.parametrize("torn", [b"", b'{"version":1,"state', b"[]", b'{"version":1,"state_uuid":"u","handle":{}}'])
async def test_torn_record_is_an_orphan(world: ProcessWorld, torn: bytes) -> None:
    bundle = world.folder / "state/instances/resize-a"
    bundle.mkdir(parents=True)
    (bundle / "handle.json").write_bytes(torn)
    assert list(await world.runtime.list_handles()) == []
    assert world.traces("resize-a") == []


async def test_record_names_its_state_directory(world: ProcessWorld) -> None:
    handle = await world.runtime.start(spec("resize-a", "sleep 86390"))
    record = json.loads((world.folder / "state/instances/resize-a/handle.json").read_bytes())
    assert (record["version"], record["state_uuid"]) == (1, world.state_uuid)
    assert record["handle"]["process"]["pid"] == handle.process.pid
    assert record["handle"]["cgroup"] == handle.cgroup
