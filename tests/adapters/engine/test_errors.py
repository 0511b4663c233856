"""Engine error texts for failed starts (collected from Docker 20.10, Podman 4.3, runc and crun)."""

from __future__ import annotations

import pytest

from agent.adapters.engine.api import EngineError
from agent.adapters.engine.errors import disk_limit_refused, network_missing, start_refused
from agent.core.types import FunctionSpec

FUNCTION = FunctionSpec(name="resize", image="registry.example/resize:1")
OCI = "failed to create shim task: OCI runtime create failed: runc create failed: unable to start container process: "
CRUN = "crun: executable file `serve` not found in $PATH: No such file or directory: OCI runtime attempted to invoke a "
POOL = "could not find an available, non-overlapping IPv4 address pool among the defaults to assign to the network"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (OCI + 'exec: "serve": executable file not found in $PATH: unknown', "COMMAND_NOT_FOUND"),
        (OCI + 'exec: "/app/serve": stat /app/serve: no such file or directory: unknown', "COMMAND_NOT_FOUND"),
        (OCI + 'exec: "/app": permission denied: unknown', "COMMAND_NOT_FOUND"),
        (CRUN + "command that was not found", "COMMAND_NOT_FOUND"),
        ('runc: exec: "/etc": is a directory: OCI runtime error', "COMMAND_NOT_FOUND"),
        ("No command specified", "COMMAND_NOT_FOUND"),
        (OCI + "exec /app/serve: exec format error: unknown", "COMMAND_NOT_FOUND"),
        ("No such image: sha256:1111", "IMAGE_NOT_FOUND"),
        ("registry.example/resize:1: image not known", "IMAGE_NOT_FOUND"),
        ('invalid mount config for type "bind": bind source path does not exist: /srv/models', "VOLUME_REFUSED"),
        ("statfs /srv/models: no such file or directory", "VOLUME_REFUSED"),
        ("unable to find user model: no matching entries in passwd file", "START_FAILED"),
        ('could not select device driver "nvidia" with capabilities: [[gpu]]', "GPU_ATTACH_UNAVAILABLE"),
        ("CDI device injection failed: unresolvable CDI devices nvidia.com/gpu=GPU-1", "GPU_ATTACH_UNAVAILABLE"),
        ("Minimum memory limit allowed is 6MB", "START_FAILED"),
        (POOL, "ADDRESSES_EXHAUSTED"),
        ("IPAM error: failed to find free IP in range: 10.89.0.1 - 10.89.0.254", "ADDRESSES_EXHAUSTED"),
        ("something new and strange", "START_FAILED"),
    ],
)
def test_known_errors_have_a_reason_and_quote_the_engine(text: str, reason: str) -> None:
    error = start_refused(FUNCTION, EngineError(500, text))
    assert error.reason == reason
    assert text in error.message


def test_missing_file_is_not_a_missing_command() -> None:
    error = start_refused(FUNCTION, EngineError(500, "error mounting /etc/hosts: no such file or directory"))
    assert error.reason == "START_FAILED"


def test_errors_that_are_repaired_and_retried() -> None:
    assert network_missing(EngineError(404, "network hibernode-0123456789ab not found"))
    assert network_missing(EngineError(500, "unable to find network with name or ID hibernode-01: network not found"))
    assert not network_missing(EngineError(404, "No such image: network/tools"))
    assert disk_limit_refused(
        EngineError(500, "--storage-opt is supported only for overlay over xfs with 'pquota' mount option")
    )
    assert not disk_limit_refused(EngineError(500, "no such storage"))
