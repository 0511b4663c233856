"""Functions with images for whole-system tests."""

from __future__ import annotations

from dataclasses import replace

from agent.core.types import MIB, MILLISECOND_NS, SECOND_NS, FunctionSpec, GpuNeed, IdlePolicy
from tests.e2e.stack import echo
from tests.engines import images


def echo_image(name: str, **environment: str) -> FunctionSpec:
    """The example echo with 4 MiB of device memory, in its own container; freezes 100 ms after a request."""
    return replace(
        echo(name, None, **environment), image=images.ECHO, entrypoint=(), vcpu_millis=1000, memory_bytes=256 * MIB
    )


def busybox(name: str) -> FunctionSpec:
    """A web server without CUDA."""
    return FunctionSpec(
        name,
        image=images.BUSYBOX,
        vcpu_millis=500,
        memory_bytes=128 * MIB,
        timeout_ns=20 * SECOND_NS,
        gpu=GpuNeed(1, memory_bytes=16 * MIB),
        idle=IdlePolicy(freeze_after_ns=100 * MILLISECOND_NS),
    )


def awake(spec: FunctionSpec) -> FunctionSpec:
    """The same function, never frozen."""
    return replace(spec, idle=IdlePolicy(freeze_after_ns=3600 * SECOND_NS))


def bad(name: str, how: str, **changes: object) -> FunctionSpec:
    """A misbehaving function; `how` is the argument of images.BAD_SCRIPT."""
    return replace(busybox(name), image=images.BAD, command=(how,), **changes)  # type: ignore[arg-type]
