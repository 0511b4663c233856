"""The engines of the tests: `engine` runs a test once with Docker and once with Podman.

    # every test in this folder has the marker `engine`
    async def test_x(engine: Engine) -> None:
        images.load(engine, images.ECHO)     # imported on first use; BUSYBOX is always loaded

Both engines start once per test process. After each test a stopped engine is started again; leftover containers and
networks are removed and fail the test.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines import images
from tests.engines.engines import Engine, EngineFolder, missing

KINDS = ("docker", "podman")
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.engine)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(240))


def _running(kind: str) -> Iterator[Engine]:
    if why := missing(kind):
        pytest.skip(why)
    place = EngineFolder(kind)
    try:
        place.engine.start()
        yield place.engine
    finally:
        place.close()


@pytest.fixture(scope="session")
def docker() -> Iterator[Engine]:
    yield from _running("docker")


@pytest.fixture(scope="session")
def podman() -> Iterator[Engine]:
    yield from _running("podman")


@pytest.fixture(params=KINDS)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """A running engine with the image `images.BUSYBOX`."""
    found: Engine = request.getfixturevalue(request.param)
    found.start()
    images.load(found, images.BUSYBOX)
    yield found
    found.start()
    left = found.clear()
    assert not left, f"left in {found.kind}: {', '.join(left)}"
