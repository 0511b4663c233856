"""The example files: each value, and each alternative that a comment names, is taken as a user would write it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from agent.config import Section, load, parse_duration_ns, parse_size_bytes
from agent.core.errors import ConfigError
from agent.settings import AgentConfig, SchedulerConfig
from agent.settings.prices import read_price_book

SYSTEMD = Path(__file__).parents[2] / "systemd"
AGENT, SCHEDULER = SYSTEMD / "agent.example.yaml", SYSTEMD / "scheduler.example.yaml"
KINDS: dict[Path, type[Section]] = {AGENT: AgentConfig, SCHEDULER: SchedulerConfig}

_LINE = re.compile(r"(?P<lead> *(?:- )?)(?P<key>\w+):(?P<value> .*)?")
_EXPLAINED = re.compile(r"(?:^|[.;] )([a-z][a-z-]*): ")
_EQUALS = re.compile(r"(\"\"|\b\d+) = ")
_AMOUNT = re.compile(r"\b\d+(?:ns|us|ms|s|m|h|[KMGT]i?B)\b")


@dataclass(frozen=True)
class Written:
    """A key of an example file with a value: where it stands, its declared type, and the comment above it."""

    file: Path
    line: int
    lead: str
    key: str
    path: str
    comment: str
    shape: msgspec.inspect.Type
    has_words: bool

    def load_with(self, value: str, folder: Path) -> Section:
        """The file as the daemon reads it with this value in place of its own."""
        lines = self.file.read_text().splitlines()
        lines[self.line] = f"{self.lead}{self.key}: {value}"
        copy = folder / self.file.name
        copy.write_text("\n".join(lines))
        return load(copy, KINDS[self.file])

    def alternatives(self) -> set[str]:
        """The values that the comment names: `word: what it does`, `0 = what it means`, and amounts."""
        is_text = isinstance(self.shape, msgspec.inspect.StrType)
        found = {word for word in _EQUALS.findall(self.comment) if (word == '""') == is_text}
        if isinstance(self.shape, msgspec.inspect.LiteralType):
            return found | {str(value) for value in self.shape.values}
        if isinstance(self.shape, msgspec.inspect.CustomType):
            return found | set(_AMOUNT.findall(self.comment))
        return found | (set(_EXPLAINED.findall(self.comment)) if self.has_words else set())


def written(file: Path) -> Iterator[Written]:
    above: list[tuple[int, str, msgspec.inspect.Type]] = [(-1, "", msgspec.inspect.type_info(KINDS[file]))]
    comment, after_key = "", True
    for number, line in enumerate(file.read_text().splitlines()):
        if line.lstrip().startswith("#"):
            comment = ("" if after_key else comment) + line.lstrip(" #") + " "
            after_key = False
            continue
        found = _LINE.fullmatch(line)
        after_key = True
        if not found:
            assert not line.strip(), line
            comment = ""
            continue
        indent = len(found["lead"])
        while above[-1][0] >= indent:
            above.pop()
        declared = field_of(above[-1][2], found["key"])
        shape = bare(declared)
        path = f"{above[-1][1]}.{found['key']}".removeprefix(".")
        if found["value"] is None:
            above.append((indent, path, shape))
        elif found["value"].strip() not in ("{}", "[]"):
            has_words = isinstance(declared, msgspec.inspect.Metadata)
            yield Written(file, number, found["lead"], found["key"], path, comment, shape, has_words)


def field_of(shape: msgspec.inspect.Type, key: str) -> msgspec.inspect.Type:
    shape = bare(shape)
    if isinstance(shape, msgspec.inspect.VarTupleType):
        shape = bare(shape.item_type)
    assert isinstance(shape, msgspec.inspect.StructType), key
    return next(field.type for field in shape.fields if field.encode_name == key)


def bare(shape: msgspec.inspect.Type) -> msgspec.inspect.Type:
    match shape:
        case msgspec.inspect.UnionType(types=types):
            return bare(next(one for one in types if not isinstance(one, msgspec.inspect.NoneType)))
        case msgspec.inspect.Metadata(type=inner):
            return bare(inner)
        case _:
            return shape


ALL = [one for file in KINDS for one in written(file)]
CASES = [(one, value) for one in ALL for value in sorted(one.alternatives())]


def test_the_alternatives_are_found() -> None:
    named = {one.path: one.alternatives() for one in ALL}
    assert named["runtime.engine.socket"] >= {"auto", "off"}
    assert named["runtime.engine.disk_limit"] >= {"auto", "require", "off"}
    assert named["gpu.frozen_memory_limit"] == {"0"}
    assert named["usage.keep"] >= {"0", "24h", "720h"}
    assert named["token_file"] == {'""'}
    assert len(CASES) > 50


@pytest.mark.parametrize(("one", "value"), CASES, ids=lambda part: getattr(part, "path", part))
def test_each_alternative_that_a_comment_names_is_taken(one: Written, value: str, tmp_path: Path) -> None:
    one.load_with(value, tmp_path)


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.path)
def test_each_word_of_a_key_is_explained(one: Written) -> None:
    if isinstance(one.shape, msgspec.inspect.LiteralType):
        missing = {str(word) for word in one.shape.values} - set(re.findall(r"[\w-]+", one.comment))
        assert not missing, f"{one.path}: say what {missing} means"


SHOWN = [
    (AGENT, "fc.gpu.ada.1: NVIDIA L20", "gpu: {types: {fc.gpu.ada.1: NVIDIA L20}}"),
    (AGENT, "/host/path:/container/path:ro", "gpu: {attach: mounts, mounts: {binds: [/host/path:/container/path:ro]}}"),
    (AGENT, "LD_LIBRARY_PATH", "gpu: {attach: mounts, mounts: {environment: {LD_LIBRARY_PATH: /opt/lib}}}"),
    (AGENT, "runtime.trusted_gpus: true", "gpu: {migrate: true}\nruntime: {trusted_gpus: true}"),
    (AGENT, "hibernode-functions", "runtime: {process: {enabled: true, user: hibernode-functions}}"),
    (AGENT, "Without this section", "scheduler:"),
    (SCHEDULER, "postgresql://USER:PASSWORD@HOST/NAME", "database: postgresql://USER:PASSWORD@HOST/NAME"),
    (SCHEDULER, "true allows listening on", "insecure: true\ngateway: {host: 0.0.0.0}"),
]
"""What the comments show beyond single values, as it stands there and as a file."""


@pytest.mark.parametrize(("file", "text", "document"), SHOWN)
def test_what_a_comment_shows_is_taken(file: Path, text: str, document: str, tmp_path: Path) -> None:
    assert text in " ".join(file.read_text().replace("#", " ").split()), "the file shows it no more: change the list"
    copy = tmp_path / "file.yaml"
    copy.write_text(document)
    load(copy, KINDS[file])


@pytest.mark.parametrize("file", KINDS, ids=lambda file: file.name)
def test_the_units_that_the_first_lines_name_are_read(file: Path) -> None:
    head = file.read_text().partition("\n\n")[0]
    amounts = set(_AMOUNT.findall(head))
    assert {"500ms", "16GiB"} <= amounts
    for amount in amounts:
        assert (parse_size_bytes if amount.endswith("B") else parse_duration_ns)(amount) > 0


# ---- values that YAML 1.1 takes for something else -------------------------------------------------------------------

OFF = ["off", "Off", "OFF", "no", "false", '"off"']


@pytest.mark.parametrize("word", OFF)
@pytest.mark.parametrize("key", ["socket", "disk_limit"])
def test_off_may_be_written_in_any_way(key: str, word: str, tmp_path: Path) -> None:
    (one,) = (one for one in ALL if one.path == f"runtime.engine.{key}")
    config = one.load_with(word, tmp_path)
    assert isinstance(config, AgentConfig)
    assert getattr(config.runtime.engine, key) == "off"


TEXTS = ["1", "0777", "3.10", "12:30:45", "2026-01-01", "on", "off", "yes", "1_000", "0x1F", "1e3"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_written(text: str, tmp_path: Path) -> None:
    path = tmp_path / "agent.yaml"
    path.write_text(f"node_name: {text}\ngpu:\n  types: {{{text}: {text}}}\n")
    config = load(path, AgentConfig)
    assert (config.node_name, config.gpu.types) == (text, {text: text})


@pytest.mark.parametrize("text", ["0777", "08", "12:30", "1_000", "0x1F", "0b1", "4096.0", "yes", "9" * 5000])
def test_a_number_that_yaml_might_read_otherwise_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "agent.yaml"
    path.write_text(f"ingress: {{port: {text}}}\n")
    with pytest.raises(
        ConfigError, match=r"agent\.yaml: (ingress\.port: expected a whole number from 0 to|is not val)"
    ):
        load(path, AgentConfig)


def test_a_quoted_number_or_boolean_is_taken(tmp_path: Path) -> None:
    """Templates of other tools quote all values."""
    path = tmp_path / "scheduler.yaml"
    path.write_text('insecure: "yes"\ngateway: {port: "80"}\ndispatch: {wake_factor: "1.5"}\n')
    config = load(path, SchedulerConfig)
    assert (config.insecure, config.gateway.port, config.dispatch.wake_factor) == (True, 80, 1.5)


def test_a_section_whose_keys_are_all_comments_has_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "agent.yaml"
    path.write_text("runtime:\n  # trusted_gpus: true\ngpu:\n  types:\n  mounts: null\nscheduler:\n")
    assert load(path, AgentConfig) == AgentConfig()
    path.write_text("ingress:\n  port:\n")
    with pytest.raises(ConfigError, match=r"ingress\.port: expected a whole number from 0 to 65535, got nothing"):
        load(path, AgentConfig)


def test_the_keys_of_a_merge_may_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "agent.yaml"
    path.write_text("ingress: &any {host: 127.0.0.1, port: 0}\nadmin: {<<: *any, port: 9000}\n")
    assert load(path, AgentConfig).admin.port == 9000


# ---- prices ----------------------------------------------------------------------------------------------------------

PRICES = SYSTEMD / "price-book.example.yaml"


def test_the_price_book_is_taken() -> None:
    book = read_price_book(PRICES)
    assert book.currency == "CU"
    assert book == read_price_book(SYSTEMD.parent / "agent" / "scheduler" / "price-book.yaml")


@pytest.mark.parametrize("instant", ["2026-07-01", "2026-07-01T00:00:00Z", "2026-07-01T02:00:00+02:00", '"2026-07-01"'])
def test_a_price_may_begin_at_any_way_to_write_an_instant(instant: str, tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(PRICES.read_text().replace("2025-01-01T00:00:00Z", instant))
    assert read_price_book(path).prices[0].valid_from_wall_ns == 1_782_864_000 * 10**9


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("memory: 0.15", "memory: 1:30", r"prices\[0\]\.memory must be a finite number, not '1:30'"),
        ("disk: 0.05", "disk: 0.05\n    disk: 0.06", "line 32, column 5: key 'disk' is written twice"),
        ("currency: CU", "currency: [", "is not valid YAML: line"),
    ],
)
def test_a_wrong_price_book_is_refused(old: str, new: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(PRICES.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=problem) as caught:
        read_price_book(path)
    assert caught.value.reason == "PRICE_BOOK_INVALID"
    assert str(path) in caught.value.message


def test_a_model_is_a_text_whatever_it_looks_like(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(PRICES.read_text().replace("[T4, V100, P100, P4]", "[0100, 3090]"))
    assert read_price_book(path).prices[0].gpu[0].models == ("0100", "3090")


def test_a_missing_price_book_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the price book .*none\.yaml: can't be read: No such file"):
        read_price_book(tmp_path / "none.yaml")
