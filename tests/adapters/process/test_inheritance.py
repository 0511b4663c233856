"""What a process gets from an agent with peculiar state, row by row of agent/docs/internals/workload.md."""

from __future__ import annotations

import json
import os
import pwd
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from agent.adapters.engine.container_config import container_config
from agent.adapters.engine.gpus import Attachment
from agent.adapters.process.launch import make_plan
from agent.core.function_rules import HOST_IMAGE
from tests.adapters.engine.starts import GPU_A, plan_options, start_spec
from tests.adapters.process.burdened_agent import OPEN_FILES_AT_START, SECRETS, UID

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "agent/docs/internals/workload.md"
SYSTEM_PYTHON = "/usr/bin/python3"
ORDINARY_DUMPABLE = 1
NONE = "0" * 16


@dataclass(frozen=True)
class Found:
    """`workload` and `agent` have the probe's keys, `status` is the workload's /proc/PID/status. `user`: functions run
    as another user than the agent."""

    workload: Mapping[str, Any]
    agent: Mapping[str, Any]
    status: Mapping[str, str]
    folder: Path
    user: bool
    cgroups: bool


def run_agent(folder: Path, world: str) -> Found:
    folder.chmod(0o711 if world == "user" else 0o777)
    for parent in folder.parents:
        if parent.stat().st_uid == os.geteuid() and parent.stat().st_mode & 0o077 == 0:
            parent.chmod(0o711)  # pytest's folders are closed to other users
    is_root = os.geteuid() == 0
    python = SYSTEM_PYTHON if is_root else sys.executable
    if not Path(python).exists():
        pytest.skip(f"there is no {python}, which other users than root can run")
    command = [sys.executable, "-m", "tests.adapters.process.burdened_agent", str(folder), world, python]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["code"] == 0, told["workload"]
    status, _, probed = told["workload"].partition("\n\n")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    stripped = {name: value.strip() for name, value in fields.items()}
    return Found(json.loads(probed), told["agent"], stripped, folder, world == "user" and is_root, told["cgroups"])


@pytest.fixture(scope="module", params=["user", "own"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_agent(tmp_path_factory.mktemp(request.param), request.param)


def limits(found: Found) -> None:
    """Only the soft limit of open files differs, which the agent had raised."""
    expected = {**found.agent["limits"]}
    _soft, hard = expected["RLIMIT_NOFILE"]
    expected["RLIMIT_NOFILE"] = expected["RLIMIT_OFILE"] = [OPEN_FILES_AT_START, hard]
    assert found.workload["limits"] == expected


def signals(found: Found) -> None:
    assert (found.status["SigIgn"], found.status["SigBlk"]) == (NONE, NONE)


def umask(found: Found) -> None:
    assert (found.agent["umask"], found.workload["umask"]) == (0o077, 0o022)


def descriptors(found: Found) -> None:
    log = str(found.folder / f"state/logs/{UID}.log")
    own = {number: path for number, path in found.workload["descriptors"].items() if not path.startswith("/proc/")}
    assert own.keys() == {"0", "1", "2"}
    assert own["0"] == "/dev/null"
    assert own["1"] == own["2"]
    assert Path(own["1"]).name == Path(log).name
    assert len(found.agent["descriptors"]) >= 6, "the agent has some to leak"


def environment(found: Found) -> None:
    assert not found.workload["environment"].keys() & SECRETS.keys()
    known = {name for name, _cells in variables()} | {"MINE", "PWD"}
    assert found.workload["environment"].keys() <= known


def login(found: Found) -> None:
    name = pwd.getpwuid(found.workload["ids"][0]).pw_name
    told = found.workload["environment"]
    assert (told["USER"], told["LOGNAME"]) == (name, name)
    assert Path(told["HOME"]).samefile(found.workload["folder"]) if Path(told["HOME"]).exists() else True


def folder(found: Found) -> None:
    assert found.workload["folder"] == str(found.folder / f"state/instances/{UID}/scratch")


def identity(found: Found) -> None:
    ids = found.workload["ids"]
    assert ids[:3] == [ids[0]] * 3
    assert ids[3:] == [ids[3]] * 3
    if found.user:
        nobody = pwd.getpwnam("nobody")
        assert (ids[0], ids[3]) == (nobody.pw_uid, nobody.pw_gid)
        assert found.workload["groups"] == sorted(os.getgrouplist("nobody", nobody.pw_gid))
    else:
        assert (ids, found.workload["groups"]) == (found.agent["ids"], found.agent["groups"])


def capabilities(found: Found) -> None:
    sets = [found.status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")]
    assert sets == [NONE] * 4
    assert found.status["NoNewPrivs"] == "1"
    assert not found.user or found.status["CapBnd"] == NONE


def securebits(found: Found) -> None:
    assert found.workload["securebits"] == found.agent["securebits"]


def dumpable(found: Found) -> None:
    assert found.workload["dumpable"] == ORDINARY_DUMPABLE


def keyring(found: Found) -> None:
    if found.agent["keyring"] > 0:
        assert found.workload["keyring"] != found.agent["keyring"]


def oom(found: Found) -> None:
    assert found.workload["oom_score_adj"] == max(0, found.agent["oom_score_adj"])


def nice(found: Found) -> None:
    assert found.workload["nice"] == max(0, found.agent["nice"])


def policy(found: Found) -> None:
    assert found.workload["policy"] == os.SCHED_OTHER


def io_class(found: Found) -> None:
    assert found.workload["io_class"] in {0, 2}, "none or best effort"


def affinity(found: Found) -> None:
    assert found.workload["affinity"] == found.agent["affinity"]


def timer_slack(found: Found) -> None:
    assert found.workload["timer_slack"] == found.agent["timer_slack"]


def session(found: Found) -> None:
    assert found.workload["session"] == [True, 0]
    assert found.workload["parent_death_signal"] == 0


def own_cgroup(found: Found) -> None:
    assert not found.cgroups or UID in found.workload["cgroup"]


ROWS: dict[str, Callable[[Found], None]] = {
    "resource limits": limits,
    "signals": signals,
    "umask": umask,
    "descriptors": descriptors,
    "environment": environment,
    "login name": login,
    "working folder": folder,
    "user and groups": identity,
    "capabilities": capabilities,
    "securebits": securebits,
    "dumpable": dumpable,
    "session keyring": keyring,
    "OOM score": oom,
    "nice": nice,
    "scheduling policy": policy,
    "I/O priority": io_class,
    "CPU affinity": affinity,
    "timer slack": timer_slack,
    "session and terminal": session,
    "cgroup": own_cgroup,
}


@pytest.mark.parametrize("row", ROWS)
def test_row(found: Found, row: str) -> None:
    ROWS[row](found)


def table(heading: str) -> list[list[str]]:
    """The rows of the table under a heading of the page, without its first two lines."""
    text = PAGE.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_instances_get_the_soft_limit_that_the_agent_was_started_with(tmp_path: Path) -> None:
    program = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (300, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from agent.daemons.engine_layer import process_settings
from agent.daemons.process import _allow_open_files
from agent.settings import AgentConfig
_allow_open_files(10)
assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 300
print(process_settings(AgentConfig(state_dir="/x"), "u", None).open_files)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "300\n", done.stderr


def test_page_has_these_rows() -> None:
    assert [row[0] for row in table("Processes of the host")] == list(ROWS)


def variables() -> list[tuple[str, list[str]]]:
    return [(name, row[1:]) for row in table("Variables") for name in re.findall(r"`([A-Z_]+)`", row[0])]


CASES = [(name, column, cells[column]) for name, cells in variables() for column in range(3)]


@pytest.mark.parametrize(("name", "column", "cell"), CASES)
def test_variable_is_whose_the_page_says(name: str, column: int, cell: str) -> None:
    """Columns: a process of the host, a container that sees every GPU, one that sees only its own."""
    own = start_spec(gpus=(GPU_A,), environment={name: "own"}, ours={"FC_REGION": "x", "LD_LIBRARY_PATH": "/node"})
    spec = replace(own, gpu_numbers=(4,))
    if column == 0:
        function = replace(spec.instance.function, image=HOST_IMAGE)
        spec = replace(spec, instance=replace(spec.instance, function=function))
        found = dict(make_plan(spec, port=1, folder=Path("/"), user=None, state_uuid="u").environment)
    else:
        options = plan_options(attachment=Attachment("cdi", sees_all_gpus=column == 1))
        found = dict(entry.split("=", 1) for entry in container_config(spec, options)["Env"])
    whose = {"own": "function", "/node:own": "both"}.get(found[name], "ours")
    assert cell.partition(":")[0] == whose


def test_every_variable_of_ours_is_on_the_page() -> None:
    spec = replace(start_spec(gpus=(GPU_A,)), gpu_numbers=(4,))
    plan = make_plan(spec, port=1, folder=Path("/"), user=None, state_uuid="u")
    container = {entry.partition("=")[0] for entry in container_config(spec, plan_options())["Env"]}
    listed = {name for name, _cells in variables()}
    assert plan.environment.keys() | container <= listed
    assert listed - plan.environment.keys() - container == {"LD_LIBRARY_PATH"}
