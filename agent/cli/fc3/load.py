"""Loads `s.yaml` files of Serverless Devs' fc3 component.

Every key is used, refused with its line, or named in a warning. Keys are fc3's; Hibernode's own are under `hibernode:`
in the props (schema.py).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Literal

import msgspec

from agent.cli.fc3.document import Document, KeyPath, Text, plain, read_document
from agent.cli.fc3.function import explicit_fields, function_of
from agent.cli.fc3.meaning import MEANING, REFUSED
from agent.cli.fc3.provision import provision_to_proto, target_of
from agent.cli.fc3.schema import IGNORED, Props, Trigger, camel
from agent.config import convert
from agent.core.errors import ConfigError, InvalidArgumentError, NotFoundError
from agent.core.function_rules import HOST_IMAGE, check_function
from agent.core.types import FunctionSpec
from agent.v1.function_service_pb2 import ProvisionConfig

MAX_ENVIRONMENT_BYTES = 4096
RESERVED_PREFIX = "FC_"
COMPONENT = "fc3"

_DURATIONS = ("freezeAfter", "minAwake", "queueTimeout")
_AS_WRITTEN: tuple[KeyPath, ...] = (
    ("environmentVariables",),
    ("customContainerConfig", "registryConfig", "authConfig"),
    ("gpuConfig", "gpuType"),
    ("hibernode", "user"),
    ("hibernode", "extraHosts"),
    ("hibernode", "nodeLabels"),
)
"""Texts that YAML would convert, such as a password 123 or a model 4090 to a number."""
_KEYS: dict[str, KeyPath] = {
    "container.shm_bytes": ("hibernode", "shmSize"),
    "container.user": ("hibernode", "user"),
    "container.extra_hosts": ("hibernode", "extraHosts"),
    "container.volumes": ("hibernode", "volumes"),
    "container.registry": ("customContainerConfig", "registryConfig"),
    "environment": ("environmentVariables",),
    "node_labels": ("hibernode", "nodeLabels"),
}
"""Keys of core's fields, for errors found by core's rules."""
_TOP = {"edition", "name", "access", "vars", "resources"}
_UNUSED_TOP = {"actions", "env", "extend", "flow", "params", "template", "use"}
_RESOURCE = {"component", "props", "access"}
_UNUSED_RESOURCE = {"actions", "extend", "type", "description"}


@dataclass(frozen=True, slots=True)
class HttpTrigger:
    """An HTTP trigger; no methods means all."""

    name: str
    auth_type: Literal["anonymous", "function", "jwt"]
    methods: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Deployment:
    """One function of the file.

    - `target`: None if the file has none
    - `provision`: schedules and policies; None without provisionConfig
    - `unset_fields`: fields with a default of the scheduler (queue_length, queue_timeout_ns, ...) that the file does
      not set
    """

    resource: str
    function: FunctionSpec
    triggers: tuple[HttpTrigger, ...]
    target: int | None
    provision: ProvisionConfig | None = None
    unset_fields: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()


def load_s_yaml(path: Path, resource: str = "", environment: Mapping[str, str] | None = None) -> list[Deployment]:
    """The functions of the file in its order, or only that of `resource`.

    `environment` is used for `${env('NAME')}`; None means os.environ. Raises ConfigError naming file, line and key, and
    NotFoundError RESOURCE_NOT_FOUND.
    """
    document = read_document(path) if environment is None else read_document(path, environment)
    general = list(_check_top(document))
    resources = document.lookup(("resources",))
    if not isinstance(resources, dict) or not resources:
        raise document.wrong(("resources",), "is required: a mapping of names to resources with component and props")
    if resource and resource not in resources:
        text = f"{document.name} has no resource {resource!r}; it has: {', '.join(resources)}"
        raise NotFoundError("RESOURCE_NOT_FOUND", text, resource=resource)
    found: list[Deployment] = []
    for name in [resource] if resource else resources:
        component = _component(document, ("resources", name))
        if component == COMPONENT:
            found.append(_deployment(document, name))
        elif resource:
            raise document.wrong(("resources", name, "component"), f"must be {COMPONENT}, got {component!r}")
        else:
            general.append(f"{document.at(('resources', name))}: component {component!r} is not {COMPONENT}: skipped")
    if not found:
        raise document.wrong(("resources",), f"no resource has `component: {COMPONENT}`")
    found[0] = replace(found[0], warnings=(*general, *found[0].warnings))
    names = [one.function.name for one in found]
    for one in found:
        if names.count(one.function.name) > 1:
            path_of_name = ("resources", one.resource, "props", "functionName")
            raise document.wrong(path_of_name, f"{one.function.name!r} is repeated; function names must be unique")
    return found


def _check_top(document: Document) -> Iterator[str]:
    if not isinstance(document.tree, dict):
        raise document.wrong((), "must be a mapping with `edition`, `name` and `resources`")
    edition = document.lookup(("edition",))
    if edition is not None and not (isinstance(edition, Text) and re.fullmatch(r"3(\.\d+)*", edition.written)):
        raise document.wrong(("edition",), "must be 3.0.0; files of edition 1 (component fc) have other keys")
    for key in document.tree:
        if key in _UNUSED_TOP:
            yield f"{document.at((key,))}: has no effect here"
        elif key not in _TOP:
            yield _unknown(document, (key,), sorted(_TOP))


def _component(document: Document, path: KeyPath) -> str:
    tree = document.lookup(path)
    if not isinstance(tree, dict):
        raise document.wrong(path, "must be a mapping with component and props")
    component = tree.get("component")
    if not isinstance(component, Text):
        raise document.wrong((*path, "component"), f"is required: {COMPONENT}")
    return component.written


def _deployment(document: Document, resource: str) -> Deployment:
    path: KeyPath = ("resources", resource)
    tree = document.lookup(path)
    assert isinstance(tree, dict)
    warnings: list[str] = []
    for key in tree:
        if key in _UNUSED_RESOURCE:
            warnings.append(f"{document.at((*path, key))}: has no effect here")
        elif key not in _RESOURCE:
            warnings.append(_unknown(document, (*path, key), sorted(_RESOURCE)))
    props_path = (*path, "props")
    given = tree.get("props")
    if not isinstance(given, dict):
        raise document.wrong(props_path, "is required: a mapping")
    used = _Pruner(document, warnings).pruned(given, props_path)
    props = _typed(document, props_path, _prepared(document, used, props_path))
    _check_environment(document, props_path, props.environment_variables or {})
    function, notes = function_of(props)
    try:
        check_function(function)
    except InvalidArgumentError as error:
        key_path, problem = _in_the_file(function, error)
        raise document.wrong((*props_path, *key_path), problem) from error
    warnings += [f"{document.at((*props_path, *key))}: {text}" for key, text in notes]
    return Deployment(
        resource=resource,
        function=function,
        triggers=_triggers(document, props.triggers or (), props_path, warnings),
        target=target_of(props.provision_config),
        provision=_provision(document, props_path, props),
        unset_fields=frozenset({"queue_length", "queue_timeout_ns", "dispatch", "wake_factor"})
        - explicit_fields(props.hibernode),
        warnings=tuple(warnings),
    )


def _in_the_file(function: FunctionSpec, error: InvalidArgumentError) -> tuple[KeyPath, str]:
    """Key path under the props and message of a core rule's error (`container.volumes[0].host_path: must be ...`)."""
    field = str(error.metadata.get("field", ""))
    name = max((name for name in _KEYS if field.startswith(name)), key=len, default="")
    if not name:
        return (), error.message
    steps: list[str | int] = []
    for key, index in _STEP.findall(field.removeprefix(name)):
        if name == "container.extra_hosts":
            steps.append(function.container.extra_hosts[int(index)][0])  # a mapping in the file
        else:
            steps.append(int(index) if index else camel(key) if key.islower() else key)
    return (*_KEYS[name], *steps), error.message.removeprefix(f"{field}: ")


# --- keys ------------------------------------------------------------------------------------


class _Pruner:
    """Removes keys without an effect, with a warning for each, so that the rest can be parsed strictly."""

    def __init__(self, document: Document, warnings: list[str]) -> None:
        self._document = document
        self._warnings = warnings
        self._on_host = False

    def pruned(self, tree: dict[str, object], path: KeyPath) -> dict[str, object]:
        """The props with only keys that `Props` knows."""
        container = tree.get("customContainerConfig")
        image = container.get("image") if isinstance(container, dict) else None
        self._on_host = isinstance(image, Text) and image.written == HOST_IMAGE
        pruned = self._walk(tree, msgspec.inspect.type_info(Props), path, "")
        assert isinstance(pruned, dict)
        return pruned

    def _walk(self, tree: object, shape: msgspec.inspect.Type, path: KeyPath, generic: str) -> object:
        match shape, tree:
            case msgspec.inspect.UnionType(types=types), _:
                kind = msgspec.inspect.StructType | msgspec.inspect.VarTupleType
                inner = next((one for one in types if isinstance(one, kind)), None)
                return tree if inner is None else self._walk(tree, inner, path, generic)
            case msgspec.inspect.VarTupleType(item_type=item), list():
                return [self._walk(one, item, (*path, index), f"{generic}[]") for index, one in enumerate(tree)]
            case msgspec.inspect.StructType(fields=fields), dict():
                known = {one.encode_name: one.type for one in fields}
                kept: dict[str, object] = {}
                for key, value in tree.items():
                    name = f"{generic}.{key}".removeprefix(".")
                    if key in known:
                        self._warn_of_runtime(name, (*path, key), value)
                        kept[key] = self._walk(value, known[key], (*path, key), name)
                    else:
                        self._left_out(name, (*path, key), list(known))
                return kept
            case _:
                return tree

    def _warn_of_runtime(self, name: str, path: KeyPath, value: object) -> None:
        """Names a key without meaning on the function's runtime."""
        lacks = MEANING[name].lacks(self._on_host)
        if lacks and lacks != REFUSED and not (isinstance(value, Text) and value.value is None):
            self._warnings.append(f"{self._document.at(path)}: {lacks}")

    def _left_out(self, name: str, path: KeyPath, known: list[str]) -> None:
        if name.startswith("triggers[].triggerConfig") and name not in IGNORED and not self._is_http(path[:-2]):
            return  # the trigger itself gets a warning
        if name not in IGNORED:
            self._warnings.append(_unknown(self._document, path, known))
        elif IGNORED[name]:
            self._warnings.append(f"{self._document.at(path)}: {IGNORED[name]}")

    def _is_http(self, path: KeyPath) -> bool:
        kind = self._document.lookup((*path, "triggerType"))
        return not isinstance(kind, Text) or kind.written == "http"


def _unknown(document: Document, path: KeyPath, known: list[str]) -> str:
    """A warning about an unknown key. Raises ConfigError if it looks like a typo."""
    close = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.8)
    if close:
        raise document.wrong(path, f"unknown key; did you mean {close[0]}?")
    return f"{document.at(path)}: unknown key, has no effect"


# --- values ----------------------------------------------------------------------------------


def _prepared(document: Document, used: dict[str, object], path: KeyPath) -> dict[str, object]:
    """Plain values, with `_AS_WRITTEN` as text, units added to durations, and empty sections removed."""
    values = plain(used)
    assert isinstance(values, dict)
    for key_path in _AS_WRITTEN:
        _take_as_written(document, path, used, values, key_path)
    ours = values.get("hibernode")
    if isinstance(ours, dict):
        for key in _DURATIONS:
            if isinstance(ours.get(key), int | float) and not isinstance(ours[key], bool):
                ours[key] = f"{Decimal(str(ours[key])):f}s"
    for key in ("hibernode", "environmentVariables", "gpuConfig"):
        if key in values and values[key] is None:
            del values[key]
    triggers = values.get("triggers")
    for trigger in triggers if isinstance(triggers, list) else ():
        if isinstance(trigger, dict) and trigger.get("triggerType", "http") != "http":
            trigger.pop("triggerConfig", None)
    return values


def _take_as_written(
    document: Document, path: KeyPath, used: dict[str, object], values: dict[str, object], key_path: KeyPath
) -> None:
    """Replaces the value at `key_path`, a text or a mapping of texts, by its text in the file."""
    source: object = used
    target: object = values
    for key in key_path[:-1]:
        source = source.get(key) if isinstance(source, dict) else None
        target = target.get(key) if isinstance(target, dict) else None
    if not isinstance(source, dict) or not isinstance(target, dict):
        return
    given, last = source.get(key_path[-1]), key_path[-1]
    if isinstance(given, dict):
        target[last] = {key: _written(document, (*path, *key_path, key), value) for key, value in given.items()}
    elif isinstance(given, Text) and given.value is not None and len(key_path) > 1:
        target[last] = given.written


def _written(document: Document, path: KeyPath, value: object) -> str:
    if not isinstance(value, Text):
        raise document.wrong(path, "must be text")
    return value.written


def _typed(document: Document, path: KeyPath, values: dict[str, object]) -> Props:
    try:
        return convert(values, Props, name=document.name)
    except ConfigError as error:
        problem = error.message.removeprefix(f"{document.name}: ")
        key, colon, what = problem.partition(": ")
        if not colon or " " in key:
            raise document.wrong(path, problem) from error
        raise _wrong_at(document, path, key, what) from error


_STEP = re.compile(r"([^.\[\]]+)|\[(\d*|\.\.\.)\]")


def _wrong_at(document: Document, path: KeyPath, key: str, what: str) -> ConfigError:
    """An error at msgspec's key path (`triggers[...].triggerConfig`), with the line."""
    steps: list[str | int] = []
    for found in _STEP.finditer(key):
        if found[1]:
            steps.append(found[1])
        elif found[2].isdecimal():
            steps.append(int(found[2]))
        else:
            steps.append("...")
    return document.wrong((*path, *steps), what)


def _check_environment(document: Document, path: KeyPath, variables: dict[str, str]) -> None:
    path = (*path, "environmentVariables")
    for name, value in variables.items():
        if name.startswith(RESERVED_PREFIX):
            raise document.wrong((*path, name), f"names that begin with {RESERVED_PREFIX} are reserved; choose another")
        if not name or "=" in name or "\0" in name + value:
            raise document.wrong((*path, name), "is not a valid name or value of an environment variable")
    total = sum(len(name.encode()) + len(value.encode()) for name, value in variables.items())
    if total > MAX_ENVIRONMENT_BYTES:
        raise document.wrong(path, f"has {total} bytes in total; at most {MAX_ENVIRONMENT_BYTES} are allowed")


def _triggers(
    document: Document, triggers: tuple[Trigger, ...], path: KeyPath, warnings: list[str]
) -> tuple[HttpTrigger, ...]:
    found = []
    for index, one in enumerate(triggers):
        if one.trigger_type != "http":
            where = document.at((*path, "triggers", index))
            warnings.append(f"{where}: triggers of type {one.trigger_type!r} are not supported: skipped")
            continue
        found.append(HttpTrigger(one.trigger_name, one.trigger_config.auth_type, one.trigger_config.methods))
    return tuple(found)


def _provision(document: Document, path: KeyPath, props: Props) -> ProvisionConfig | None:
    config = props.provision_config
    return None if config is None else provision_to_proto(document, (*path, "provisionConfig"), config)
