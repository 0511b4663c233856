"""Which keys of an s.yaml mean something with an image, and which with `image: host`.

A deploy names each key of the file that has no effect on its runtime; `IGNORED` in schema.py lists the fc3 keys that
have none on either. A test keeps this table complete.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import NamedTuple

from agent.core.function_rules import HOST_IMAGE
from agent.core.instance_variables import LISTEN_PORT

REFUSED = "is for images only, not for `image: host`"
_BILLED = "limits nothing with `image: host`: it is billed"
_NO_COMMAND = "is not run: only HTTP hooks with a handler are called"


class Meaning(NamedTuple):
    """What the key lacks with an image, and with `image: host`; "" = nothing. REFUSED keys fail the deploy."""

    image: str = ""
    host: str = ""

    def lacks(self, runs_on_host: bool) -> str:
        return self.host if runs_on_host else self.image


_BOTH = Meaning()
_IMAGE_ONLY = Meaning(host=REFUSED)

MEANING: dict[str, Meaning] = {
    **dict.fromkeys(
        (
            *("functionName", "runtime", "region", "handler", "timeout", "instanceConcurrency"),
            *("gpuConfig", "gpuConfig.gpuType", "gpuConfig.gpuMemorySize", "gpuMemorySize", "environmentVariables"),
            *("alwaysAllocateGPU", "customContainerConfig", "customContainerConfig.image"),
            *("customContainerConfig.entrypoint", "customContainerConfig.command"),
            "customContainerConfig.webServerMode",
            "customContainerConfig.healthCheckConfig",
            *(
                f"customContainerConfig.healthCheckConfig.{key}"
                for key in (
                    *("httpGetUrl", "initialDelaySeconds", "periodSeconds", "timeoutSeconds"),
                    *("failureThreshold", "successThreshold"),
                )
            ),
            "instanceLifecycleConfig",
            *(
                f"instanceLifecycleConfig.{hook}{key}"
                for hook in ("initializer", "preFreeze", "preStop")
                for key in ("", ".handler", ".timeout")
            ),
            *("provisionConfig", "provisionConfig.defaultTarget", "provisionConfig.target"),
            *("provisionConfig.alwaysAllocateGPU", "provisionConfig.scheduledActions"),
            *(
                f"provisionConfig.scheduledActions[].{key}"
                for key in ("name", "startTime", "endTime", "target", "scheduleExpression", "timeZone")
            ),
            "provisionConfig.targetTrackingPolicies",
            *(
                f"provisionConfig.targetTrackingPolicies[].{key}"
                for key in (
                    *("name", "startTime", "endTime", "metricType", "metricTarget"),
                    *("minCapacity", "maxCapacity", "timeZone"),
                )
            ),
            *("triggers", "triggers[].triggerName", "triggers[].triggerType", "triggers[].triggerConfig"),
            *("triggers[].triggerConfig.authType", "triggers[].triggerConfig.methods"),
            "hibernode",
            *(
                f"hibernode.{key}"
                for key in (
                    *("freezeAfter", "minAwake", "idle", "dispatch", "wakeFactor", "queueLength", "queueTimeout"),
                    *("gpus", "visibleDevices", "nodeLabels"),
                )
            ),
        ),
        _BOTH,
    ),
    **dict.fromkeys(
        (
            "customContainerConfig.registryConfig",
            "customContainerConfig.registryConfig.authConfig",
            "customContainerConfig.registryConfig.authConfig.userName",
            "customContainerConfig.registryConfig.authConfig.password",
            *(
                f"hibernode.{key}"
                for key in ("shmSize", "pidsLimit", "openFiles", "user", "readOnlyRoot", "extraHosts", "volumes")
            ),
            *(f"hibernode.volumes[].{key}" for key in ("hostPath", "containerPath", "writable")),
        ),
        _IMAGE_ONLY,
    ),
    **dict.fromkeys(
        (f"instanceLifecycleConfig.{hook}.command" for hook in ("initializer", "preFreeze", "preStop")),
        Meaning(_NO_COMMAND, _NO_COMMAND),
    ),
    "customContainerConfig.port": Meaning(
        host=f"has no effect with `image: host`: each instance listens on a port of its own, ${LISTEN_PORT}"
    ),
    "cpu": Meaning(host=f"{_BILLED}, and CPUUtilization is relative to it"),
    "memorySize": Meaning(host=f"{_BILLED}, and counts when a node is chosen"),
    "diskSize": Meaning(host=_BILLED),
}
"""Every key that schema.py knows, below `props`; `[]` stands for each entry of a list."""

_VARIABLE = re.compile(r"\$(?:\{(?P<braced>FC_CUSTOM_LISTEN_PORT|PORT)\}|(?P<plain>FC_CUSTOM_LISTEN_PORT|PORT)\b)")
_SHELLS = frozenset({"sh", "ash", "bash", "dash", "busybox", "zsh", "ksh", "fish"})


def port_notes(
    image: str, port: int, entrypoint: tuple[str, ...], command: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Warnings about a variable for the port, where no shell replaces it."""
    if any(PurePosixPath(word).name in _SHELLS for word in (*entrypoint, *command)):
        return
    for key, words in (("entrypoint", entrypoint), ("command", command)):
        names = {found["braced"] or found["plain"] for word in words for found in _VARIABLE.finditer(word)}
        if image == HOST_IMAGE:
            names.discard(LISTEN_PORT)
            fix = f"write ${LISTEN_PORT}, which is replaced"
        else:
            fix = f"write the port, {port}"
        for name in sorted(names):
            yield ("customContainerConfig", key), f"${name} is not replaced unless a shell reads it: {fix}"
