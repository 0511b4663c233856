"""`hibernode provision`, and provisionConfig in an s.yaml, with Function Compute's keys and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.cli.commands import provision
from agent.cli.fc3.load import load_s_yaml
from agent.core.errors import PreconditionError
from agent.v1 import function_service_pb2 as pb
from tests.cli.commands.test_node_commands import MINIMAL
from tests.cli.conftest import ROOT, Run
from tests.cli.fc3.test_s_yaml import EXAMPLE

SEED = ROOT / "tests" / "cli" / "fc3" / "provision.json"
POLICY: dict[str, Any] = json.loads(SEED.read_text())["targetTrackingPolicies"][0]
LATER = "2999-07-30T16:00:00.000Z"
ACTION: dict[str, Any] = {
    "name": "morning",
    "startTime": "2026-01-01T00:00:00",
    "endTime": "2027-01-01T00:00:00",
    "target": 5,
    "scheduleExpression": "cron(0 0 8 * * MON-FRI)",
    "timeZone": "Europe/Berlin",
}


def deploy(at_home: Run, tmp_path: Path, name: str) -> None:
    path = tmp_path / "function.yaml"
    path.write_text(MINIMAL.replace("NAME", name))
    assert at_home("deploy", "-t", path, "--target", "0").code == 0


def test_command_of_function_compute(at_home: Run, tmp_path: Path) -> None:
    assert at_home("deploy", "-t", EXAMPLE).code == 0
    for path, text in (
        (SEED, "target 1, 1 now"),
        (active(tmp_path), "target 2 by scaling-policy-demo, 2 now"),
    ):
        done = at_home(
            "provision", "put", "--target", "1", "--targetTrackingPolicies", path, "--qualifier", "LATEST",
            "-t", EXAMPLE, "-a", "default",
        )  # fmt: skip
        assert done.code == 0, done.err
        assert ("scaling-policy-demo: window ended" in done.err) is (path is SEED)
        assert f"gpu-porn-detection provisioned: {text}" in done.err
    header, row = at_home("provision", "list", "gpu-porn-detection").words
    assert header == ["FUNCTION", "TARGET", "CURRENT", "DECIDED", "BY", "SCHEDULES", "POLICIES", "ERROR"]
    assert row[:5] == ["gpu-porn-detection", "2", "2", "scaling-policy-demo", "-"]
    assert " ".join(row[5:]) == f"scaling-policy-demo: target 2, 0.125 of {POLICY['metricTarget']} -"
    found = at_home("provision", "list", "gpu-porn-detection", "--output", "yaml")
    (shown,) = yaml.safe_load(found.out)["gpu-porn-detection"]
    assert shown["functionName"] == "gpu-porn-detection"
    assert shown["qualifier"] == "LATEST"
    assert (shown["target"], shown["current"], shown["currentError"]) == (2, 2, None)
    assert shown["scheduledActions"] is None
    (policy,) = shown["targetTrackingPolicies"]
    assert {**POLICY, "endTime": LATER}.items() <= policy.items()
    assert (policy["active"], policy["metric"]) == (True, 0.125)


def active(tmp_path: Path) -> Path:
    """The same policies, with a window that is not over."""
    path = tmp_path / "active.json"
    path.write_text(json.dumps({"targetTrackingPolicies": [{**POLICY, "endTime": LATER}]}))
    return path


def test_target_0_and_rm_release_everything(at_home: Run, tmp_path: Path) -> None:
    deploy(at_home, tmp_path, "released")
    assert at_home("provision", "put", "released", "--target", "2").code == 0
    done = at_home("provision", "put", "released", "--target", "0", "-o", "json")
    assert done.json["provision"]["target"] == 0
    for _ in range(2):  # there is nothing left to release, and that is no failure
        assert at_home("provision", "rm", "released").code == 0
    assert at_home("provision", "list", "released", "-o", "json").json == {"provisions": []}
    assert at_home("functions", "rm", "released").code == 0
    assert at_home("provision", "rm", "released").code == 3


def test_both_files_and_a_target_in_the_file(at_home: Run, tmp_path: Path) -> None:
    deploy(at_home, tmp_path, "both")
    policies, actions = tmp_path / "policies.json", tmp_path / "actions.yaml"
    policies.write_text(json.dumps({"defaultTarget": 4, "targetTrackingPolicies": [POLICY]}, indent="\t"))
    actions.write_text("scheduledActions:\n  - " + "\n    ".join(f"{key}: {value}" for key, value in ACTION.items()))
    done = at_home(
        "provision", "put", "both", "--target-tracking-policies", policies, "--scheduled-actions", actions,
        "--always-allocate-gpu", "-o", "json",
    )  # fmt: skip
    config = done.json["provision"]["config"]
    assert config["default_target"] == 4
    assert config["always_allocate_gpu"] is True
    assert config["scheduled_actions"][0]["schedule_expression"] == ACTION["scheduleExpression"]
    assert config["target_tracking_policies"][0]["metric_type"] == "PROVISIONED_CONCURRENCY_UTILIZATION"


def test_a_dry_run_changes_nothing(at_home: Run, tmp_path: Path) -> None:
    deploy(at_home, tmp_path, "dry")
    assert "could be provisioned" in at_home("provision", "put", "dry", "--target", "2", "--dry-run").err
    assert at_home("provision", "list", "dry", "-o", "json").json == {"provisions": []}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("put", "--target", "1"), "name the function"),
        (("put", "ocr", "-t", "s.yaml", "--target", "1"), "not both"),
        (("put", "ocr"), "--target is missing"),
        (("put", "ocr", "--target", "10001"), "10001"),
        (("put", "ocr", "--target", "1", "--qualifier", "v1"), "LATEST"),
        (("put", "ocr", "--target", "1", "--targetTrackingPolicies", "nowhere.json"), "nowhere.json can't be read"),
    ],
)
def test_invalid_options_are_refused(at_home: Run, arguments: tuple[str, ...], text: str) -> None:
    done = at_home("provision", *arguments)
    assert done.code == 2
    assert text in done.err


@pytest.mark.parametrize("text", ["", "{}", '{"targetTrackingPolicies": null}', '{"target": 3}'])
def test_policy_file_without_policies_is_refused(at_home: Run, tmp_path: Path, text: str) -> None:
    path = tmp_path / "policies.json"
    path.write_text(text)
    done = at_home("provision", "put", "ocr", "--target", "1", "--targetTrackingPolicies", str(path))
    assert done.code == 2
    assert "[] removes them" in done.err


async def test_wait_continues_on_temporary_errors_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def short(reason: str) -> pb.Provision:
        return pb.Provision(function="ocr", target=2, current=1, current_error="no room", current_error_reason=reason)

    answers = [short("NO_FREE_GPU"), short("NO_FREE_GPU"), pb.Provision(function="ocr", target=2, current=2)]

    async def listed(channel: object, name: str) -> list[pb.Provision]:
        return [answers.pop(0)]

    monkeypatch.setattr(provision, "list_provisions", listed)
    monkeypatch.setattr(provision, "POLL_S", 0.0)
    assert (await provision._wait_for_target(object(), "ocr", 10.0)).current == 2  # type: ignore[arg-type]
    assert capsys.readouterr().err.count("no room") == 1
    answers.append(short("IMAGE_RUNTIME_UNAVAILABLE"))
    with pytest.raises(PreconditionError):
        await provision._wait_for_target(object(), "ocr", 10.0)  # type: ignore[arg-type]


def test_unknown_function_is_exit_3(at_home: Run) -> None:
    assert at_home("provision", "put", "nobody", "--target", "1").code == 3


BAD_POLICIES = [
    ({"name": ""}, "name", "printable"),
    ({"startTime": "yesterday"}, "startTime", "yesterday"),
    ({"endTime": "2024-07-01T15:00:00.000Z"}, "endTime", "later than startTime"),
    ({"metricType": "CPUUtilisation"}, "metricType", "CPUUtilisation"),
    ({"metricTarget": 0}, "metricTarget", "0"),
    ({"metricTarget": 1.1}, "metricTarget", "1"),
    ({"metricTarget": "much"}, "metricTarget", "above 0, at most 1, got 'much'"),
    ({"minCapacity": 0}, "minCapacity", "1"),
    ({"maxCapacity": 10_001}, "maxCapacity", "10000"),
    ({"maxCapacity": 1}, "maxCapacity", "minCapacity"),
    ({"timeZone": "Mars/Olympus"}, "timeZone", "Mars/Olympus"),
    ({"minCapcity": 2}, "minCapcity", "minCapacity"),
]
BAD_ACTIONS = [
    ({"target": -1}, "target", "0"),
    ({"target": 10_001}, "target", "10000"),
    ({"scheduleExpression": "cron(0 0 25 * * *)"}, "scheduleExpression", ""),
    ({"scheduleExpression": "cron(0 8 * * *)"}, "scheduleExpression", ""),
    ({"scheduleExpression": "every day"}, "scheduleExpression", ""),
    ({"scheduleExpression": "at(2031-01-01T00:00:00)"}, "scheduleExpression", "never fires"),
    ({"timeZone": "Europe/Berlln"}, "timeZone", "Europe/Berlln"),
    ({"endTime": None}, "endTime", ""),
]


@pytest.mark.parametrize(
    ("kind", "good", "change", "key", "text"),
    [("targetTrackingPolicies", POLICY, *bad) for bad in BAD_POLICIES]
    + [("scheduledActions", ACTION, *bad) for bad in BAD_ACTIONS],
)
def test_invalid_field_names_file_line_and_key_and_sends_nothing(
    at_home: Run, tmp_path: Path, kind: str, good: dict[str, Any], change: dict[str, Any], key: str, text: str
) -> None:
    entry = good | change
    for name, value in change.items():
        if value is None:
            del entry[name]
    path = tmp_path / "provision.json"
    path.write_text(json.dumps({kind: [entry]}, indent=2))
    option = "--targetTrackingPolicies" if kind == "targetTrackingPolicies" else "--scheduledActions"
    done = at_home("provision", "put", "refused", "--target", "1", option, path)
    assert done.code == 2
    line = next(
        (number for number, one in enumerate(path.read_text().splitlines(), 1) if f'"{key}"' in one), 3
    )  # the line of the entry without the key
    assert f"provision.json:{line}: {kind}[0]" in done.err, done.err
    assert key in done.err
    assert text in done.err
    assert at_home("provision", "list", "refused", "-o", "json").json == {"provisions": []}

    in_s_yaml = tmp_path / "s.yaml"
    in_s_yaml.write_text(
        MINIMAL.replace("NAME", "refused")
        + "      provisionConfig:\n        defaultTarget: 1\n"
        + f"        {kind}: {json.dumps([entry])}\n"
    )
    done = at_home("deploy", "-t", in_s_yaml)
    assert done.code == 2
    assert f"props.provisionConfig.{kind}[0]" in done.err, done.err


def test_repeated_policy_name_is_refused(at_home: Run, tmp_path: Path) -> None:
    path = tmp_path / "provision.json"
    path.write_text(json.dumps({"targetTrackingPolicies": [POLICY, POLICY]}, indent=2))
    done = at_home("provision", "put", "twice", "--target", "1", "--targetTrackingPolicies", path)
    assert done.code == 2
    assert "targetTrackingPolicies[1].name: 'scaling-policy-demo' is there twice" in done.err


def test_s_yaml_sets_or_keeps_the_provisioning(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(MINIMAL.replace("NAME", "day") + "      hibernode: {nodeLabels: {zone: 1a, disk: 07}}\n")
    (plain,) = load_s_yaml(path)
    assert plain.provision is None
    assert plain.function.node_labels == (("disk", "07"), ("zone", "1a"))
    config = {"defaultTarget": 1, "scheduledActions": [ACTION], "targetTrackingPolicies": [POLICY]}
    path.write_text(MINIMAL.replace("NAME", "day") + f"      provisionConfig: {json.dumps(config)}\n")
    (full,) = load_s_yaml(path)
    assert full.provision is not None
    assert full.target == 1
    assert full.provision.scheduled_actions[0].time_zone == "Europe/Berlin"
    assert full.provision.target_tracking_policies[0].max_capacity == 30
