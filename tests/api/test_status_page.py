"""The status page: its tables, and that text from agents and users cannot become markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from agent.api.status_page import HEADERS, MAX_ROWS, StatusPage
from agent.core.provisioning.model import Scheduling
from agent.core.provisioning.problem import LastFailure, NextTry, Problem
from agent.core.provisioning.reconcile import Failure
from agent.core.types import GIB, SECOND_NS
from agent.v1.types_pb2 import Gpu, Instance
from tests.api.central import Central, load

HOSTILE = "<script>alert('x')</script>\"&"


class Reader(HTMLParser):
    """The tables of a page, by title, and every tag that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.tables: dict[str, list[list[str]]] = {}
        self.bad: list[str] = []
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self._marked = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._open.append(tag)
        self._marked = ("class", "bad") in attrs
        if tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["h2"]:
            self._rows = self.tables[data] = []
        elif self._open[-1:] in (["td"], ["th"]):
            self._rows[-1][-1] += data
            if self._marked:
                self.bad.append(data)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass


def read(page: bytes) -> Reader:
    reader = Reader()
    reader.feed(page.decode())
    return reader


@pytest.fixture
def page(central: Central) -> StatusPage:
    return StatusPage(central.clock, central.rig.catalog, central.fleet, central.rig.dispatcher)


async def test_page_shows_functions_nodes_gpus_and_instances(central: Central, page: StatusPage) -> None:
    await central.rig.deploy(target=3)
    central.rig.catalog.set_problem("ocr", Problem("NO_FREE_GPU", "Logs: password=hunter2"))
    gpus = (
        Gpu(
            uuid="GPU-a",
            model="L4",
            health=Gpu.HEALTH_OK,
            memory_total_bytes=24 * GIB,
            holder_uids=["i1"],
            sm_percent=0,
        ),
        Gpu(uuid="GPU-b", model="L4", health=Gpu.HEALTH_CORDONED, memory_total_bytes=24 * GIB),
    )
    failed = load("i3", Instance.STATE_FAILED)
    failed.state_reason, failed.state_message = "OUT_OF_MEMORY", "password=hunter2"
    central.report(load("i1", Instance.STATE_RUNNING), load("i2", Instance.STATE_FROZEN), failed, gpus=gpus)
    central.fleet.set_scheduling("n1", Scheduling.CORDONED)
    central.clock.advance(2 * SECOND_NS)
    text = page.render()
    found = read(text)
    (_, function), (_, node) = found.tables["Functions"], found.tables["Nodes"]
    assert function == ["ocr", "1", "1", "3", "2", "1", "1", "0", "0", "NO_FREE_GPU"]
    assert node[:7] == ["n1", "READY CORDONED", "2.0 s ago", "1 of 2", "3", "2", "32.0 GiB of 64.0 GiB"]
    assert [row[4] for row in found.tables["GPUs"][1:]] == ["0 %", "–"]
    assert [row[3] for row in found.tables["Instances"][1:]] == ["RUNNING", "FROZEN", "FAILED OUT_OF_MEMORY"]
    assert found.bad == ["NO_FREE_GPU", "READY CORDONED", "CORDONED", "FAILED OUT_OF_MEMORY"]
    assert b"hunter2" not in text, "messages may quote what an instance has logged"


async def test_page_shows_the_last_failure_and_the_next_try(central: Central, page: StatusPage) -> None:
    await central.rig.deploy(target=1)
    failure = Failure("IMAGE_PULL_FAILED", "password=hunter2", central.clock.wall_ns(), "n1", "i7")
    last = LastFailure(failure, 2, NextTry.SCHEDULED, central.clock.monotonic_ns() + 5 * SECOND_NS)
    central.rig.catalog.set_problem("ocr", Problem("NO_FREE_GPU", "full", last=last))
    central.clock.advance(2 * SECOND_NS)
    text = page.render()
    trouble = read(text).tables["Functions"][1][-1]
    assert trouble == "NO_FREE_GPU; IMAGE_PULL_FAILED 2 s ago (n1 i7), attempt 2 of 5, next in 3 s"
    assert b"hunter2" not in text


async def test_page_shows_that_nothing_is_known_of_a_lost_nodes_instances(central: Central, page: StatusPage) -> None:
    central.report(load("i1", Instance.STATE_FROZEN))
    central.fleet.set_scheduling("n1", Scheduling.DRAINED)
    central.fleet.expect("n2")
    central.clock.advance(9 * SECOND_NS)
    central.fleet.check_silence()
    assert [row[1] for row in read(page.render()).tables["Nodes"][1:]] == ["SUSPECT DRAINING", "EXPECTED"]
    central.clock.advance(2 * SECOND_NS)
    central.fleet.check_silence()
    found = read(page.render()).tables
    assert found["Instances"][1][3] == "UNKNOWN NODE_LOST, was FROZEN"
    assert [row[1] for row in found["Nodes"][1:]] == ["LOST DRAINING", "LOST"]


async def test_empty_page(page: StatusPage) -> None:
    tables = read(page.render()).tables
    assert set(tables) == {"Functions", "Nodes", "GPUs", "Instances"}
    assert all(rows[1:] == [["none"]] for rows in tables.values())


async def test_text_from_agents_is_escaped(central: Central, page: StatusPage) -> None:
    plain = read(page.render()).tags
    hostile = load(HOSTILE, Instance.STATE_RUNNING, HOSTILE)
    hostile.state_reason = HOSTILE
    central.report(hostile, gpus=(Gpu(uuid=HOSTILE, model=HOSTILE, holder_uids=[HOSTILE], health=Gpu.HEALTH_OK),))
    text = page.render()
    assert b"<script" not in text
    found = read(text)
    assert found.tags == plain
    assert found.tables["Instances"][1][0] == HOSTILE, "it is shown as it is"


async def test_page_of_a_large_fleet_is_bounded(central: Central, page: StatusPage) -> None:
    central.report(*(load(f"i{n:04}", Instance.STATE_FROZEN) for n in range(MAX_ROWS + 7)))
    rows = read(page.render()).tables["Instances"]
    assert (len(rows), rows[-1]) == (MAX_ROWS + 2, ["and 7 more"])


def test_headers_forbid_external_resources() -> None:
    assert "default-src 'none'" in HEADERS["content-security-policy"]
    assert "script" not in json.dumps(HEADERS)


async def test_it_names_no_other_host(page: StatusPage) -> None:
    assert not re.search(rb"https?:|//", page.render())
