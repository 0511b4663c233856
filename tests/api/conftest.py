"""Fixtures for the api tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.api.central import Central, a_central


@pytest.fixture
async def central(tmp_path: Path) -> AsyncIterator[Central]:
    """A fresh scheduler."""
    async with a_central(str(tmp_path)) as made:
        yield made
