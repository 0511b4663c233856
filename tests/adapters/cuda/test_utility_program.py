"""Tests the arguments and texts of cuda-checkpoint without running it, and which files are trusted to be it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.adapters.cuda.utility_program import arguments_of, error_code, find_utility, read_state
from agent.ports import CudaCall, CudaOp, CudaState

OLD, NEW = "GPU-00112233-4455-6677-8899-aabbccddeeff", "GPU-ffeeddcc-bbaa-9988-7766-554433221100"
HELP = "Usage:\n    --get-state --pid <value>\n    --action lock|checkpoint|restore|unlock --pid <value>\n"
NOISE = 'libjemalloc: "out of memory"\nrunning late\nERROR: ld.so: object "x.so" cannot be preloaded\n'


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        (CudaCall(CudaOp.STATE, 71), "--get-state --pid 71"),
        (CudaCall(CudaOp.LOCK, 71, 2500), "--action lock --pid 71 --timeout 2500"),
        (CudaCall(CudaOp.CHECKPOINT, 71, 2500), "--action checkpoint --pid 71"),
        (CudaCall(CudaOp.RESTORE, 71), "--action restore --pid 71"),
        (
            CudaCall(CudaOp.RESTORE, 71, gpu_map=((OLD, NEW), (NEW, OLD))),
            f"--action restore --pid 71 --device-map {OLD}={NEW},{NEW}={OLD}",
        ),
        (CudaCall(CudaOp.UNLOCK, 71), "--action unlock --pid 71"),
    ],
)
def test_an_operation_is_one_action(call: CudaCall, arguments: str) -> None:
    assert arguments_of(call) == arguments.split()


@pytest.mark.parametrize("op", CudaOp)
def test_no_operation_is_the_toggle(op: CudaOp) -> None:
    """--toggle can't time out the lock, ignores the device map and does two steps at once."""
    assert arguments_of(CudaCall(op, 71))[0] == ("--get-state" if op is CudaOp.STATE else "--action")


@pytest.mark.parametrize("state", [state for state in CudaState if state is not CudaState.NONE])
@pytest.mark.parametrize("noise", ["", NOISE])
def test_state_is_found_between_lines_of_other_libraries(state: CudaState, noise: str) -> None:
    printed = f"{noise}{state.value.lower()}\n{noise}"
    assert read_state(0, printed, noise) == (0, state)


@pytest.mark.parametrize(
    ("code", "output", "error", "expected"),
    [
        (0, "", "", (0, CudaState.UNKNOWN)),
        (0, NOISE, "", (0, CudaState.UNKNOWN)),
        (0, "locked\nrunning\n", "", (0, CudaState.RUNNING)),
        (1, "", 'Error getting process state for process ID 71: "initialization error"', (0, CudaState.NONE)),
        (1, "", 'Error getting process state for process ID 71: "invalid argument"', (0, CudaState.NONE)),
        (1, "", 'Error getting process state for process ID 71: "operation not permitted"', (800, CudaState.UNKNOWN)),
        (1, "running\n", NOISE, (999, CudaState.UNKNOWN)),
        (255, "", "No operation selected\n" + HELP, (999, CudaState.UNKNOWN)),  # driver 550
        (-11, "", "", (999, CudaState.UNKNOWN)),
    ],
)
def test_unknown_text_is_state_unknown(code: int, output: str, error: str, expected: tuple[int, CudaState]) -> None:
    assert read_state(code, output, error) == expected


def test_quoted_text_of_another_library_is_no_result() -> None:
    assert error_code('plugin: "initialization error"') == 999


def _missing(path: Path) -> None:
    path.unlink()


def _not_executable(path: Path) -> None:
    path.chmod(0o600)


def _a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _open_to_its_group(path: Path) -> None:
    path.chmod(0o770)


def _open_to_all(path: Path) -> None:
    path.chmod(0o707)


def _in_an_open_folder(path: Path) -> None:
    path.parent.chmod(0o777)


def _below_an_open_folder(path: Path) -> None:
    path.parent.parent.chmod(0o777)


def _a_loop_of_links(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_missing, "there is no program"),
        (_a_loop_of_links, "there is no program"),
        (_not_executable, "is not an executable file"),
        (_a_folder, "is not an executable file"),
        (_open_to_its_group, "chmod go-w"),
        (_open_to_all, "chmod go-w"),
        (_in_an_open_folder, "chmod go-w"),
        (_below_an_open_folder, "chmod go-w"),
    ],
)
def test_program_that_others_could_replace_is_refused(tmp_path: Path, spoil: Callable[[Path], None], said: str) -> None:
    path = installed(tmp_path)
    assert find_utility(path) == (path, "")
    spoil(path)
    real, problem = find_utility(path)
    assert real is None
    assert said in problem


def installed(folder: Path) -> Path:
    (folder / "opt" / "bin").mkdir(parents=True)
    path = folder / "opt" / "bin" / "cuda-checkpoint"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("owned", ["opt/bin/cuda-checkpoint", "opt/bin", "opt"])
def test_program_of_another_user_is_refused_as_root(tmp_path: Path, owned: str) -> None:
    path = installed(tmp_path)
    os.chown(tmp_path / owned, 4242, -1)
    assert find_utility(path) == (
        None,
        f"{tmp_path / owned} belongs to user 4242, who could replace the program: chown root {tmp_path / owned}",
    )


def test_sticky_folder_is_accepted(tmp_path: Path) -> None:
    path = installed(tmp_path)
    path.parent.chmod(0o1777)  # sticky, as /tmp is
    assert find_utility(path) == (path, "")


def test_link_is_resolved_once_and_its_target_is_run(tmp_path: Path) -> None:
    path = installed(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(path)
    assert find_utility(link) == (path, "")


def test_relative_path_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(installed(tmp_path).parent)
    assert find_utility(Path("cuda-checkpoint"))[0] is None
