"""Commands that call the scheduler: functions, usage, the fleet's nodes and instances."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from agent.cli.commands.deploy import spec_to_proto
from agent.cli.commands.logs_events import _message
from agent.cli.fc3.load import load_s_yaml
from agent.v1.types_pb2 import Event, FunctionSpec
from tests.cli.commands.test_node_commands import MINIMAL
from tests.cli.conftest import Run
from tests.cli.fc3.test_s_yaml import EXAMPLE


@pytest.fixture
def s_yaml(tmp_path: Path) -> Path:
    return tmp_path / "s.yaml"


def name_it(path: Path, name: str, more: str = "") -> Path:
    path.write_text(MINIMAL.replace("NAME", name) + more)
    return path


def test_deploy_prints_the_url_on_stdout_and_the_rest_on_stderr(at_home: Run) -> None:
    done = at_home("deploy", "-t", EXAMPLE)
    assert done.code == 0
    assert done.out.startswith("http://127.0.0.1:")
    assert done.out.endswith("/fn/gpu-porn-detection/\n")
    assert "warning: gpu-best-practice.s.yaml:26: resources.gpu-best-practive.props.internetAccess" in done.err
    assert "gpu-porn-detection deployed: revision 1, target 1, PROVISIONING" in done.err


def test_deploy_sends_only_keys_of_the_file(s_yaml: Path) -> None:
    """The scheduler has defaults of its own for the rest."""
    sent = spec_to_proto(load_s_yaml(name_it(s_yaml, "plain"))[0])
    assert not sent.HasField("queue_length")
    assert not sent.HasField("queue_timeout_ns")
    assert sent.dispatch == FunctionSpec.DISPATCH_UNSPECIFIED
    more = "      hibernode: {dispatch: spread, queueLength: 1}\n"
    sent = spec_to_proto(load_s_yaml(name_it(s_yaml, "plain", more))[0])
    assert (sent.queue_length, sent.dispatch) == (1, FunctionSpec.DISPATCH_SPREAD)


def test_deploy_without_a_number_keeps_the_target(at_home: Run, s_yaml: Path) -> None:
    def target(*arguments: str) -> int:
        answer = at_home("deploy", "-t", s_yaml, "-o", "json", *arguments).json["functions"][0]["target"]
        assert isinstance(answer, int)
        return answer

    name_it(s_yaml, "keeper")
    assert target() == 1
    assert target("--target", "3") == 3
    assert target() == 3
    name_it(s_yaml, "keeper", "      provisionConfig: {defaultTarget: 2}\n")
    assert target() == 2
    assert target("--target", "0") == 0


def test_a_dry_run_deploys_nothing(at_home: Run, s_yaml: Path) -> None:
    done = at_home("deploy", "-t", name_it(s_yaml, "dry"), "--dry-run")
    assert (done.code, done.out) == (0, "")
    assert "dry could be deployed" in done.err
    assert at_home("functions", "show", "dry").code == 3


def test_deploy_and_wait(at_home: Run, s_yaml: Path) -> None:
    done = at_home("deploy", "-t", name_it(s_yaml, "slow"), "--wait", "-o", "json")
    assert done.json["functions"][0]["state"] == "READY"
    done = at_home("deploy", "-t", name_it(s_yaml, "hopeless"), "--wait")
    assert done.code == 4
    assert done.out.endswith("/fn/hopeless/\n")  # it is deployed
    assert "hibernode: hopeless: no node runs images (IMAGE_RUNTIME_UNAVAILABLE)" in done.err
    done = at_home("deploy", "-t", name_it(s_yaml, "late"), "--wait", "--timeout", "0.1")
    assert done.code == 5
    assert "(DEPLOY_TIMEOUT)" in done.err


def test_functions_are_listed_shown_and_removed(at_home: Run, s_yaml: Path) -> None:
    for name in ("fn-a", "fn-b", "fn-c"):
        at_home("deploy", "-t", name_it(s_yaml, name), "--target", "2")
    listed = at_home("functions")
    assert {"fn-a", "fn-b", "fn-c"} <= {line[0] for line in listed.words}
    assert {"fn-a", "fn-b", "fn-c"} <= {one["name"] for one in at_home("functions", "-o", "json").json["functions"]}
    assert at_home("functions", "list", "-o", "json").json == at_home("functions", "-o", "json").json
    assert "0 of 2, 0 awake" in at_home("functions", "show", "fn-a").out
    assert "2 of 2, 0 awake" in at_home("functions", "show", "fn-a").out
    assert at_home("functions", "show", "fn-a", "-o", "json").json["target"] == 2
    done = at_home("functions", "rm", "fn-a")
    assert (done.code, done.out) == (0, "")
    assert at_home("functions", "show", "fn-a").code == 3
    assert at_home("functions", "rm", "fn-a").code == 3


def test_usage_as_a_table(at_home: Run) -> None:
    done = at_home("usage")
    assert [line[0] for line in done.words] == ["FUNCTION", "chat", "ocr", "tts", "TOTAL"]
    assert "COST (CU)" in done.out
    assert "50.8 % saved" in done.out
    assert [line[0] for line in at_home("usage", "--function", "ocr").words] == ["FUNCTION", "ocr", "TOTAL"]
    assert at_home("usage", "--by", "instance").words[0][:2] == ["INSTANCE", "NODE"]


def test_costs_can_be_recomputed_from_the_json(at_home: Run) -> None:
    found = at_home("usage", "-o", "json").json
    total = Decimal(0)
    for row in found["rows"]:
        factors = {name: Decimal(value) for name, value in row["factors"].items() if value and name != "valid_from"}
        cost = (
            Decimal(row["gpu_active_gib_s"]) * factors["gpu_active"]
            + Decimal(row["gpu_idle_gib_s"]) * factors["gpu_idle"]
            + Decimal(row["vcpu_active_s"]) * factors["vcpu_active"]
            + Decimal(row["vcpu_idle_s"]) * factors["vcpu_idle"]
            + Decimal(row["memory_gib_s"]) * factors["memory"]
            + Decimal(row["disk_gib_s"]) * factors["disk"]
            + row["invocations"] * factors["invocation"]
        )
        assert cost == Decimal(row["cost"])
        total += cost
    assert total == Decimal(found["total_cost"])
    assert sum(window["active_ns"] for window in found["windows"]) == 60_000_000_000
    assert at_home("usage", "-o", "json", "--no-windows").json["windows"] == []


def test_the_nodes_own_ledger(at_home: Run) -> None:
    done = at_home("usage", "--local")
    assert [line[1] for line in done.words[1:]] == ["0", "1", "2"]
    assert [line[-1] for line in done.words[1:]] == ["4", "4", "open"]
    windows = at_home("usage", "--local", "-o", "json").json["windows"]
    assert [window["end_mono_ns"] for window in windows[:2]] == [window["start_mono_ns"] for window in windows[1:]]


def test_nodes_and_instances_of_the_fleet(at_home: Run) -> None:
    assert [line[:2] for line in at_home("node", "--fleet").words[1:]] == [
        ["gpu-host-1", "READY"],
        ["gpu-host-2", "LOST"],
    ]
    assert [one["state"] for one in at_home("node", "--fleet", "-o", "json").json["nodes"]] == ["READY", "LOST"]
    assert [line[:2] for line in at_home("ps", "--fleet").words[1:]] == [
        ["gpu-host-1", "i-run"],
        ["gpu-host-1", "i-cold"],
        ["gpu-host-1", "i-chat"],
    ]


def test_events_of_the_fleet(at_home: Run, s_yaml: Path) -> None:
    done = at_home("events", "--fleet", "--node", "gpu-host-2")
    assert (done.code, done.out.splitlines()[0].split()) == (
        0,
        ["TIME", "LEVEL", "FUNCTION", "NODE", "INSTANCE", "EVENT", "MESSAGE"],
    )
    assert done.words[1][2:] == ["WARNING", "-", "gpu-host-2", "-", "fleet.node_lost", "silent_ms=10000"]
    listed = at_home("events", "--fleet", "-o", "json").json["events"]
    assert [one["name"] for one in listed][:3] == ["fleet.node_lost", "fleet.node_registered", "fleet.node_heard"]
    assert (listed[0]["level"], listed[0]["attributes"]["node"], listed[0]["count"]) == ("WARNING", "gpu-host-2", 1)
    at_home("deploy", "-t", name_it(s_yaml, "told"))
    at_home("deploy", "-t", name_it(s_yaml, "untold"))
    done = at_home("events", "--fleet", "--function", "told")
    assert [line[2:] for line in done.words[1:]] == [
        ["INFO", "told", "-", "-", "function.deployed", "revision=1", "target=1"]
    ]
    assert at_home("events", "--fleet", "--since", "10m", "-o", "json").json == {"events": []}


def test_events_say_how_often_the_same_one_happened() -> None:
    event = Event(message="no room", attributes={"reason": "GPU_CAPACITY", "node": "gpu-1"}, count=57)
    event.first_time.FromSeconds(1_767_225_600)
    assert _message(event, ["node"]).startswith("no room reason=GPU_CAPACITY (57 times since 20")
    event.count = 1
    assert _message(event) == "no room node=gpu-1 reason=GPU_CAPACITY"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--function", "ocr"], "--function chooses among the events of the scheduler; add --fleet"),
        (["--node", "gpu-1"], "--node chooses among the events of the scheduler; add --fleet"),
        (["--fleet", "i-3f9a"], "events of an instance are on its node; leave out --fleet"),
    ],
)
def test_an_event_has_one_place_where_it_is_asked_for(run: Run, arguments: list[str], text: str) -> None:
    done = run("events", *arguments)
    assert (done.code, text in done.err) == (2, True)
