"""One set of ranges for deploy and create; what s.yaml lets through is inside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from agent.cli.fc3.function import function_of
from agent.cli.fc3.schema import Props
from agent.core.errors import InvalidArgumentError
from agent.core.function_rules import check_function, shm_bytes
from agent.core.types import (
    GIB,
    MIB,
    SECOND_NS,
    ContainerOptions,
    FunctionSpec,
    GpuNeed,
    HealthCheck,
    Hook,
    Hooks,
    IdlePolicy,
    RegistryLogin,
    Volume,
)

GOOD = FunctionSpec("ocr", entrypoint=("python", "app.py"), environment=(("MODEL", "large"),))
DAY_NS = 86_400 * SECOND_NS


def test_the_defaults_are_good() -> None:
    check_function(GOOD)
    check_function(replace(GOOD, image="registry.example/ocr@sha256:" + "0f" * 32, entrypoint=()))


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("name", {"name": "a/b"}),
        ("name", {"name": "x" * 65}),
        ("revision", {"revision": "1/2"}),
        ("image", {"image": ""}),
        ("image", {"image": "two words"}),
        ("image", {"image": "../containers/json"}),
        ("image", {"image": "ocr?all=1"}),
        ("image", {"image": "ocr#x"}),
        ("image", {"image": "registry.example/OCR:3"}),
        ("image", {"image": "ocr@sha256:0f"}),
        ("entrypoint", {"entrypoint": ()}),
        ("entrypoint", {"entrypoint": ("a\0b",)}),
        ("command", {"command": ("x" * 200_000,)}),
        ("handler", {"handler": "index.handler\r\nx-fc-account-id: 1"}),
        ("region", {"region": "x" * 65}),
        ("port", {"port": 0}),
        ("port", {"port": 65_536}),
        ("instance_concurrency", {"instance_concurrency": 201}),
        ("timeout_ns", {"timeout_ns": -1}),
        ("timeout_ns", {"timeout_ns": DAY_NS + 1}),
        ("queue_length", {"queue_length": 0}),
        ("queue_timeout_ns", {"queue_timeout_ns": 0}),
        ("wake_factor", {"wake_factor": float("nan")}),
        ("wake_factor", {"wake_factor": float("inf")}),
        ("vcpu_millis", {"vcpu_millis": 0}),
        ("memory_bytes", {"memory_bytes": -1}),
        ("disk_bytes", {"disk_bytes": -1}),
        ("gpu.count", {"gpu": GpuNeed(-1)}),
        ("gpu.memory_bytes", {"gpu": GpuNeed(1, memory_bytes=-1)}),
        ("gpu.model", {"gpu": GpuNeed(1, model="NVIDIA\nL20")}),
        ("idle_policy.freeze_after_ns", {"idle": IdlePolicy(freeze_after_ns=-1)}),
        ("idle_policy.min_awake_ns", {"idle": IdlePolicy(min_awake_ns=DAY_NS + 1)}),
        ("hooks.initializer.timeout_ns", {"hooks": Hooks(initializer=Hook(301 * SECOND_NS))}),
        ("hooks.pre_freeze.timeout_ns", {"hooks": Hooks(pre_freeze=Hook(91 * SECOND_NS))}),
        ("hooks.pre_stop.timeout_ns", {"hooks": Hooks(pre_stop=Hook(0))}),
        ("health_check.path", {"health_check": HealthCheck("health")}),
        ("health_check.path", {"health_check": HealthCheck("/health HTTP/1.1\r\n")}),
        ("health_check.period_ns", {"health_check": HealthCheck("/health", period_ns=0)}),
        ("health_check.failure_threshold", {"health_check": HealthCheck("/health", failure_threshold=0)}),
        ("environment.FC_REGION", {"environment": (("FC_REGION", "x"),)}),
        ("environment", {"environment": (("A=B", "x"),)}),
        ("environment", {"environment": (("A", "x" * 4096),)}),
    ],
)
def test_value_out_of_range_names_its_field(field: str, change: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_function(replace(GOOD, **change))
    assert (caught.value.reason, caught.value.metadata["field"]) == ("SPEC_INVALID", field)


def test_environment_values_are_in_no_message() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_function(replace(GOOD, environment=(("KEY", "hunter2" + "\0"),)))
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in str(caught.value.metadata)


@pytest.mark.parametrize(
    "image",
    [
        "ocr",
        "ocr:3",
        "team/ocr:3.1-gpu",
        "localhost/ocr",
        "127.0.0.1:5000/team/ocr:latest",
        "registry.example.com/a__b/c-d.e",
        "registry.example.com:443/ocr:3@sha256:" + "ab" * 32,
        "sha256:" + "ab" * 32,
    ],
)
def test_references_of_images(image: str) -> None:
    check_function(replace(GOOD, image=image))


IMAGE = replace(GOOD, image="registry.example/ocr:3", entrypoint=())
FULL = ContainerOptions(
    shm_bytes=GIB,
    pids_limit=4_194_304,
    open_files=1_048_576,
    user="app:1000",
    read_only_root=True,
    extra_hosts=(("db.example.com", "10.0.0.7"), ("six", "fd00::1")),
    volumes=(Volume("/srv/models", "/mnt/models"),) * 32,
    registry=RegistryLogin("ann", "hunter2"),
)


def test_full_container_options_are_accepted() -> None:
    check_function(replace(IMAGE, container=FULL))


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("container.shm_bytes", {"shm_bytes": -1}),
        ("container.pids_limit", {"pids_limit": -1}),
        ("container.open_files", {"open_files": 1_048_577}),
        ("container.user", {"user": "a b"}),
        ("container.user", {"user": "-1"}),
        ("container.user", {"user": "a:b:c"}),
        ("container.extra_hosts[0]", {"extra_hosts": (("db", "example.com"),)}),
        ("container.extra_hosts[0]", {"extra_hosts": (("db", "fe80::1%eth0"),)}),
        ("container.extra_hosts[0]", {"extra_hosts": (("db:x", "10.0.0.1"),)}),
        ("container.extra_hosts[1]", {"extra_hosts": (("db", "10.0.0.1"), ("a b", "10.0.0.1"))}),
        ("container.extra_hosts", {"extra_hosts": (("db", "10.0.0.1"),) * 65}),
        ("container.volumes", {"volumes": (Volume("/a", "/b"),) * 33}),
        ("container.volumes[0].host_path", {"volumes": (Volume("a", "/b"),)}),
        ("container.volumes[0].host_path", {"volumes": (Volume("/", "/b"),)}),
        ("container.volumes[0].host_path", {"volumes": (Volume("/srv/../etc", "/b"),)}),
        ("container.volumes[0].host_path", {"volumes": (Volume("/a\0b", "/b"),)}),
        ("container.volumes[1].container_path", {"volumes": (Volume("/a", "/b"), Volume("/a", "b"))}),
        ("container.volumes[0].container_path", {"volumes": (Volume("/a", "//"),)}),
        ("container.volumes[0].container_path", {"volumes": (Volume("/a", "/" + "x" * 4095),)}),
        ("container.registry", {"registry": RegistryLogin("ann", "")}),
        ("container.registry", {"registry": RegistryLogin("", "hunter2")}),
        ("container.registry", {"registry": RegistryLogin("ann", "hunter2" * 4096)}),
    ],
)
def test_wrong_container_option_names_its_field(field: str, change: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_function(replace(IMAGE, container=replace(FULL, **change)))
    assert (caught.value.reason, caught.value.metadata["field"]) == ("SPEC_INVALID", field)
    assert "hunter2" not in str(caught.value)


def test_image_host_allows_no_container_options() -> None:
    with pytest.raises(InvalidArgumentError, match="container: is not possible with image `host`"):
        check_function(replace(GOOD, container=ContainerOptions(read_only_root=True)))


def test_container_needs_the_engines_least_memory() -> None:
    check_function(replace(GOOD, memory_bytes=MIB))
    with pytest.raises(InvalidArgumentError, match="memory_bytes"):
        check_function(replace(IMAGE, memory_bytes=MIB))


@pytest.mark.parametrize(("text", "size"), [("", 0), (" 1073741824 ", GIB), ("0", 0)])
def test_shared_memory_by_function_computes_variable(text: str, size: int) -> None:
    function = replace(IMAGE, environment=(("FCGPU_RUNTIME_SHMSIZE", text),))
    check_function(function)
    assert shm_bytes(function) == size
    assert shm_bytes(replace(function, container=ContainerOptions(shm_bytes=5))) == 5


@pytest.mark.parametrize("text", ["1g", "-1", "1e9", "9" * 17, "\u0661"])
def test_shared_memory_that_is_no_size(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="FCGPU_RUNTIME_SHMSIZE"):
        check_function(replace(IMAGE, environment=(("FCGPU_RUNTIME_SHMSIZE", text),)))


_MOST: dict[str, Any] = {
    "functionName": "x" * 64,
    "runtime": "custom-container",
    "handler": "h" * 128,
    "region": "r" * 64,
    "timeout": 86_400,
    "cpu": 1024.0,
    "memorySize": 64 << 20,
    "diskSize": 64 << 20,
    "instanceConcurrency": 200,
    "gpuConfig": {"gpuType": "t" * 128, "gpuMemorySize": 64 << 20},
    "instanceLifecycleConfig": {
        "initializer": {"timeout": 300},
        "preFreeze": {"timeout": 90},
        "preStop": {"timeout": 90},
    },
    "customContainerConfig": {
        "image": "i" * 1024,
        "port": 65_535,
        "healthCheckConfig": {
            "httpGetUrl": "/" * 2048,
            "initialDelaySeconds": 120,
            "periodSeconds": 120,
            "timeoutSeconds": 3,
            "failureThreshold": 120,
            "successThreshold": 120,
        },
    },
    "hibernode": {"wakeFactor": 1_000_000, "queueLength": 100_000, "gpus": 64},
}
_LEAST: dict[str, Any] = {
    "functionName": "x",
    "runtime": "custom-container",
    "timeout": 1,
    "cpu": 0.05,
    "memorySize": 128,
    "instanceConcurrency": 1,
    "customContainerConfig": {"image": "host", "port": 1, "command": ["true"]},
    "hibernode": {"wakeFactor": 0, "queueLength": 1, "gpus": 0},
}


@pytest.mark.parametrize("props", [_MOST, _LEAST], ids=["most", "least"])
def test_s_yaml_ranges_are_within_these(props: dict[str, Any]) -> None:
    function, _ = function_of(msgspec.convert(props, Props))
    check_function(function)
