"""Translates a container configuration for Podman's own API, the only one that takes CDI devices before Podman 5.4.

The body is for `POST /v4.0.0/libpod/containers/create`; every later call uses the Docker API. The input is the result
of `container_config`. A key without a translation raises, so that no limit is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

CREATE_PATH = "v4.0.0/libpod/containers/create"
CPU_PERIOD_US = 100_000

_CONFIG_KEYS = frozenset({"Image", "Env", "Labels", "Healthcheck", "HostConfig", "Entrypoint", "Cmd", "User"})


def libpod_config(config: Mapping[str, Any], name: str, devices: Sequence[str]) -> dict[str, Any]:
    """The body for container `name` with the CDI `devices` (`nvidia.com/gpu=<uuid>`). Raises KeyError for a key of
    `config` that has no translation."""
    if unknown := set(config) - _CONFIG_KEYS:
        raise KeyError(f"no translation for {', '.join(sorted(unknown))}")
    body: dict[str, Any] = {
        "name": name,
        "image": config["Image"],
        "env": dict(entry.split("=", 1) for entry in config["Env"]),
        "labels": dict(config["Labels"]),
        "healthconfig": dict(config["Healthcheck"]),
        "devices": [{"path": device} for device in devices],
        "mounts": [],
        "resource_limits": {},
    }
    for docker_key, libpod_key in (("Entrypoint", "entrypoint"), ("Cmd", "command"), ("User", "user")):
        if docker_key in config:
            body[libpod_key] = config[docker_key]
    for key, value in config["HostConfig"].items():
        _TRANSLATIONS[key](body, value)
    return body


def _same(_body: dict[str, Any], _value: object) -> None:
    """Podman's default already does this."""


def _set(name: str) -> Callable[[dict[str, Any], Any], None]:
    def assign(body: dict[str, Any], value: object) -> None:
        body[name] = value

    return assign


def _network(body: dict[str, Any], value: str) -> None:
    body["netns"] = {"nsmode": "bridge"}
    body["Networks"] = {value: {}}


def _restart(body: dict[str, Any], value: Mapping[str, str]) -> None:
    body["restart_policy"] = value["Name"]


def _cap_add(body: dict[str, Any], value: Sequence[str]) -> None:
    body["cap_add"] = [f"CAP_{name}" for name in value]


def _security(body: dict[str, Any], value: Sequence[str]) -> None:
    if list(value) != ["no-new-privileges"]:
        raise KeyError(f"no translation for SecurityOpt {value}")
    body["no_new_privileges"] = True


def _ipc(body: dict[str, Any], value: str) -> None:
    body["ipcns"] = {"nsmode": value}


def _tmpfs(body: dict[str, Any], value: Mapping[str, str]) -> None:
    for target, options in value.items():
        body["mounts"].append(
            {"type": "tmpfs", "source": "tmpfs", "destination": target, "options": options.split(",")}
        )


def _memory(body: dict[str, Any], value: int) -> None:
    body["resource_limits"].setdefault("memory", {})["limit"] = value


def _memory_swap(body: dict[str, Any], value: int) -> None:
    body["resource_limits"].setdefault("memory", {})["swap"] = value


def _cpus(body: dict[str, Any], value: int) -> None:
    quota = value * CPU_PERIOD_US // 1_000_000_000
    body["resource_limits"]["cpu"] = {"period": CPU_PERIOD_US, "quota": quota}


def _pids(body: dict[str, Any], value: int) -> None:
    body["resource_limits"]["pids"] = {"limit": value}


def _ulimits(body: dict[str, Any], value: Sequence[Mapping[str, Any]]) -> None:
    body["r_limits"] = [
        {"type": f"RLIMIT_{limit['Name'].upper()}", "soft": limit["Soft"], "hard": limit["Hard"]} for limit in value
    ]


def _log(body: dict[str, Any], value: Mapping[str, Any]) -> None:
    body["log_configuration"] = {"driver": value["Type"], "options": dict(value["Config"])}


def _mounts(body: dict[str, Any], value: Sequence[Mapping[str, Any]]) -> None:
    for mount in value:
        access = "ro" if mount["ReadOnly"] else "rw"
        options = ["rbind", access, mount["BindOptions"]["Propagation"]]
        body["mounts"].append(
            {"type": "bind", "source": mount["Source"], "destination": mount["Target"], "options": options}
        )


_TRANSLATIONS: Mapping[str, Callable[[dict[str, Any], Any], None]] = {
    "NetworkMode": _network,
    "RestartPolicy": _restart,
    "AutoRemove": _set("remove"),
    "Init": _set("init"),
    "Privileged": _set("privileged"),
    "CapDrop": _set("cap_drop"),
    "CapAdd": _cap_add,
    "SecurityOpt": _security,
    "IpcMode": _ipc,
    "PidMode": _same,
    "ReadonlyRootfs": _set("read_only_filesystem"),
    "Tmpfs": _tmpfs,
    "Memory": _memory,
    "MemorySwap": _memory_swap,
    "NanoCpus": _cpus,
    "PidsLimit": _pids,
    "ShmSize": _set("shm_size"),
    "Ulimits": _ulimits,
    "StorageOpt": _set("storage_opts"),
    "LogConfig": _log,
    "ExtraHosts": _set("hostadd"),
    "Mounts": _mounts,
}
