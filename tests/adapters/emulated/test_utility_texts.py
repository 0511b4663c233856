"""The texts of cuda-checkpoint under each driver version, as a table. Most need no driver process."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from agent.emulated.build import SOURCES, build
from agent.emulated.profiles import INSUFFICIENT_DRIVER, PROFILES, STATES, TABLE, find_profile
from tests.adapters.emulated.conftest import StartDriver
from tests.adapters.emulated.harness import RunningDriver

UNSUPPORTED = "Invalid option(s) or option(s) not supported by this CUDA Driver"
NO_DRIVER = 'Error initializing CUDA: "no CUDA-capable device is detected"'
USAGE_ERRORS = {
    (): "No operation selected",
    ("--pid", "1"): "No operation selected",
    ("--toggle",): "Missing pid to perform operation on",
    ("--toggle", "--pid", "-4"): "pid must be a non-negative integer",
    ("--bogus",): UNSUPPORTED,
}
USAGE_ERRORS_OF_ACTIONS = {
    ("--get-state", "--toggle", "--pid", "1"): "Too many operations selected",
    ("--get-state", "--get-restore-tid", "--pid", "1"): "Too many operations selected",
    ("--get-state",): "Missing pid to perform operation on",
    ("--action", "lock", "--pid", "1", "-t", "-4"): "timeout must be a non-negative integer",
    ("--action", "lock", "-p", "1", "--timeout=-4"): "timeout must be a non-negative integer",
    ("--action", "unlock", "--pid", "1", "-t", "5"): "Timeout is only valid for --action lock operation",
    ("--get-state", "--pid", "1", "--timeout", "5"): "Timeout is only valid for --action lock operation",
    ("--action",): UNSUPPORTED,
}
"""From 555 on."""
NOT_FOUND_OUT_BEFORE_INIT = (("--get-state", "--pid", "abc"), ("--action", "bogus", "--pid", "1"))
"""Accepted by the real program until cuInit: its callers must check these."""


def program(build_cache: Path, profile: str) -> Path:
    return build(find_profile(profile), build_cache / "hibernode" / "emulated") / "bin" / "cuda-checkpoint"


def run(path: Path, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run([str(path), *arguments], env={}, capture_output=True, text=True, timeout=20, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("profile", ["550", "555", "570", "580"])
def test_flags_and_texts(build_cache: Path, profile: str) -> None:
    utility = TABLE[profile].utility
    assert utility is not None
    path = program(build_cache, profile)
    code, help_, said = run(path, "--help")
    assert (code, said) == (utility.help_exit, "")
    assert set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", help_)) == utility.flags
    for arguments, text in USAGE_ERRORS.items():
        assert run(path, *arguments) == (utility.error_exit, "", f"{text}\n{help_}"), arguments
    has_actions = "--action" in utility.flags
    for arguments, text in USAGE_ERRORS_OF_ACTIONS.items():
        expected = text if has_actions else UNSUPPORTED
        assert run(path, *arguments) == (utility.error_exit, "", f"{expected}\n{help_}"), arguments
    has_map = "--device-map" in utility.flags
    said = run(path, "--action", "restore", "--pid", "1", "-d", "a=b")[2]
    assert said.splitlines()[0] == (NO_DRIVER if has_map else UNSUPPORTED)
    if has_actions:
        assert run(path, "-h") == (0, help_, "")
        for arguments in NOT_FOUND_OUT_BEFORE_INIT:
            assert run(path, *arguments) == (utility.error_exit, "", NO_DRIVER + "\n"), arguments
    assert run(path, "--toggle", "--pid", "1") == (utility.error_exit, "", NO_DRIVER + "\n")


def test_535_is_insufficient_for_every_command(build_cache: Path) -> None:
    path = program(build_cache, "535")
    for arguments in ((), ("--help",), ("--get-state", "--pid", "1"), ("--toggle", "--pid", "1"), ("--bogus",)):
        assert run(path, *arguments) == (255, "", INSUFFICIENT_DRIVER + "\n")


def test_errors_detected_after_init(driver: RunningDriver) -> None:
    path = driver.directory / "bin" / "cuda-checkpoint"
    assert run(path, "--get-state", "--pid", "abc") == (
        1,
        "",
        'Error getting process state for process ID 0: "invalid argument"\n',
    )
    code, out, said = run(path, "--action", "bogus", "--pid", "1")
    assert (code, out) == (1, "")
    assert said.startswith(UNSUPPORTED + "\n")


@pytest.mark.parametrize(("profile", "text"), [("570", "unknown"), ("580", "failed")])
def test_failed_process(start_driver: StartDriver, profile: str, text: str) -> None:
    driver = start_driver("--profile", profile)
    app = driver.application()
    driver.control.fault("lock", "FAILED", pid=app.pid)
    path = driver.directory / "bin" / "cuda-checkpoint"
    assert run(path, "--action", "lock", "--pid", str(app.pid))[0] == 1
    assert run(path, "--get-state", "--pid", str(app.pid)) == (0, text + "\n", "")


def test_profile_table_matches_the_known_flags() -> None:
    """Flags by driver: from NVIDIA/cuda-checkpoint's README, and the program under 550 and 555."""
    flags = {name: profile.utility.flags for name, profile in TABLE.items() if profile.utility}
    assert flags["550"] == {"--toggle", "--pid", "--help"}
    added = {"--get-state", "--get-restore-tid", "--action", "--timeout", "-t", "-p", "-h"}
    assert flags["555"] == flags["570"] == flags["550"] | added
    assert flags["580"] == flags["570"] | {"--device-map", "-d"}
    assert flags["590"] == flags["595"] == flags["580"] | {"--launch-job", "-j"}
    assert [name for name, profile in TABLE.items() if profile.public_api] == list(TABLE)[3:]
    assert [name for name, profile in TABLE.items() if profile.migration] == list(TABLE)[5:]
    assert list(PROFILES) == ["535", "550", "555", "570", "580"]
    assert all(profile.startable or profile.note for profile in TABLE.values())
    assert STATES[3] == "unknown"


def test_every_text_occurs_once_in_the_source() -> None:
    source = (SOURCES / "cuda_checkpoint.c").read_text()
    for text in (
        *USAGE_ERRORS.values(),
        *USAGE_ERRORS_OF_ACTIONS.values(),
        'Error initializing CUDA: \\"%s\\"\\n',
        'Error toggling CUDA in process ID %d: \\"%s\\"\\n',
        'Error getting process state for process ID %d: \\"%s\\"\\n',
        'Could not %s on process ID %d: \\"%s\\"\\n',
        "Could not find restore thread for process ID %d\\n",
    ):
        assert source.count(text) == 1, text
