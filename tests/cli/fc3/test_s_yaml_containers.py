"""Keys of an s.yaml for containers: registry login, volumes, limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.core.types import GIB, ContainerOptions, RegistryLogin, Volume
from tests.cli.fc3.test_s_yaml import IMAGE, load, refusal, written


def test_every_container_key(tmp_path: Path) -> None:
    """Texts are kept as written, although YAML reads 1000:1000 as 61000 and 0123 as 83."""
    props = """\
    hibernode:
      shmSize: 8GiB
      pidsLimit: 512
      openFiles: 65536
      user: 1000:1000
      readOnlyRoot: true
      extraHosts: {weights.internal: 10.0.0.7, db: fd00::1}
      volumes:
        - {hostPath: /srv/models, containerPath: /models}
        - {hostPath: /srv/scratch, containerPath: /scratch, writable: true}
    """
    image = """\
      customContainerConfig:
        image: registry.example/ocr:1
        webServerMode: true
        registryConfig:
          authConfig: {userName: 0123, password: "${env('DB_PASSWORD')}"}
          certConfig: {insecure: true}
"""
    found = load(tmp_path, props, image)
    assert found.function.container == ContainerOptions(
        shm_bytes=8 * GIB,
        pids_limit=512,
        open_files=65536,
        user="1000:1000",
        read_only_root=True,
        extra_hosts=(("db", "fd00::1"), ("weights.internal", "10.0.0.7")),
        volumes=(Volume("/srv/models", "/models"), Volume("/srv/scratch", "/scratch", read_only=False)),
        registry=RegistryLogin("0123", "hunter2"),
    )
    assert "hunter2" not in repr(found)
    assert any("registryConfig.certConfig: is configured in the host" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("props", "problem"),
    [
        ("hibernode: {shmSize: 8}", "hibernode.shmSize: expected a size with its unit"),
        ("hibernode: {shmSize: 8192TiB}", "hibernode.shmSize: must be 0 bytes to 1024 TiB, got 8192 TiB"),
        ("hibernode: {pidsLimit: 0}", "hibernode.pidsLimit: expected a whole number from 1 to 4194304, got 0"),
        ("hibernode: {user: a b}", "hibernode.user: must be a name or number"),
        ("hibernode: {user: [root]}", "hibernode.user: expected text"),
        (
            "hibernode: {extraHosts: {db: db.example}}",
            "s.yaml:11: resources.ocr.props.hibernode.extraHosts.db: must name",
        ),
        ("hibernode: {extraHosts: ['db:10.0.0.7']}", "hibernode.extraHosts: expected"),
        (
            "hibernode:\n  volumes:\n    - hostPath: srv\n      containerPath: /s",
            ":13: resources.ocr.props.hibernode.v",
        ),
        ("hibernode: {volumes: [{hostPath: /srv, containerPath: /}]}", "volumes[0].containerPath: must not be /"),
        ("hibernode: {volumes: [{hostPath: /srv}]}", "volumes[0].containerPath: required"),
        ("environmentVariables: {FCGPU_RUNTIME_SHMSIZE: 8GiB}", "FCGPU_RUNTIME_SHMSIZE: must be a number of bytes"),
    ],
)
def test_container_errors_name_line_and_key(tmp_path: Path, props: str, problem: str) -> None:
    assert problem in refusal(written(tmp_path, props + "\n"))


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ("webServerMode: false", "customContainerConfig.webServerMode: must not be false"),
        ("registryConfig: {authConfig: {userName: me}}", "authConfig.password: required"),
        ("registryConfig: {authConfig: {userName: me, password: [hunter2]}}", "authConfig.password: must be text"),
        (
            "registryConfig: {authConfig: {userName: me, passwrd: hunter2}}",
            "passwrd: unknown key; did you mean password?",
        ),
        ("image: host\n        command: [a]\n        registryConfig: {}", "registryConfig: is for images"),
    ],
)
def test_image_errors_contain_no_secret(tmp_path: Path, config: str, problem: str) -> None:
    image = (
        IMAGE.replace("image: registry.example/ocr:1", config) if "image:" in config else f"{IMAGE}        {config}\n"
    )
    message = refusal(written(tmp_path, "", image))
    assert problem in message
    assert "hunter2" not in message


@pytest.mark.parametrize("option", ["shmSize: 1GiB", "user: root", "readOnlyRoot: true", "extraHosts: {a: 10.0.0.1}"])
def test_host_process_takes_no_container_options(tmp_path: Path, option: str) -> None:
    image = IMAGE.replace("registry.example/ocr:1", "host\n        command: [serve]")
    message = refusal(written(tmp_path, f"hibernode: {{{option}}}\n", image))
    assert f"hibernode.{option.partition(':')[0]}: is for images" in message
