"""The runtime contract on containers of Docker and Podman."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.contract.runtime_contract import *  # noqa: F403
from tests.contract.runtime_worlds import World
from tests.engines.engines import Engine
from tests.engines.world import EngineWorld


@pytest.fixture
async def world(engine: Engine) -> AsyncIterator[World]:
    made = EngineWorld(engine)
    yield made
    await made.close()
