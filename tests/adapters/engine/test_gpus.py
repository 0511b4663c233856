"""GPU attachment: the choice for each engine, and reading the host's CDI specs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent.adapters.engine.facts import EngineFacts
from agent.adapters.engine.gpus import Attachment, attach_gpus, cdi_device_names
from agent.core.errors import PreconditionError
from agent.emulated.env import cdi_spec
from agent.settings import GpuSettings, MountSettings
from tests.adapters.engine.starts import GPU_A, GPU_B, docker, podman

SPEC = frozenset({GPU_A, GPU_B, "all"})
NONE: frozenset[str] = frozenset()
OLD_DOCKER = docker("20.10.24+dfsg1")
CDI_DOCKER = docker("28.3.0", CDISpecDirs=["/etc/cdi", "/var/run/cdi"])
DOCKER_WITHOUT = docker("25.0.3", CDISpecDirs=[])
OLD_PODMAN, NEW_PODMAN = podman("4.3.1"), podman("5.4.0")
BY_REQUEST = Attachment("cdi", device_requests=({"Driver": "cdi", "DeviceIDs": [f"nvidia.com/gpu={GPU_A}"]},))
BY_LIBPOD = Attachment("cdi-libpod", devices=(f"nvidia.com/gpu={GPU_A}",))
BY_RUNTIME = Attachment(
    "nvidia-runtime",
    device_requests=({"Driver": "nvidia", "DeviceIDs": [GPU_A], "Capabilities": [["gpu"]]},),
    visible_devices=GPU_A,
)


@pytest.mark.parametrize(
    ("setting", "engine", "spec", "expected"),
    [
        ("auto", CDI_DOCKER, SPEC, BY_REQUEST),
        ("auto", CDI_DOCKER, NONE, BY_RUNTIME),
        ("auto", CDI_DOCKER, frozenset({"0", "all"}), BY_RUNTIME),
        ("auto", DOCKER_WITHOUT, SPEC, BY_RUNTIME),
        ("auto", OLD_DOCKER, SPEC, BY_RUNTIME),
        ("auto", OLD_PODMAN, SPEC, BY_LIBPOD),
        ("auto", NEW_PODMAN, SPEC, BY_REQUEST),
        ("cdi", CDI_DOCKER, SPEC, BY_REQUEST),
        ("cdi", OLD_PODMAN, SPEC, BY_LIBPOD),
        ("cdi", docker("master-dev", CDISpecDirs=["/etc/cdi"]), SPEC, BY_REQUEST),
        ("nvidia-runtime", CDI_DOCKER, SPEC, BY_RUNTIME),
    ],
)
def test_choice_of_method(setting: str, engine: EngineFacts, spec: frozenset[str], expected: Attachment) -> None:
    settings = GpuSettings(attach=setting)  # type: ignore[arg-type]
    assert attach_gpus(settings, engine, spec, [GPU_A]) == expected


@pytest.mark.parametrize(
    ("setting", "engine", "spec", "advice"),
    [
        ("cdi", OLD_DOCKER, SPEC, "upgrade to Docker 25 or newer, or set gpu.attach: nvidia-runtime"),
        ("cdi", DOCKER_WITHOUT, SPEC, '{"features": {"cdi": true}} into /etc/docker/daemon.json'),
        ("cdi", CDI_DOCKER, NONE, "nvidia-ctk cdi generate --device-name-strategy=uuid"),
        ("cdi", CDI_DOCKER, frozenset({GPU_B}), f"do not name {GPU_A}; create them again: nvidia-ctk cdi generate"),
        ("auto", OLD_PODMAN, NONE, "nvidia-ctk cdi generate"),
        ("nvidia-runtime", NEW_PODMAN, SPEC, "set gpu.attach: cdi"),
    ],
)
def test_unavailable_method_names_the_fix(setting: str, engine: EngineFacts, spec: frozenset[str], advice: str) -> None:
    with pytest.raises(PreconditionError) as caught:
        attach_gpus(GpuSettings(attach=setting), engine, spec, [GPU_A])  # type: ignore[arg-type]
    assert caught.value.reason == "GPU_ATTACH_UNAVAILABLE"
    assert advice in caught.value.message


def test_nvidia_runtime_is_never_requested_from_podman() -> None:
    """It accepts such a request but starts the container without a GPU."""
    for engine in (OLD_PODMAN, NEW_PODMAN):
        assert attach_gpus(GpuSettings(), engine, SPEC, [GPU_A]).method in ("cdi", "cdi-libpod")


def test_movable_instance_gets_all_gpus() -> None:
    found = attach_gpus(GpuSettings(), CDI_DOCKER, SPEC, [GPU_A], all_gpus=True)
    assert found.device_requests[0]["DeviceIDs"] == ["nvidia.com/gpu=all"]
    found = attach_gpus(GpuSettings(), OLD_DOCKER, SPEC, [GPU_A], all_gpus=True)
    assert (found.device_requests[0]["DeviceIDs"], found.visible_devices) == (["all"], "all")


def test_no_gpus_without_a_gpu_function() -> None:
    mounts = MountSettings(binds=("/gpus/lib:/gpus/lib:ro",))
    for settings in (GpuSettings(), GpuSettings(attach="cdi"), GpuSettings(attach="mounts", mounts=mounts)):
        assert attach_gpus(settings, OLD_DOCKER, NONE, []) == Attachment()
    assert Attachment().visible_devices == "void"


def test_configured_mounts() -> None:
    settings = GpuSettings(attach="mounts", mounts=MountSettings(binds=("/gpus/lib:/gpus/lib:ro",)))
    found = attach_gpus(settings, OLD_PODMAN, NONE, [GPU_A])
    assert (found.method, found.binds, found.visible_devices) == ("mounts", ("/gpus/lib:/gpus/lib:ro",), "void")


def test_json_and_yaml_specs_are_read_and_bad_ones_skipped(tmp_path: Path) -> None:
    first, second = tmp_path / "etc", tmp_path / "run"
    first.mkdir()
    second.mkdir()
    (first / "nvidia.yaml").write_text(f'cdiVersion: 0.5.0\nkind: nvidia.com/gpu\ndevices: [{{name: "{GPU_A}"}}]\n')
    (second / "emulated.json").write_text(json.dumps(cdi_spec(tmp_path, [GPU_B])))
    (first / "other.json").write_text(json.dumps({"kind": "example.com/fpga", "devices": [{"name": "f0"}]}))
    (first / "torn.json").write_text('{"kind": "nvidia.com/gpu", "devi')
    (first / "list.yml").write_text("- 1\n")
    (first / "deep.json").write_text("[" * 100_000)
    (first / "odd.json").write_text('{"kind": "nvidia.com/gpu", "devices": {"name": "x"}}')
    (first / "gone.json").symlink_to(tmp_path / "nowhere")
    (first / "notes.txt").write_text("kind: nvidia.com/gpu")
    assert cdi_device_names((first, second, tmp_path / "missing")) == {GPU_A, GPU_B, "all"}
