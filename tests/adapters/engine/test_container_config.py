"""The container configuration: the whole body, and precedence between node, function and image."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from agent.adapters.engine.container_config import container_config, container_name
from agent.adapters.engine.gpus import Attachment
from agent.adapters.engine.volumes import ResolvedVolume
from agent.core.errors import InvalidArgumentError
from agent.core.types import GIB, MIB, ContainerOptions
from tests.adapters.engine.starts import CAPABILITIES, GPU_A, GPU_B, STATE, plan_options, start_spec


def environment(config: dict[str, Any]) -> dict[str, str]:
    return dict(entry.split("=", 1) for entry in config["Env"])


def mount(source: str, target: str, *, read_only: bool) -> dict[str, Any]:
    propagation = {"Propagation": "rprivate"}
    return {"Type": "bind", "Source": source, "Target": target, "ReadOnly": read_only, "BindOptions": propagation}


def test_plain_start_has_exactly_this_body() -> None:
    config = container_config(start_spec(port=9000, memory_bytes=512 * MIB, vcpu_millis=350), plan_options())
    assert config == {
        "Image": "sha256:0123",
        "Env": [
            "CUDA_VISIBLE_DEVICES=",
            "NVIDIA_VISIBLE_DEVICES=void",
            "PORT=9000",
            f"HIBERNODE_INSTANCE={STATE}/ocr-1",
            "FC_CUSTOM_LISTEN_PORT=9000",
        ],
        "Labels": {"hibernode.state": STATE, "hibernode.instance": "ocr-1", "hibernode.function": "ocr"},
        "Healthcheck": {"Test": ["NONE"]},
        "HostConfig": {
            "NetworkMode": "hibernode-5b0d6f9e6c7f",
            "RestartPolicy": {"Name": "no"},
            "AutoRemove": False,
            "Init": False,
            "Privileged": False,
            "CapDrop": ["ALL"],
            "CapAdd": list(CAPABILITIES),
            "SecurityOpt": ["no-new-privileges"],
            "IpcMode": "private",
            "PidMode": "",
            "ReadonlyRootfs": False,
            "Memory": 512 * MIB,
            "MemorySwap": 512 * MIB,
            "NanoCpus": 350_000_000,
            "PidsLimit": 4096,
            "LogConfig": {"Type": "json-file", "Config": {"max-size": "5000000", "max-file": "2"}},
        },
    }
    assert container_name("ocr-1") == "hibernode-ocr-1"


def test_entrypoint_and_command_replace_the_images_if_given() -> None:
    config = container_config(start_spec(entrypoint=("python3", "-u"), command=("app.py", "--x y")), plan_options())
    assert (config["Entrypoint"], config["Cmd"]) == (["python3", "-u"], ["app.py", "--x y"])
    plain = container_config(start_spec(), plan_options())
    assert not {"Entrypoint", "Cmd", "User"} & set(plain)


def test_all_container_settings_of_a_function() -> None:
    container = ContainerOptions(
        shm_bytes=2 * GIB,
        pids_limit=100,
        open_files=65536,
        user="1000:1000",
        read_only_root=True,
        extra_hosts=(("db.example.com", "10.0.0.7"), ("six", "fd00::1")),
    )
    config = container_config(start_spec(container=container, disk_bytes=GIB), plan_options(disk_limit=True))
    host = config["HostConfig"]
    assert config["User"] == "1000:1000"
    assert (host["ShmSize"], host["PidsLimit"], host["ReadonlyRootfs"]) == (2 * GIB, 100, True)
    assert host["Ulimits"] == [{"Name": "nofile", "Soft": 65536, "Hard": 65536}]
    assert host["ExtraHosts"] == ["db.example.com:10.0.0.7", "six:fd00::1"]
    assert host["Tmpfs"] == {"/tmp": f"rw,nosuid,nodev,exec,mode=1777,size={GIB}"}
    assert host["StorageOpt"] == {"size": str(GIB)}


def test_no_storage_option_without_a_disk_limit() -> None:
    assert "StorageOpt" not in container_config(start_spec(disk_bytes=GIB), plan_options())["HostConfig"]
    assert "StorageOpt" not in container_config(start_spec(disk_bytes=0), plan_options(disk_limit=True))["HostConfig"]


OWN = {
    "PORT": "8081",
    "HIBERNODE_INSTANCE": "x/y",
    "CUDA_VISIBLE_DEVICES": "1",
    "CUDA_DEVICE_ORDER": "FASTEST_FIRST",
    "NVIDIA_VISIBLE_DEVICES": "all",
    "FC_REGION": "elsewhere",
    "MODEL": "v4",
}


@pytest.mark.parametrize(
    ("attachment", "numbers", "expected"),
    [
        (Attachment("cdi"), (4,), {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}),
        (
            Attachment("mounts", sees_all_gpus=True),
            (4,),
            {"CUDA_VISIBLE_DEVICES": "4", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
        ),
        (
            Attachment("mounts", sees_all_gpus=True),
            (),
            {"CUDA_VISIBLE_DEVICES": GPU_A, "CUDA_DEVICE_ORDER": "FASTEST_FIRST"},
        ),
    ],
    ids=["sees only its own", "sees all", "sees all, numbers unknown"],
)
def test_functions_own_values_count_unless_isolation_rests_on_ours(
    attachment: Attachment, numbers: tuple[int, ...], expected: dict[str, str]
) -> None:
    spec = replace(start_spec(gpus=(GPU_A,), environment=OWN, ours={"FC_REGION": "local"}), gpu_numbers=numbers)
    assert environment(container_config(spec, plan_options(attachment=attachment))) == {
        **expected,
        "MODEL": "v4",
        "PORT": "8081",
        "FC_CUSTOM_LISTEN_PORT": "9000",
        "HIBERNODE_INSTANCE": f"{STATE}/ocr-1",
        "NVIDIA_VISIBLE_DEVICES": "void",
        "FC_REGION": "local",
    }


def test_container_numbers_the_gpus_that_it_sees() -> None:
    spec = replace(start_spec(gpus=(GPU_A, GPU_B)), gpu_numbers=(2, 5))
    found = environment(container_config(spec, plan_options(attachment=Attachment("cdi"))))
    assert (found["CUDA_VISIBLE_DEVICES"], "CUDA_DEVICE_ORDER" in found) == ("0,1", False)


def test_movable_instance_sees_all_gpus_but_computes_on_its_own() -> None:
    attachment = Attachment("nvidia-runtime", visible_devices="all", sees_all_gpus=True)
    spec = replace(start_spec(gpus=(GPU_A, GPU_B), all_gpus=True), gpu_numbers=(5, 2))
    found = environment(container_config(spec, plan_options(attachment=attachment)))
    assert (found["CUDA_VISIBLE_DEVICES"], found["CUDA_DEVICE_ORDER"]) == ("5,2", "PCI_BUS_ID")
    assert found["NVIDIA_VISIBLE_DEVICES"] == "all"


@pytest.mark.parametrize(
    ("ours", "function", "image", "expected"),
    [
        ("/gpus/lib", "", "", "/gpus/lib"),
        ("/gpus/lib", "", "/usr/local/nvidia/lib64", "/gpus/lib:/usr/local/nvidia/lib64"),
        ("/gpus/lib", "/app/lib", "/usr/local/nvidia/lib64", "/gpus/lib:/app/lib"),
        ("", "/app/lib", "/usr/local/nvidia/lib64", "/app/lib"),
        ("", "", "/usr/local/nvidia/lib64", None),
    ],
)
def test_our_library_folders_precede_the_functions_and_images(
    ours: str, function: str, image: str, expected: str | None
) -> None:
    name = "LD_LIBRARY_PATH"
    spec = start_spec(
        gpus=(GPU_A,), ours={name: ours} if ours else {}, environment={name: function} if function else {}
    )
    config = container_config(spec, plan_options(image_environment={name: image} if image else {}))
    assert environment(config).get(name) == expected


def test_attachment_is_applied_to_the_config() -> None:
    request = {"Driver": "cdi", "DeviceIDs": [f"nvidia.com/gpu={GPU_A}"]}
    by_request = plan_options(attachment=Attachment("cdi", device_requests=(request,)))
    assert container_config(start_spec(gpus=(GPU_A,)), by_request)["HostConfig"]["DeviceRequests"] == [request]
    binds = ("/gpus/lib:/gpus/lib:ro", "/gpus/driver.sock:/gpus/driver.sock")
    by_mounts = plan_options(attachment=Attachment("mounts", binds=binds))
    assert container_config(start_spec(gpus=(GPU_A,)), by_mounts)["HostConfig"]["Mounts"] == [
        mount("/gpus/lib", "/gpus/lib", read_only=True),
        mount("/gpus/driver.sock", "/gpus/driver.sock", read_only=False),
    ]


def test_volumes_are_private_mounts_of_existing_folders() -> None:
    volumes = (ResolvedVolume("/srv/a:b", "/mnt/models", read_only=True),)
    host = container_config(start_spec(), plan_options(volumes=volumes))["HostConfig"]
    assert host["Mounts"] == [mount("/srv/a:b", "/mnt/models", read_only=True)]


@pytest.mark.parametrize(
    ("wanted", "host_cpus", "nano"), [(16_000, 2, 2), (500, 2, 0.5), (16_000, 0, 16), (1, 2, 0.01)]
)
def test_cpus_stay_within_host_and_engine_limits(wanted: int, host_cpus: int, nano: float) -> None:
    host = container_config(start_spec(vcpu_millis=wanted), plan_options(host_cpus=host_cpus))["HostConfig"]
    assert host["NanoCpus"] == nano * 1_000_000_000


@pytest.mark.parametrize(
    ("function_user", "image_user", "given"),
    [
        ("", "", CAPABILITIES),
        ("root", "app", CAPABILITIES),
        ("0:0", "", CAPABILITIES),
        ("1000", "", ()),
        ("app:root", "", ()),
        ("", "app", ()),
    ],
)
def test_only_root_gets_capabilities(function_user: str, image_user: str, given: tuple[str, ...]) -> None:
    """Podman passes added capabilities on to every user."""
    spec = start_spec(container=ContainerOptions(user=function_user))
    host = container_config(spec, plan_options(image_user=image_user))["HostConfig"]
    assert tuple(host.get("CapAdd", ())) == given
    assert host["CapDrop"] == ["ALL"]


def test_shared_memory_size_variable() -> None:
    spec = start_spec(environment={"FCGPU_RUNTIME_SHMSIZE": "8589934592"})
    assert container_config(spec, plan_options())["HostConfig"]["ShmSize"] == 8 * GIB
    both = start_spec(environment={"FCGPU_RUNTIME_SHMSIZE": "1"}, container=ContainerOptions(shm_bytes=GIB))
    assert container_config(both, plan_options())["HostConfig"]["ShmSize"] == GIB
    with pytest.raises(InvalidArgumentError, match="FCGPU_RUNTIME_SHMSIZE: must be a number of bytes"):
        container_config(start_spec(environment={"FCGPU_RUNTIME_SHMSIZE": "8g"}), plan_options())


def test_repr_hides_secrets() -> None:
    assert "hunter2" not in repr(plan_options(image_environment={"TOKEN": "hunter2"}))
