"""Fixtures of this folder."""

from tests.adapters.freezer_host import host as host  # noqa: PLC0414 - pytest finds the fixture by this name
from tests.adapters.freezer_world import world as world  # noqa: PLC0414
