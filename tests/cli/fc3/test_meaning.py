"""Each key of the schema has a meaning on each runtime, or the deploy says that it has none."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from agent.cli.fc3.load import load_s_yaml
from agent.cli.fc3.meaning import MEANING, REFUSED
from agent.cli.fc3.schema import IGNORED, Props
from agent.core.errors import ConfigError

FILE = """\
edition: 3.0.0
name: test
resources:
  ocr:
    component: fc3
    props:
      functionName: ocr
      runtime: custom-container
      gpuConfig: {}
      customContainerConfig:
        image: IMAGE
        entrypoint: WORDS
"""


def warnings(folder: Path, more: str = "", image: str = "host", words: str = "[serve]") -> tuple[str, ...]:
    path = folder / "s.yaml"
    path.write_text(FILE.replace("IMAGE", image).replace("WORDS", words) + more)
    return load_s_yaml(path)[0].warnings


def keys_of(shape: msgspec.inspect.Type, name: str = "") -> Iterator[str]:
    match shape:
        case msgspec.inspect.UnionType(types=types):
            for one in types:
                yield from keys_of(one, name)
        case msgspec.inspect.VarTupleType(item_type=item):
            yield from keys_of(item, f"{name}[]")
        case msgspec.inspect.StructType(fields=fields):
            for field in fields:
                key = f"{name}.{field.encode_name}".removeprefix(".")
                yield key
                yield from keys_of(field.type, key)
        case _:
            pass


def test_the_table_has_every_key_of_the_schema_and_no_other() -> None:
    keys = set(keys_of(msgspec.inspect.type_info(Props)))
    assert len(keys) > 80
    assert keys == MEANING.keys()
    assert not keys & IGNORED.keys(), "a key is used or ignored"


@pytest.mark.parametrize(
    ("more", "key", "text"),
    [
        ("        port: 9000\n", "customContainerConfig.port", "listens on a port of its own, $FC_CUSTOM_LISTEN_PORT"),
        ("      cpu: 4\n", "props.cpu", "limits nothing with `image: host`"),
        ("      memorySize: 8192\n", "props.memorySize", "limits nothing with `image: host`"),
        ("      diskSize: 10240\n", "props.diskSize", "limits nothing with `image: host`"),
    ],
)
def test_a_key_of_containers_is_named_for_a_process_of_the_host(tmp_path: Path, more: str, key: str, text: str) -> None:
    (found,) = warnings(tmp_path, more)
    assert f"{key}: " in found
    assert text in found
    assert warnings(tmp_path, more, image="registry.example/ocr:1") == ()


def test_nothing_is_named_that_the_file_does_not_have(tmp_path: Path) -> None:
    assert warnings(tmp_path) == ()


VALUES = {
    "shmSize": "1GiB",
    "user": "a",
    "readOnlyRoot": "true",
    "extraHosts": "{a: 10.0.0.1}",
    "volumes": "[{hostPath: /a, containerPath: /b}]",
    "registryConfig": "{}",
}


@pytest.mark.parametrize(
    "key", [key for key, meaning in MEANING.items() if meaning.host == REFUSED and re.fullmatch(r"\w+\.\w+", key)]
)
def test_what_the_table_calls_refused_is_refused(tmp_path: Path, key: str) -> None:
    section, name = key.split(".")
    value = VALUES.get(name, "1")
    line = f"      hibernode: {{{name}: {value}}}\n"
    if section == "customContainerConfig":
        line = f"        {name}: {value}\n"
    with pytest.raises(ConfigError, match=f"{name}: is for images only"):
        warnings(tmp_path, line)


@pytest.mark.parametrize(
    ("image", "words", "expected"),
    [
        ("host", "[serve, --port, $FC_CUSTOM_LISTEN_PORT]", ""),
        (
            "host",
            "[serve, --port=$PORT]",
            "$PORT is not replaced unless a shell reads it: write $FC_",
        ),
        ("host", "[sh, -c, serve $PORT]", ""),
        ("host", "[serve, $PORTAL]", ""),
        (
            "a/b:1",
            "[serve, '$${FC_CUSTOM_LISTEN_PORT}']",
            "$FC_CUSTOM_LISTEN_PORT is not replaced unless a shell reads it",
        ),
        ("a/b:1", "[/bin/bash, -c, serve $FC_CUSTOM_LISTEN_PORT]", ""),
    ],
)
def test_a_port_variable_that_nothing_replaces_is_named(tmp_path: Path, image: str, words: str, expected: str) -> None:
    found = warnings(tmp_path, image=image, words=words)
    assert len(found) == bool(expected)
    assert expected in "".join(found)
