"""Facts from `info` as recorded on a host with both engines, and the lines that doctor prints about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agent.adapters.engine.api import EngineApi
from agent.adapters.engine.facts import read_facts
from agent.adapters.engine.survey import sees_all_cgroups, survey_engine
from agent.core.engine_capabilities import EngineSurvey, engine_lines
from agent.settings import EngineRuntimeSettings, GpuSettings, RuntimeSettings
from tests.adapters.engine.starts import GPU_A, docker, podman

DOCKER_INFO: dict[str, Any] = {
    "Driver": "overlay2",
    "DriverStatus": [["Backing Filesystem", "extfs"], ["Supports d_type", "true"]],
    "DockerRootDir": "/var/lib/docker",
    "LiveRestoreEnabled": False,
    "NCPU": 2,
    "Runtimes": {"runc": {"path": "runc"}, "nvidia": {"path": "nvidia-container-runtime"}},
    "Plugins": {"Volume": ["local"], "Network": ["bridge", "host", "null"]},
    "IPv4Forwarding": True,
}


def test_docker_on_ext4() -> None:
    facts = read_facts("docker", "20.10.24+dfsg1", DOCKER_INFO, "/run/docker.sock")
    assert (facts.title, facts.version, facts.cpus) == ("Docker 20.10.24+dfsg1", (20, 10), 2)
    assert (facts.disk_limits, facts.live_restore, facts.cdi_dirs) == (False, False, ())
    assert facts.runtimes == {"runc", "nvidia"}
    assert facts.networks == {"bridge", "host", "null"}


@pytest.mark.parametrize(
    ("kind", "driver", "status", "can"),
    [
        ("docker", "overlay2", [["Backing Filesystem", "xfs"]], True),
        ("podman", "overlay", [["Backing Filesystem", "xfs"]], True),
        ("docker", "overlay2", [["Backing Filesystem", "extfs"]], False),
        ("docker", "btrfs", None, True),
        ("podman", "btrfs", None, False),
        ("docker", "overlay2", "nonsense", False),
        ("docker", "", [["one"], 7], False),
    ],
)
def test_storages_that_limit_disks(kind: str, driver: str, status: object, can: bool) -> None:
    facts = read_facts(kind, "25.0.0", {"Driver": driver, "DriverStatus": status})  # type: ignore[arg-type]
    assert facts.disk_limits is can


def test_custom_versions_count_as_new() -> None:
    assert docker("v25.1.2-rc1").version == (25, 1)
    assert docker("library-import").since((99, 0))
    assert not docker("24.0.9").since((25, 0))
    assert podman("5.10.0").since((5, 4))


def test_malformed_info_yields_no_facts() -> None:
    odd: dict[str, Any] = {"NCPU": "2", "Runtimes": [], "Plugins": None, "CDISpecDirs": {}, "DriverStatus": {"a": 1}}
    facts = read_facts("docker", "", odd)
    assert (facts.cpus, facts.runtimes, facts.networks, facts.cdi_dirs) == (0, frozenset(), frozenset(), ())
    assert facts.forwarding


# ---- doctor's lines --------------------------------------------------------------------------------------------


async def test_missing_engine_is_reported_without_an_error(tmp_path: Path) -> None:
    runtime = RuntimeSettings(engine=EngineRuntimeSettings(socket="off"))
    lines = engine_lines(await survey_engine(None, runtime, GpuSettings(), [GPU_A]))
    assert [(line.name, line.level) for line in lines] == [("engine", "OK")]

    missing = str(tmp_path / "engine.sock")
    api = EngineApi(missing)
    try:
        sight = await survey_engine(
            api, RuntimeSettings(engine=EngineRuntimeSettings(socket=missing)), GpuSettings(), [GPU_A]
        )
    finally:
        await api.close()
    (line,) = engine_lines(sight)
    assert (line.name, line.level) == ("engine", "WARN")
    assert missing in line.reason
    assert line.fix.startswith("start docker or podman, or set runtime.engine.socket")


def test_complete_host_has_no_warnings() -> None:
    info = {**DOCKER_INFO, "LiveRestoreEnabled": True, "DriverStatus": [["Backing Filesystem", "xfs"]]}
    facts = read_facts("docker", "28.3.0", info, "/run/docker.sock")
    lines = engine_lines(EngineSurvey(facts, gpus="cdi"))
    assert [line.name for line in lines] == [
        "engine",
        "engine.live_restore",
        "engine.disk_limit",
        "engine.gpus",
        "engine.cgroup",
        "engine.network",
    ]
    assert {(line.level, line.fix) for line in lines} == {("OK", "")}


@pytest.mark.parametrize(
    ("name", "sight", "fix"),
    [
        ("engine.live_restore", EngineSurvey(docker(**DOCKER_INFO)), '{"live-restore": true}'),
        ("engine.disk_limit", EngineSurvey(docker(**DOCKER_INFO)), "pquota"),
        ("engine.disk_limit", EngineSurvey(podman(**DOCKER_INFO), disk_limit="require"), "disk_limit: off"),
        (
            "engine.gpus",
            EngineSurvey(docker(), gpu_problem="no spec; nvidia-ctk cdi generate"),
            "nvidia-ctk cdi generate",
        ),
        ("engine.gpus", EngineSurvey(docker(), gpus="nvidia-runtime", nvidia_hook=False), "nvidia-container-toolkit"),
        ("engine.cgroup", EngineSurvey(docker(), cgroups=False), "--cgroupns=host"),
        ("engine.network", EngineSurvey(podman(Plugins={"Network": ["macvlan"]})), "apt-get install netavark"),
        ("engine.network", EngineSurvey(docker(IPv4Forwarding=False)), "net.ipv4.ip_forward=1"),
    ],
)
def test_each_gap_is_a_warning_with_its_fix(name: str, sight: EngineSurvey, fix: str) -> None:
    line = {line.name: line for line in engine_lines(sight)}[name]
    assert line.level == "WARN"
    assert fix in line.fix


def test_podman_needs_no_live_restore() -> None:
    assert "engine.live_restore" not in {line.name for line in engine_lines(EngineSurvey(podman()))}


def test_registered_nvidia_runtime_needs_no_hook() -> None:
    sight = EngineSurvey(docker(**DOCKER_INFO), gpus="nvidia-runtime", nvidia_hook=False)
    assert {line.name: line.level for line in engine_lines(sight)}["engine.gpus"] == "OK"


def test_cgroups_are_visible_on_the_host_but_not_in_a_namespace(tmp_path: Path) -> None:
    assert sees_all_cgroups() is (Path("/proc/self/ns/cgroup").stat().st_ino == 0xEFFFFFFB)
    (tmp_path / "self/ns").mkdir(parents=True)
    (tmp_path / "self/ns/cgroup").touch()
    (tmp_path / "self/mountinfo").write_text("30 1 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    assert not sees_all_cgroups(tmp_path)
    assert not sees_all_cgroups(tmp_path / "nowhere")
