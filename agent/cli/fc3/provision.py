"""Reads schedules and scaling policies in fc3's format, from an s.yaml or a separate file."""

from __future__ import annotations

from pathlib import Path

from agent.cli.fc3.document import Document, KeyPath, plain, read_document
from agent.cli.fc3.schema import ProvisionConfig, camel
from agent.config import convert
from agent.core.errors import ConfigError, InvalidArgumentError
from agent.v1 import function_service_pb2 as pb
from agent.wire.convert_provision import provisioning_from_proto

_METRICS = {
    "ProvisionedConcurrencyUtilization": (pb.TargetTrackingPolicy.METRIC_TYPE_PROVISIONED_CONCURRENCY_UTILIZATION),
    "CPUUtilization": pb.TargetTrackingPolicy.METRIC_TYPE_CPU_UTILIZATION,
    "GPUMemUtilization": pb.TargetTrackingPolicy.METRIC_TYPE_GPU_MEM_UTILIZATION,
}
METRIC_NAMES = {number: name for name, number in _METRICS.items()}
"""Function Compute's names."""
_NO_EFFECT = ("alwaysAllocateCPU",)


def read_provision(path: Path) -> tuple[ProvisionConfig, pb.ProvisionConfig]:
    """Reads a JSON or YAML file with the keys of PutProvisionConfig (`scheduledActions`, `targetTrackingPolicies`,
    `defaultTarget`, ...). Returns its content, and its schedules and policies as a validated message.

    Raises ConfigError naming file, line and key."""
    document = read_document(path)
    tree = document.tree
    if not isinstance(tree, dict):
        raise document.wrong((), "must be a mapping with scheduledActions or targetTrackingPolicies")
    used = {key: value for key, value in tree.items() if key not in _NO_EFFECT}
    try:
        found = convert(plain(used), ProvisionConfig, name=document.name)
    except ConfigError as error:
        problem = error.message.removeprefix(f"{document.name}: ")
        key, colon, what = problem.partition(": ")
        if not colon or " " in key:
            raise document.wrong((), problem) from error
        raise document.wrong(_path_of(key), what) from error
    return found, provision_to_proto(document, (), found)


def provision_to_proto(document: Document, path: KeyPath, given: ProvisionConfig) -> pb.ProvisionConfig:
    """Schedules and policies as a validated message, without target and idle mode.

    Raises ConfigError naming file, line and key."""
    message = pb.ProvisionConfig(
        scheduled_actions=[
            pb.ScheduledAction(
                name=one.name,
                start_time=one.start_time,
                end_time=one.end_time,
                target=one.target,
                schedule_expression=one.schedule_expression,
                time_zone=one.time_zone or "",
            )
            for one in given.scheduled_actions or ()
        ],
        target_tracking_policies=[
            pb.TargetTrackingPolicy(
                name=one.name,
                start_time=one.start_time,
                end_time=one.end_time,
                metric_type=_METRICS[one.metric_type],
                metric_target=one.metric_target,
                min_capacity=one.min_capacity,
                max_capacity=one.max_capacity,
                time_zone=one.time_zone or "",
            )
            for one in given.target_tracking_policies or ()
        ],
    )
    try:
        provisioning_from_proto(message)
    except InvalidArgumentError as error:
        field = str(error.metadata.get("field", ""))
        problem = error.message.removeprefix(f"{field}: ")
        raise document.wrong((*path, *_path_of(field)), _in_camel(problem)) from error
    return message


def target_of(given: ProvisionConfig | None) -> int | None:
    """`defaultTarget`, or `target`, its older name; None without either."""
    if given is None:
        return None
    return given.target if given.default_target is None else given.default_target


def _path_of(field: str) -> KeyPath:
    """`target_tracking_policies[0].metric_target` -> ("targetTrackingPolicies", 0, "metricTarget")."""
    steps: list[str | int] = []
    for part in field.split("."):
        name, _, index = part.partition("[")
        steps.append(camel(name) if "_" in name else name)
        if index:
            number = index.rstrip("]")
            steps.append(int(number) if number.isdecimal() else number)
    return tuple(steps)


def _in_camel(problem: str) -> str:
    """The sentence with its field names in camelCase."""
    return " ".join(
        camel(word.rstrip(",")) + "," * word.endswith(",") if "_" in word and word.rstrip(",").isidentifier() else word
        for word in problem.split(" ")
    )
