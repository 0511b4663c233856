"""Fixtures of this folder."""

from tests.adapters.freezer.host import host as host  # noqa: PLC0414 - pytest finds the fixture by this name
from tests.adapters.freezer.world import world as world  # noqa: PLC0414
