"""Any s.yaml is either loaded or refused with its line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from agent.cli.commands.deploy import deploy_request
from agent.cli.fc3.load import load_s_yaml
from agent.core.errors import ConfigError

WHOLE: dict[str, Any] = {
    "edition": "3.0.0",
    "vars": {"region": "here"},
    "resources": {
        "ocr": {
            "component": "fc3",
            "props": {
                "functionName": "ocr",
                "runtime": "custom-container",
                "region": "${vars.region}",
                "timeout": 5,
                "cpu": 1,
                "gpuConfig": {"gpuType": "fc.gpu.ada.1", "gpuMemorySize": 1024},
                "environmentVariables": {"A": "b"},
                "customContainerConfig": {
                    "image": "registry.example/ocr:1",
                    "entrypoint": ["serve"],
                    "command": [],
                    "healthCheckConfig": {"httpGetUrl": "/"},
                    "registryConfig": {"authConfig": {"userName": "me", "password": "secret"}},
                },
                "instanceLifecycleConfig": {"initializer": {"timeout": 3}},
                "provisionConfig": {"defaultTarget": 1},
                "triggers": [{"triggerName": "t", "triggerType": "http", "triggerConfig": {"methods": ["GET"]}}],
                "hibernode": {
                    "freezeAfter": "10s",
                    "wakeFactor": 1,
                    "gpus": 1,
                    "user": "1000",
                    "extraHosts": {"db": "10.0.0.7"},
                    "volumes": [{"hostPath": "/srv", "containerPath": "/srv"}],
                },
            },
        }
    },
}

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(min_value=-(2**70), max_value=2**70),
    st.floats(),
    st.text(max_size=20),
    st.dates(),
    st.sampled_from(["${", "${vars.region}", "${vars.nope}", "$${x}", "${env('HOME')}", "1e400", "010", "0x1F", "~"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key and item of the tree."""
    keys = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in keys for found in ((*path, key), *places(value, (*path, key)))]


@example(place=("resources", "ocr", "props", "triggers"), value=1, beside=False)
@given(place=st.sampled_from(places(WHOLE)), value=values, beside=st.booleans())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_value_anywhere(tmp_path: Path, place: tuple[Any, ...], value: object, beside: bool) -> None:
    """`beside`: adds the value as another key, else replaces the value."""
    document = copy.deepcopy(WHOLE)
    parent: Any = document
    for key in place[:-1]:
        parent = parent[key]
    parent["other" if beside and isinstance(parent, dict) else place[-1]] = value
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    refused = ""
    try:
        (found,) = load_s_yaml(path, environment={"HOME": "/root"})
        assert deploy_request(found, 1).spec.vcpu_millis >= 50
    except ConfigError as error:
        refused = error.message
    assert refused == "" or refused.startswith("s.yaml:")
