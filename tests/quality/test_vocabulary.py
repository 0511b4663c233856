"""Words that programs and people rely on: error reasons and event names are listed, each on one page."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.quality.vocabulary import Vocabulary, collect, listed

REASONS = "agent/docs/reasons.md"
EVENTS = "agent/docs/events.md"
UNREAD = ("agent/v1/", "agent/examples/")
"""Generated code, and functions that users copy."""

NOT_REASONS = {
    # Variables of the environment.
    *(
        "CUDA_DEVICE_ORDER",
        "CUDA_VISIBLE_DEVICES",
        "DOCKER_CONFIG",
        "PCI_BUS_ID",
        "FCGPU_RUNTIME_SHMSIZE",
        "FC_ACCOUNT_ID",
        "FC_CUSTOM_LISTEN_PORT",
    ),
    *("FC_FUNCTION_HANDLER", "FC_FUNCTION_MEMORY_SIZE", "FC_FUNCTION_NAME", "FC_FUNC_CODE_PATH", "FC_INSTANCE_ID"),
    *(
        "FC_REGION",
        "GRPC_ENABLE_FORK_SUPPORT",
        "GRPC_VERBOSITY",
        "HIBERNODE_CARRIED",
        "HIBERNODE_DEBUG",
        "HIBERNODE_DEMO",
    ),
    *("HIBERNODE_HOME", "HIBERNODE_INSTANCE", "LD_LIBRARY_PATH", "LD_PRELOAD", "LISTEN_FDNAMES", "LISTEN_FDS"),
    *("LISTEN_PID", "NOTIFY_SOCKET", "NO_COLOR", "NVIDIA_VISIBLE_DEVICES", "WATCHDOG_USEC", "XDG_CACHE_HOME"),
    # Names of the kernel, of NVML, of a proto and of Python.
    *("CAP_<>", "DAC_OVERRIDE", "NET_BIND_SERVICE", "SYS_ADMIN", "SYS_CHROOT", "SYS_MODULE", "SYS_PTRACE"),
    *(
        "SYS_RAWIO",
        "SYS_RESOURCE",
        "RLIMIT_<>",
        "SC_CLK_TCK",
        "SC_PAGE_SIZE",
        "EXCLUSIVE_PROCESS",
        "KIND_<>",
        "DEFAULT_CAPABILITIES",
    ),
    # Members of enums: states, outcomes, verdicts.
    *("WAITING_GPU", "NOT_BEGUN", "NOT_LOADED", "NOT_RUN", "PAUSED_BY_OTHERS", "RELIST", "TIMED_OUT"),
    *("UNDER_WAY", "GIVEN_UP"),
}
"""Capitals with `_` that are no reasons, and words that only look as if they were given as one."""


def differences(names: set[str], page: str) -> list[str]:
    """What the page lacks, what it lists in vain, and what it lists twice."""
    rows = listed(page)
    found = [f"not listed: {name}" for name in sorted(names - set(rows))]
    found += [f"listed, and not in the code: {name}" for name in sorted(set(rows) - names)]
    return found + [f"listed twice: {name}" for name in sorted({name for name in rows if rows.count(name) > 1})]


def stale(vocabulary: Vocabulary) -> list[str]:
    """What `NOT_REASONS` names in vain."""
    return sorted(NOT_REASONS - set(vocabulary.reasons))


@pytest.fixture(scope="module")
def vocabulary(tracked: list[Path], root: Path) -> Vocabulary:
    paths = {str(path.relative_to(root)): path for path in tracked if path.suffix == ".py"}
    ours = [name for name in sorted(paths) if name.startswith("agent/") and not name.startswith(UNREAD)]
    return collect((name, paths[name].read_text(encoding="utf-8")) for name in ours)


def test_each_reason_is_listed_once(vocabulary: Vocabulary, root: Path) -> None:
    found = differences(set(vocabulary.reasons) - NOT_REASONS, (root / REASONS).read_text(encoding="utf-8"))
    assert not found, f"{REASONS}:\n" + "\n".join(found)
    assert not stale(vocabulary), f"NOT_REASONS names what is not there: {', '.join(stale(vocabulary))}"


def test_each_event_is_listed_once(vocabulary: Vocabulary, root: Path) -> None:
    found = differences(set(vocabulary.events), (root / EVENTS).read_text(encoding="utf-8"))
    assert not found, f"{EVENTS}:\n" + "\n".join(found)


def test_reasons_are_upper_snake_and_events_dotted_lower_case(vocabulary: Vocabulary) -> None:
    assert not vocabulary.wrong, "UPPER_SNAKE for reasons, dotted lower case for events:\n" + "\n".join(
        vocabulary.wrong
    )


# ---- that the tests can fail ----------------------------------------------------------------------------------------

PAGE = "| reason | kind |\n|---|---|\n| `DISK_FULL` | Instance |\n| `XID_<code>` | cordon |\n"


def seen(source: str) -> Vocabulary:
    return collect([("agent/planted.py", source)], ["HibernodeError", "NotFoundError"])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ('raise NotFoundError("NEW_REASON", "text")', "NEW_REASON"),
        ('raise NotFoundError("GONE", "text")', "GONE"),
        ('class OwnError(NotFoundError): ...\nraise OwnError("GONE", "text")', "GONE"),
        ('raise errors.NotFoundError("ONE_WAY" if way else "OTHER", "text")', "OTHER"),
        ('GONE = "GONE"\nraise NotFoundError(GONE, "text")', "GONE"),
        ('why = "GONE"\nraise NotFoundError(why, "text")', "GONE"),
        ('class Reason(Enum):\n    A = "NEW_REASON"', "NEW_REASON"),
        ('return {Lacks.SLOT: "NEW_REASON"}', "NEW_REASON"),
        ('return refused("AWAY", "text")', "AWAY"),
        ('raise HttpError(408, "Code", "LATE", "text")', "LATE"),
        ('raise NotFoundError(f"{step}_TIMEOUT", "text")', "<>_TIMEOUT"),
        ('cordon(f"XID_{code}: {text}")', "XID_<>"),
        ('cordon("KILL_FAILED: an instance survives SIGKILL")', "KILL_FAILED"),
    ],
)
def test_a_reason_is_found_where_it_is_written(source: str, reason: str) -> None:
    kinds = ["HibernodeError", "NotFoundError", "HttpError"]
    assert reason in collect([("agent/planted.py", source)], kinds).reasons


@pytest.mark.parametrize(
    ("source", "event"),
    [
        ('self._log.warning("gpu.lost", gpu=uuid)', "gpu.lost"),
        ('get_logger().info("gpu.lost")', "gpu.lost"),
        ('event = "gpu.lost" if gone else "gpu.found"\n_log.info(event)', "gpu.found"),
        ('self._events.add(uid, "gpu.lost", "text")', "gpu.lost"),
        ('context.events.add(uid, "gpu.lost" if gone else "gpu.found")', "gpu.found"),
        ('self._events.warning("gpu.lost", node=name)', "gpu.lost"),
        ('ev.Note("gpu.lost", "text")', "gpu.lost"),
        ('self._events.add(uid, f"instance.{new.value.lower()}")', "instance.waiting_gpu"),
    ],
)
def test_an_event_is_found_where_it_is_written(source: str, event: str) -> None:
    assert event in seen(source).events


@pytest.mark.parametrize(
    "source",
    [
        'raise NotFoundError("gone", "text")',
        'raise NotFoundError("GoneAway", "text")',
        '_log.info("GPU_LOST")',
        '_log.info("gpu.Lost")',
        '_log.info("lost")',
        'Note("GPU_LOST", "")',
        'self._events.add(uid, "ENGINE_DOWN")',
    ],
)
def test_a_name_of_another_form_is_found(source: str) -> None:
    assert seen(source).wrong


def test_other_calls_and_texts_are_left_alone() -> None:
    found = seen('"""A docstring."""\nself.catalog.add(1, "x.y")\nclick.echo("UPPER")\nraise ValueError("no reason")')
    assert (found.reasons, found.events, found.wrong) == ({}, {}, [])


def test_a_page_that_differs_from_the_code_is_found() -> None:
    assert differences({"DISK_FULL", "XID_<>"}, PAGE) == []
    assert differences({"DISK_FULL", "XID_<>", "NEW_REASON"}, PAGE) == ["not listed: NEW_REASON"]
    assert differences({"XID_<>"}, PAGE) == ["listed, and not in the code: DISK_FULL"]
    assert differences({"DISK_FULL", "XID_<>"}, PAGE + "| `DISK_FULL` | again |\n") == ["listed twice: DISK_FULL"]
