"""Loading configuration: bad files and values are refused with file, key path and fix."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from agent.config import Duration, Section, Size, bad_key, load
from agent.core.errors import ConfigError


class Gpu(Section, frozen=True):
    driver_workers: int = 2
    max_hold_ns: Duration = Duration(10)
    reserve_bytes: Size = Size(0)
    types: dict[str, str] = {}  # noqa: RUF012 - msgspec copies it

    def __post_init__(self) -> None:
        if self.driver_workers == 13:
            raise bad_key("driver_workers", "must not be 13")


class Node(Section, frozen=True):
    name: str
    gpu: Gpu = Gpu()


class Host(Section, frozen=True):
    gpu: Gpu = Gpu()
    nodes: tuple[Node, ...] = ()
    spare: Gpu | None = None


def problem(document: Mapping[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        load(document, Host)
    assert caught.value.reason == "CONFIG_INVALID"
    return caught.value.message.removeprefix("configuration: ")


def test_an_empty_configuration_is_the_defaults() -> None:
    assert load({}, Host) == Host()


def test_durations_and_sizes_become_integers() -> None:
    host = load({"gpu": {"max_hold": "500ms", "reserve": "2GiB"}}, Host)
    assert host.gpu.max_hold_ns == 500_000_000
    assert host.gpu.reserve_bytes == 2 << 30


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"gpu": {"driver_worker": 3}}, "gpu.driver_worker: unknown key; did you mean gpu.driver_workers?"),
        ({"gpuu": {}}, "gpuu: unknown key; did you mean gpu?"),
        ({"max_hold": "1s"}, "max_hold: unknown key; did you mean gpu.max_hold?"),
        ({"gpu": {"zzz": 1}}, "gpu.zzz: unknown key; known here: driver_workers, max_hold, reserve, types"),
        ({"gpu": {"max_hold_ns": 5}}, "gpu.max_hold_ns: unknown key; did you mean gpu.max_hold?"),
        (
            {"nodes": [{"name": "a", "gpu": {"typos": {}}}]},
            "nodes[0].gpu.typos: unknown key; did you mean nodes[0].gpu.types?",
        ),
        ({"spare": {"wrkrs": 1}}, "spare.wrkrs: unknown key; known here: driver_workers, max_hold, reserve, types"),
        (
            {"a": 1, "b": 2},
            "a: unknown key; known here: gpu, nodes, spare; b: unknown key; known here: gpu, nodes, spare",
        ),
    ],
)
def test_unknown_key_is_refused_with_a_suggestion(document: Mapping[str, object], message: str) -> None:
    assert problem(document) == message


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"gpu": {"driver_workers": "two"}}, "gpu.driver_workers: expected a whole number, got 'two'"),
        ({"gpu": {"driver_workers": None}}, "gpu.driver_workers: expected a whole number, got nothing"),
        ({"gpu": {"driver_workers": 13}}, "gpu.driver_workers: must not be 13"),
        ({"gpu": []}, "gpu: expected a mapping, got a list"),
        ({"nodes": [{}]}, "nodes[0].name: required, but not there"),
        ({"nodes": [{"name": "a", "gpu": {"driver_workers": 13}}]}, "nodes[0].gpu.driver_workers: must not be 13"),
        ({"gpu": {"types": {"ada": 3}}}, "gpu.types[...]: expected text, got a whole number"),
        (
            {"gpu": {"max_hold": 10}},
            "gpu.max_hold: expected a duration with its unit, such as 500ms, 10s, 2m or 1h, got 10 (int)",
        ),
        (
            {"gpu": {"reserve": "2 GiB"}},
            "gpu.reserve: expected a size with its unit, such as 64KiB, 512MiB, 16GiB or 80GB, got '2 GiB'",
        ),
    ],
)
def test_a_wrong_value_is_refused_at_its_key(document: Mapping[str, object], message: str) -> None:
    assert problem(document) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu: {driver_workers: x}\n", "gpu.driver_workers: expected a whole number, got 'x'"),
        ("gpu:\n  driver_workers: 1\n  driver_workers: 2\n", "line 3, column 3: key 'driver_workers' is written twice"),
        ("gpu: [\n", "is not valid YAML: line 2, column 1"),
        ("- a\n- b\n", "must be a mapping of keys to values, found a list"),
        ("just words\n", "must be a mapping of keys to values, found text"),
        ("gpu: !!python/object/apply:os.system [true]\n", "is not valid YAML: line 1, column 6"),
        ("? [1, 2]\n: x\n", "a key must be a plain word"),
        ("gpu: \x00\n", "is not valid YAML"),
    ],
)
def test_a_file_is_named_in_the_error(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "agent.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path, Host)
    assert caught.value.message.startswith(f"{path}: ")
    assert message in caught.value.message
    assert caught.value.metadata["file"] == str(path)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "agent.yaml"
    path.write_text("# nothing yet\n")
    assert load(path, Host) == Host()


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: can't be read: No such file or directory"):
        load(tmp_path / "absent.yaml", Host)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ConfigError, match="is this the right file"):
        load(path, Host)


def test_too_deep_nesting_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "deep.yaml"
    path.write_text("[" * 5_000)
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load(path, Host)


def test_aliases_are_read_but_not_multiplied(tmp_path: Path) -> None:
    """A 'billion laughs' of references stays small in memory and is refused by its shape."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    path = tmp_path / "laughs.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="a0: unknown key"):
        load(path, Host)
