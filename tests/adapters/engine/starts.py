"""Builds starts and engine facts for the tests of container plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from agent.adapters.engine.container_config import PlanOptions
from agent.adapters.engine.facts import EngineFacts, read_facts
from agent.core.types import ContainerOptions, FunctionSpec, GpuNeed, InstanceSpec
from agent.ports import StartSpec

GPU_A = "GPU-aaaaaaaa-0000-4000-8000-000000000001"
GPU_B = "GPU-bbbbbbbb-0000-4000-8000-000000000002"
STATE = "5b0d6f9e-6c7f-4d0e-9a52-0d9a3a5d7c11"
CAPABILITIES = ("CHOWN", "SETUID")


def start_spec(
    *,
    gpus: tuple[str, ...] = (),
    ours: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    container: ContainerOptions | None = None,
    all_gpus: bool = False,
    **function: Any,
) -> StartSpec:
    """An instance ocr-1 of `registry.example/ocr:3`."""
    spec = FunctionSpec(
        name="ocr",
        image="registry.example/ocr:3",
        environment=tuple((environment or {}).items()),
        gpu=GpuNeed(count=len(gpus)),
        container=container or ContainerOptions(),
        **function,
    )
    return StartSpec(InstanceSpec("ocr-1", "r1", spec), dict(ours or {}), gpus, all_gpus=all_gpus)


def plan_options(**changes: Any) -> PlanOptions:
    """Options of a node."""
    options = PlanOptions(
        image="sha256:0123",
        network="hibernode-5b0d6f9e6c7f",
        state_uuid=STATE,
        pids_limit=4096,
        capabilities=CAPABILITIES,
        log_limit_bytes=10_000_000,
    )
    return replace(options, **changes)


def docker(version: str = "20.10.24+dfsg1", **info: Any) -> EngineFacts:
    """Facts of a Docker Engine."""
    return read_facts("docker", version, info, "/run/docker.sock")


def podman(version: str = "4.3.1", **info: Any) -> EngineFacts:
    """Facts of Podman."""
    return read_facts("podman", version, info, "/run/podman/podman.sock")
