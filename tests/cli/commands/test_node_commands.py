"""Commands that call the agent of one node: tables, JSON, exit codes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from agent.cli.console.units import wall_ns
from agent.core.types import SECOND_NS
from agent.v1.types_pb2 import Instance
from agent.wire.convert_time import time_to_proto
from tests.cli.conftest import Run

MINIMAL = """\
edition: 3.0.0
resources:
  ocr:
    component: fc3
    props:
      functionName: NAME
      runtime: custom-container
      gpuConfig: {}
      environmentVariables: {PASSWORD: hunter2}
      customContainerConfig: {image: host, entrypoint: [serve]}
"""


@pytest.fixture
def s_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "s.yaml"
    path.write_text(MINIMAL.replace("NAME", "ocr"))
    return path


def create(at_home: Run, s_yaml: Path) -> str:
    """The uid of a new instance; the caller removes it, because the fake daemons outlive a test."""
    done = at_home("create", "-t", s_yaml)
    assert done.code == 0, done.err
    return done.out.strip()


def test_ps_reads_all_pages_and_shows_states(at_home: Run) -> None:
    done = at_home("ps")
    assert (done.code, done.err) == (0, "")
    assert done.words[0][:5] == ["UID", "FUNCTION", "STATE", "SINCE", "IN"]
    assert [line[0] for line in done.words[1:]] == ["i-run", "i-cold", "i-chat"]
    assert "1+2" in done.words[1]
    assert "850ms" in done.words[2]
    assert done.out.splitlines()[3].endswith("HOST_MEMORY_SHORT")


def test_ps_json_has_the_names_of_the_protos(at_home: Run) -> None:
    found = at_home("ps", "--output", "json").json["instances"]
    assert [one["uid"] for one in found] == ["i-run", "i-cold", "i-chat"]
    assert found[1]["state"] == "FROZEN"
    assert found[1]["frozen_bytes"] == 5 << 30
    assert found[1]["last_wake"] == {"total_ns": 850_000_000, "driver_ns": 800_000_000}
    assert found[0]["spec"]["environment"] == {"KEY": "***"}


def test_ps_filters(at_home: Run) -> None:
    assert at_home("ps", "-q", "--function", "chat").out == "i-chat\n"
    assert {"i-run", "i-cold", "i-chat", "i-dead"} <= set(at_home("ps", "-q", "-a").out.split())
    assert at_home("ps", "-q", "--function", "nothing").out == ""
    assert at_home("ps", "--function", "nothing", "-o", "json").json == {"instances": []}


def test_ps_names_who_holds_the_gpu_that_an_instance_waits_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the holder is of a function that is not shown."""
    now = time_to_proto(wall_ns() - 75 * SECOND_NS)
    waits = Instance(uid="i-waits", function="ocr", state=Instance.STATE_WAITING_GPU, gpu_uuids=["g1"], state_time=now)
    holds = Instance(uid="i-holds", function="chat", state=Instance.STATE_RUNNING, gpu_uuids=["g1"], state_time=now)
    monkeypatch.setattr("agent.cli.commands.ps.with_agent", lambda operation, doing: [waits, holds])
    (line,) = run("ps", "--function", "ocr").out.splitlines()[1:]
    assert "its GPU is held by i-holds of chat, RUNNING for 75 s" in line


def test_node(at_home: Run) -> None:
    done = at_home("node")
    assert ["Node", "gpu-host-1"] in done.words
    assert "5.0 GiB reserved for frozen instances" in done.out
    assert next(line[:4] for line in done.words if line[:1] == ["0"]) == ["0", "Emulated", "T4", "GPU-aaaa"]
    assert "CORDONED" in done.out
    assert "37%" in done.out
    assert "62 W" in done.out
    assert ["1", "XID_79:", "the", "GPU", "has", "fallen", "off", "the", "bus"] in done.words
    unknown = next(line for line in done.words if line[:1] == ["1"])
    assert unknown.count("-") >= 7, "unknown is not 0"
    found = at_home("node", "-o", "json").json
    assert found["gpus"][0]["holder_uids"] == ["i-run"]
    assert found["host_memory"]["reserved_bytes"] == 5 << 30


def test_inspect(at_home: Run) -> None:
    done = at_home("inspect", "i-cold")
    assert next(line[:3] for line in done.words if line[:1] == ["State"]) == ["State", "FROZEN", "since"]
    assert "7 (last: 850ms, 800ms of it the driver's)" in done.out
    assert at_home("inspect", "i-cold", "-o", "json").json["wake_count"] == 7


def test_text_of_an_instance_cannot_control_the_terminal(at_home: Run) -> None:
    done = at_home("inspect", "i-evil")
    assert "\x1b" not in done.out
    assert "\x07" not in done.out
    assert "?]0;owned??[2J" in done.out


def test_freeze_wake_and_rm_show_the_result(at_home: Run, s_yaml: Path) -> None:
    assert at_home("freeze", "i-chat", "-o", "json").json["instances"][0]["state"] == "FROZEN"
    assert at_home("wake", "i-chat", "--hold", "30s", "-o", "json").json["instances"][0]["state"] == "RUNNING"
    done = at_home("rm", create(at_home, s_yaml), create(at_home, s_yaml), "--force")
    assert (done.code, [line[2] for line in done.words[1:]]) == (0, ["STOPPED", "STOPPED"])


def test_several_uids_succeed_independently_and_first_failure_is_the_exit(at_home: Run) -> None:
    done = at_home("freeze", "i-run", "i-cold", "i-gone")
    assert done.code == 4
    assert [line[0] for line in done.words[1:]] == ["i-cold"]
    assert "hibernode: instance i-run was not frozen: it is in use (NOT_IDLE)" in done.err
    assert "hibernode: i-gone: no instance is called 'i-gone' on this node" in done.err
    assert at_home("freeze", "i-gone", "i-run").code == 3


def test_unknown_instance_is_exit_3(at_home: Run) -> None:
    done = at_home("inspect", "i-gone")
    assert (done.code, done.out) == (3, "")
    assert (
        done.err
        == "hibernode: no instance is called 'i-gone' on this node; `hibernode ps` lists them (INSTANCE_NOT_FOUND)\n"
    )


def test_timeout_is_exit_5_after_a_progress_line(at_home: Run) -> None:
    done = at_home("wake", "i-stuck", "--timeout", "1.3")
    assert done.code == 5
    assert done.err.startswith("waking i-stuck ... (1 s)\n")
    assert "(DEADLINE_EXCEEDED)" in done.err


def test_logs_are_unchanged_in_a_pipe(program: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run([*program, "logs", "i-run"], env=environment, capture_output=True, timeout=30, check=True)
    assert done.stdout == b"Loading model\n\xff not UTF-8\n"


def test_events(at_home: Run) -> None:
    done = at_home("events", "i-cold")
    assert [line[3] for line in done.words[1:]] == ["instance.created", "instance.running", "instance.frozen"]
    assert at_home("events", "i-dead", "-o", "json").json == {"events": []}
    assert at_home("events", "i-gone").code == 3
    assert at_home("events", "--since", "10m", "-o", "json").json == {"events": []}
    assert at_home("events", "-o", "json").json["events"][0]["time"] == "2026-01-01T00:00:00.005Z"


def test_create_prints_the_uid_alone(at_home: Run, s_yaml: Path) -> None:
    done = at_home("create", "-t", s_yaml)
    uid = done.out.strip()
    assert (done.code, done.out, done.err) == (0, f"{uid}\n", f"{uid} of ocr: STARTING\n")
    found = at_home("create", "-t", s_yaml, "-o", "json").json
    assert found["spec"]["entrypoint"] == ["serve"]
    assert found["spec"]["environment"] == {"PASSWORD": "***"}
    assert at_home("logs", found["uid"]).out == "PASSWORD=hunter2\n", "it was sent in the clear"
    assert found["request_id"].startswith("cli-")
    again = at_home("create", "-t", s_yaml, "-o", "json").json
    assert again["request_id"] != found["request_id"]  # every create is a new one
    mine = at_home("create", "-t", s_yaml, "-o", "json", "--request-id", "mine").json
    assert mine["request_id"] == "mine"
    assert at_home("create", "-t", s_yaml, "--request-id", "mine").out == f"{mine['uid']}\n"
    assert at_home("rm", uid, found["uid"], again["uid"], mine["uid"]).code == 0
    assert at_home("ps", "-q").out.split() == ["i-run", "i-cold", "i-chat"]


def test_create_that_fails_is_exit_1_with_the_reason(at_home: Run, s_yaml: Path) -> None:
    s_yaml.write_text(MINIMAL.replace("NAME", "broken"))
    done = at_home("create", "-t", s_yaml, "--wait", "--request-id", "it-breaks")
    failed = done.out.strip()
    assert (done.code, done.out) == (1, f"{failed}\n")
    assert f"{failed} of broken: FAILED; `hibernode logs {failed}` shows what it printed" in done.err
    assert "port 9000 never answered (FUNCTION_NOT_STARTED)" in done.err
    done = at_home("create", "-t", s_yaml, "--request-id", "it-breaks")
    uid = done.out.strip()
    assert (done.code, uid) == (1, failed)
    assert f"{uid}: port 9000 never answered (FUNCTION_NOT_STARTED)" in done.err


def test_create_requires_one_function(at_home: Run, s_yaml: Path) -> None:
    s_yaml.write_text(s_yaml.read_text() + MINIMAL.partition("resources:\n")[2].replace("ocr", "two"))
    done = at_home("create", "-t", s_yaml)
    assert done.code == 2
    assert "choose one with --resource: ocr, two" in done.err
    done = at_home("create", "-t", s_yaml, "--resource", "two")
    assert done.code == 0
    assert at_home("rm", done.out.strip()).code == 0


def test_invalid_s_yaml_is_exit_2_without_a_call(run: Run, s_yaml: Path) -> None:
    s_yaml.write_text(s_yaml.read_text().replace("gpuConfig: {}", "timeout: often"))
    done = run("create", "-t", s_yaml)
    assert done.code == 2
    assert (
        "s.yaml:8: resources.ocr.props.timeout: expected a whole number from 1 to 86400, got 'often' (S_YAML_INVALID)"
        in done.err
    )
