"""The translation for Podman's own API keeps every limit and isolation setting."""

from __future__ import annotations

import pytest

from agent.adapters.engine.container_config import container_config
from agent.adapters.engine.container_config_libpod import libpod_config
from agent.adapters.engine.gpus import Attachment
from agent.adapters.engine.volumes import ResolvedVolume
from agent.core.types import GIB, MIB, ContainerOptions
from tests.adapters.engine.starts import GPU_A, STATE, plan_options, start_spec

DEVICE = f"nvidia.com/gpu={GPU_A}"


def test_whole_body() -> None:
    container = ContainerOptions(
        shm_bytes=GIB,
        pids_limit=100,
        open_files=1024,
        read_only_root=True,
        extra_hosts=(("db", "10.0.0.7"),),
    )
    spec = start_spec(
        gpus=(GPU_A,),
        container=container,
        environment={"A": "1=2"},
        entrypoint=("python3",),
        command=("app.py",),
        memory_bytes=512 * MIB,
        vcpu_millis=1500,
        disk_bytes=GIB,
    )
    options = plan_options(
        attachment=Attachment("cdi-libpod", devices=(DEVICE,)),
        volumes=(ResolvedVolume("/srv/m", "/mnt/m", read_only=True), ResolvedVolume("/srv/w", "/w", read_only=False)),
        disk_limit=True,
    )
    assert libpod_config(container_config(spec, options), "hibernode-ocr-1", [DEVICE]) == {
        "name": "hibernode-ocr-1",
        "image": "sha256:0123",
        "entrypoint": ["python3"],
        "command": ["app.py"],
        "env": {
            "A": "1=2",
            "CUDA_VISIBLE_DEVICES": "0",
            "NVIDIA_VISIBLE_DEVICES": "void",
            "FC_CUSTOM_LISTEN_PORT": "9000",
            "PORT": "9000",
            "HIBERNODE_INSTANCE": f"{STATE}/ocr-1",
        },
        "labels": {"hibernode.state": STATE, "hibernode.instance": "ocr-1", "hibernode.function": "ocr"},
        "healthconfig": {"Test": ["NONE"]},
        "devices": [{"path": DEVICE}],
        "netns": {"nsmode": "bridge"},
        "Networks": {"hibernode-5b0d6f9e6c7f": {}},
        "restart_policy": "no",
        "remove": False,
        "init": False,
        "privileged": False,
        "cap_drop": ["ALL"],
        "cap_add": ["CAP_CHOWN", "CAP_SETUID"],
        "no_new_privileges": True,
        "ipcns": {"nsmode": "private"},
        "read_only_filesystem": True,
        "resource_limits": {
            "memory": {"limit": 512 * MIB, "swap": 512 * MIB},
            "cpu": {"period": 100_000, "quota": 150_000},
            "pids": {"limit": 100},
        },
        "shm_size": GIB,
        "r_limits": [{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 1024}],
        "storage_opts": {"size": str(GIB)},
        "log_configuration": {"driver": "json-file", "options": {"max-size": "5000000", "max-file": "2"}},
        "hostadd": ["db:10.0.0.7"],
        "mounts": [
            {
                "type": "tmpfs",
                "source": "tmpfs",
                "destination": "/tmp",
                "options": ["rw", "nosuid", "nodev", "exec", "mode=1777", f"size={GIB}"],
            },
            {"type": "bind", "source": "/srv/m", "destination": "/mnt/m", "options": ["rbind", "ro", "rprivate"]},
            {"type": "bind", "source": "/srv/w", "destination": "/w", "options": ["rbind", "rw", "rprivate"]},
        ],
    }


def test_untranslatable_keys_raise() -> None:
    config = container_config(start_spec(), plan_options())
    with pytest.raises(KeyError, match="Hostname"):
        libpod_config({**config, "Hostname": "x"}, "n", [])
    with pytest.raises(KeyError, match="CgroupParent"):
        libpod_config({**config, "HostConfig": {**config["HostConfig"], "CgroupParent": "x"}}, "n", [])
    with pytest.raises(KeyError, match="seccomp"):
        libpod_config(
            {**config, "HostConfig": {**config["HostConfig"], "SecurityOpt": ["seccomp=unconfined"]}}, "n", []
        )
