"""Names of time zones: what a person reads when one is unknown, or when there are none at all."""

from __future__ import annotations

import sys
import zoneinfo
from collections.abc import Iterator
from datetime import UTC
from importlib import resources
from pathlib import Path

import pytest

from agent.wire import time_zones
from agent.wire.time_zones import UnknownZone, zone_of

UTC_FILE = resources.files("tzdata.zoneinfo").joinpath("UTC").read_bytes()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    time_zones._names.cache_clear()
    yield
    time_zones._names.cache_clear()


@pytest.fixture
def no_zone_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither the host nor Python's tzdata has any."""
    for name in ["tzdata", *(name for name in sys.modules if name.startswith("tzdata."))]:
        monkeypatch.setitem(sys.modules, name, None)
    zoneinfo.reset_tzpath([])
    zoneinfo.ZoneInfo.clear_cache()
    yield
    zoneinfo.reset_tzpath()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("asia/shanghai", "use Asia/Shanghai;"),
        ("Asia/Shangai", "use Asia/Shanghai or "),
        ("Shanghai", "use Asia/Shanghai;"),
        ("America/New York", "use America/New_York;"),
        ("US/Pacfic", "use US/Pacific;"),
        ("Mars/Base", "install the package tzdata"),
        ("../../etc/passwd", "there is no time zone '../../etc/passwd'"),
        ("Asia", "there is no time zone 'Asia'"),
        ("\0", "there is no time zone"),
        ("z" * 10_000, "there is no time zone 'zzz"),
    ],
)
def test_a_wrong_name_is_answered_with_like_ones(name: str, says: str) -> None:
    with pytest.raises(UnknownZone) as caught:
        zone_of(name)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.usefixtures("no_zone_files")
def test_without_zone_files_the_advice_is_to_install_them() -> None:
    with pytest.raises(UnknownZone, match="no time zone files; install the package tzdata"):
        zone_of("Asia/Shanghai")
    assert zone_of("") is UTC


@pytest.mark.usefixtures("no_zone_files")
def test_on_a_host_with_few_zones_the_advice_is_not_the_name_itself(tmp_path: Path) -> None:
    (tmp_path / "UTC").write_bytes(UTC_FILE)
    zoneinfo.reset_tzpath([str(tmp_path)])
    with pytest.raises(UnknownZone, match="install the package tzdata") as caught:
        zone_of("Europe/Rome")
    assert str(caught.value).count("Europe/Rome") == 1


def test_a_host_without_the_zone_s_file_falls_back_on_the_package(tmp_path: Path) -> None:
    """A host's upgrade takes names away: Debian 13 moved US/Pacific to tzdata-legacy."""
    zoneinfo.reset_tzpath([str(tmp_path)])
    zoneinfo.ZoneInfo.clear_cache()
    try:
        assert str(zone_of("US/Pacific")) == "US/Pacific"
    finally:
        zoneinfo.reset_tzpath()
