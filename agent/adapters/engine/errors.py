"""Translates a container engine's create and start errors into InstanceErrors with a reason and advice.

Engines give no error codes, so the patterns match the texts of Docker 20.10 to 29, Podman 4.3 to 5, runc and crun.
An unknown text becomes START_FAILED and quotes the engine.
"""

from __future__ import annotations

import re

from agent.adapters.engine.api import EngineError
from agent.adapters.engine.network import addresses_exhausted, exhausted
from agent.core.errors import InstanceError
from agent.core.types import FunctionSpec

_NO_COMMAND = re.compile(
    r'executable file .*not found|exec: ".*(no such file or directory|permission denied|is a directory)'
    r"|attempted to invoke a command that (was not found|cannot be invoked)|no command specified"
    r"|no command or entrypoint provided",
    re.IGNORECASE,
)
_WRONG_FORMAT = re.compile(r"exec format error", re.IGNORECASE)
_NO_IMAGE = re.compile(r"no such image|image not known|unable to find image|image .* does not exist", re.IGNORECASE)
_NO_USER = re.compile(r"unable to find (user|group)|no matching entries in (passwd|group) file", re.IGNORECASE)
_NO_SOURCE = re.compile(r"bind source path does not exist|statfs .*no such file|mkdir .*read-only", re.IGNORECASE)
_NO_NETWORK = re.compile(r"network .*not found|unable to find network", re.IGNORECASE)
_DISK_LIMIT = re.compile(r"storage-opt|storage driver .*quota|pquota|project quota", re.IGNORECASE)
_MEMORY = re.compile(r"minimum memory limit|memory limit (too low|.*lower than)", re.IGNORECASE)
_GPU = re.compile(r"could not select device driver|unresolvable CDI devices|nvidia-container", re.IGNORECASE)


def network_missing(error: EngineError) -> bool:
    """The agent's network was removed from outside."""
    return _NO_NETWORK.search(error.text) is not None


def disk_limit_refused(error: EngineError) -> bool:
    """The engine's storage can't bound a container's writable layer."""
    return _DISK_LIMIT.search(error.text) is not None


def start_refused(function: FunctionSpec, error: EngineError) -> InstanceError:
    """The error that a user sees when `create` or `start` failed with `error`."""
    text = error.text
    if addresses_exhausted(text):
        return exhausted(text)
    for pattern, reason, advice in _KNOWN:
        if pattern.search(text):
            return InstanceError(reason, f"{advice.format(image=function.image)} ({text})", image=function.image)
    return InstanceError("START_FAILED", f"the container could not be started: {text}", image=function.image)


_KNOWN = (
    (
        _NO_COMMAND,
        "COMMAND_NOT_FOUND",
        "the image {image} has no such program, or it can't be executed; check its entrypoint and command",
    ),
    (
        _WRONG_FORMAT,
        "COMMAND_NOT_FOUND",
        "the program in {image} is not for this machine; build the image for linux/amd64, with a #! line in scripts",
    ),
    (_NO_IMAGE, "IMAGE_NOT_FOUND", "the image {image} was removed from this node meanwhile; create the instance again"),
    (_NO_USER, "START_FAILED", "the image {image} has no such user; use a number or leave `user` out"),
    (_NO_SOURCE, "VOLUME_REFUSED", "a volume's folder does not exist on the host; create it, or drop the volume"),
    (
        _DISK_LIMIT,
        "START_FAILED",
        "the engine's storage can't bound a container's disk; set runtime.engine.disk_limit: off, or use xfs+pquota",
    ),
    (_MEMORY, "START_FAILED", "the memory size is too small for a container; raise memorySize"),
    (
        _GPU,
        "GPU_ATTACH_UNAVAILABLE",
        "the engine can't give the container its GPU; see `hibernode doctor` about the NVIDIA Container Toolkit",
    ),
)
