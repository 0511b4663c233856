"""Usage through the daemon: an agent's windows in, priced rows out."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import signal
import sqlite3
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from agent.cli.commands.usage import list_usage
from agent.core.billing.window import UsageWindow
from agent.core.errors import InvalidArgumentError, PermissionDeniedError, UnavailableError
from agent.core.types import GIB, SECOND_NS
from agent.daemons.scheduler import PRICE_BOOK
from agent.v1.scheduler_service_pb2 import ListNodesRequest
from agent.v1.types_pb2 import Node
from agent.v1.usage_service_pb2 import ListUsageRequest, ReconcileUsageRequest, UploadUsageWindowsRequest
from agent.wire.clients import DaemonChannel
from agent.wire.convert_usage import window_to_proto
from tests.daemons.test_scheduler import NODE_TOKEN, Daemon, end, running
from tests.fakes.agent_node import FakeAgentNode

WINDOW = UsageWindow(
    instance_uid="i-1",
    seq=0,
    node="gpu-1",
    boot_id="boot-1",
    function="ocr",
    state="RUNNING",
    gpu_model="Emulated Ada",
    gpu_uuids=("g0",),
    gpu_count=1,
    gpu_memory_bytes=16 * GIB,
    vcpu_millis=1000,
    memory_bytes=GIB,
    disk_bytes=0,
    start_mono_ns=0,
    end_mono_ns=10 * SECOND_NS,
    start_wall_ns=1_760_000_000 * SECOND_NS,
    active_ns=4 * SECOND_NS,
    idle_ns=6 * SECOND_NS,
    unbilled_ns=0,
    invocations=2,
    estimated=False,
    sealed=True,
)


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    async with running(tmp_path) as made:
        yield made


async def test_windows_are_stored_once_and_the_cost_can_be_recomputed(daemon: Daemon) -> None:
    other_nodes = replace(WINDOW, node="gpu-2", instance_uid="i-2")
    request = UploadUsageWindowsRequest(windows=[window_to_proto(WINDOW), window_to_proto(other_nodes)])
    async with DaemonChannel(daemon.endpoints["grpc"], NODE_TOKEN) as agent:
        for _ in range(2):
            answer = await agent.call(agent.usage.UploadUsageWindows, request, 10)
            assert [(mark.instance_uid, mark.seq) for mark in answer.marks] == [("i-1", 0)], "for its own node only"
            assert [(one.instance_uid, one.reason) for one in answer.refusals] == [("i-2", "USAGE_FOREIGN_NODE")]
        with pytest.raises(PermissionDeniedError):
            await agent.call(agent.usage.ListUsage, ListUsageRequest(), 10)
    for grouping in (ListUsageRequest.GROUPING_FUNCTION, ListUsageRequest.GROUPING_INSTANCE):
        asked = ListUsageRequest(grouping=grouping, include_windows=True)
        usage = await list_usage(daemon.channel, asked)
        (row,) = usage.rows
        assert row.unpriced_windows == 0
        assert (row.function, row.active_ns, row.idle_ns, row.invocations) == ("ocr", 4 * SECOND_NS, 6 * SECOND_NS, 2)
        factors = row.factors
        expected = (
            Decimal(row.gpu_active_gib_s) * Decimal(factors.gpu_active)
            + Decimal(row.gpu_idle_gib_s) * Decimal(factors.gpu_idle)
            + Decimal(row.vcpu_active_s) * Decimal(factors.vcpu_active)
            + Decimal(row.memory_gib_s) * Decimal(factors.memory)
            + row.invocations * Decimal(factors.invocation)
        )
        assert Decimal(row.cost) == expected == Decimal(usage.total_cost)
        assert Decimal(row.always_on_cost) > expected
        assert list(usage.windows) == [window_to_proto(WINDOW)]


async def test_windows_follow_the_rows_in_pages_of_their_own_each_once(daemon: Daemon) -> None:
    """Two models of one function are two rows, and its windows are in one of them each."""
    many = [
        replace(WINDOW, instance_uid=f"i-{uid}", seq=seq, gpu_model=model)
        for uid, model in ((1, WINDOW.gpu_model), (2, "Abacus 9000"))
        for seq in range(250)
    ] + [replace(WINDOW, instance_uid="i-3", seq=seq) for seq in range(2000)]
    async with DaemonChannel(daemon.endpoints["grpc"], NODE_TOKEN) as agent:
        for first in range(0, len(many), 500):
            request = UploadUsageWindowsRequest(windows=map(window_to_proto, many[first : first + 500]))
            await agent.call(agent.usage.UploadUsageWindows, request, 10)
    whole = await list_usage(daemon.channel, ListUsageRequest(include_windows=True, page_size=1))
    keys = [(one.instance_uid, one.seq) for one in whole.windows]
    assert sorted(keys) == sorted((one.instance_uid, one.seq) for one in many)
    assert len(set(keys)) == len(keys)
    assert {row.gpu_model: row.unpriced_windows for row in whole.rows} == {WINDOW.gpu_model: 0, "Abacus 9000": 250}
    for token in ("windows/x", "windows/1", f"windows/{'9' * 40}/i-1"):
        asked = ListUsageRequest(include_windows=True, page_token=token)
        with pytest.raises(InvalidArgumentError):
            await daemon.channel.call(daemon.channel.usage.ListUsage, asked, 10)


async def test_usage_sums_and_reconciliation_on_the_command_line(daemon: Daemon) -> None:
    gap = replace(
        WINDOW, seq=1, start_mono_ns=11 * SECOND_NS, end_mono_ns=12 * SECOND_NS, active_ns=0, idle_ns=SECOND_NS
    )
    waiting = replace(WINDOW, instance_uid="i-2", gpu_model="", active_ns=0, idle_ns=0, unbilled_ns=10 * SECOND_NS)
    request = UploadUsageWindowsRequest(windows=[window_to_proto(one) for one in (WINDOW, gap, waiting)])
    async with DaemonChannel(daemon.endpoints["grpc"], NODE_TOKEN) as agent:
        await agent.call(agent.usage.UploadUsageWindows, request, 10)
        with pytest.raises(PermissionDeniedError):
            [one async for one in agent.stream(agent.usage.ReconcileUsage, ReconcileUsageRequest(), 10)]

    async def hibernode(*arguments: str) -> tuple[int, str]:
        program = (sys.executable, "-m", "agent.cli.main", "--token-file", daemon.endpoints["token_file"])
        where = ("--scheduler", daemon.endpoints["grpc"])
        process = await asyncio.create_subprocess_exec(*program, *where, *arguments, stdout=asyncio.subprocess.PIPE)
        out, _ = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode()

    code, out = await hibernode("usage", "--by", "node", "-o", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert (code, [(row["node"], row["gpu_model"], row["window_count"]) for row in rows]) == (
        0,
        [("gpu-1", "", "1"), ("gpu-1", "Emulated Ada", "2")],
    )
    assert [Decimal(row["gpu_idle_gib_s"]) for row in rows] == [0, 16 * 7]
    for model, uids in (("-", ["i-2"]), ("Emulated Ada", ["i-1", "i-1"])):
        _, out = await hibernode("usage", "--by", "gpu-model", "--gpu-model", model, "-o", "json")
        assert [one["instance_uid"] for one in json.loads(out)["windows"]] == uids
    _, out = await hibernode("usage", "--by", "gpu-model", "-o", "json")
    answer = json.loads(out)
    assert [one["instance_uid"] for one in answer["windows"]] == ["i-1", "i-1", "i-2"], "each once, by its key"
    assert Decimal(answer["rows"][0]["always_on_cost"]) == 0, "what never started saves nothing"

    code, out = await hibernode("usage", "reconcile", "-o", "json")
    found = json.loads(out)
    assert (code, [(one["instance_uid"], one["gap_ns"]) for one in found["instances"]]) == (4, [("i-1", SECOND_NS)])
    assert (found["total"]["instance_count"], found["total"]["window_count"]) == (2, 3)
    code, out = await hibernode("usage", "reconcile", "--function", "nobody")
    assert code == 0


async def test_a_window_that_cannot_be_does_not_keep_the_others_out(daemon: Daemon) -> None:
    broken = window_to_proto(replace(WINDOW, seq=1))
    broken.idle_ns += 1
    newer = window_to_proto(replace(WINDOW, seq=2))
    newer.state = 99  # type: ignore[assignment]  # of a version to come
    request = UploadUsageWindowsRequest(windows=[window_to_proto(WINDOW), broken, newer])
    async with DaemonChannel(daemon.endpoints["grpc"], NODE_TOKEN) as agent:
        answer = await agent.call(agent.usage.UploadUsageWindows, request, 10)
    assert [(mark.instance_uid, mark.seq) for mark in answer.marks] == [("i-1", 0)]
    assert [(one.seq, one.reason) for one in answer.refusals] == [(1, "USAGE_INVALID")]
    listed = await daemon.channel.call(
        daemon.channel.usage.ListUsage, ListUsageRequest(include_windows=True, page_token="windows/"), 10
    )
    assert [(one.seq, one.state) for one in listed.windows] == [(0, window_to_proto(WINDOW).state), (2, 99)]


async def test_later_windows_are_taken_though_the_earlier_ones_are_not_here(daemon: Daemon) -> None:
    """The scheduler's database was lost: its agents have long forgotten what was acknowledged."""
    late = UploadUsageWindowsRequest(windows=[window_to_proto(replace(WINDOW, seq=seq)) for seq in (500, 501)])
    async with DaemonChannel(daemon.endpoints["grpc"], NODE_TOKEN) as agent:
        answer = await agent.call(agent.usage.UploadUsageWindows, late, 10)
    assert [(mark.instance_uid, mark.seq) for mark in answer.marks] == [("i-1", 501)]


@pytest.mark.parametrize("boot_id", ["boot-1", "boot-2"])
async def test_what_a_node_meters_while_it_is_given_up_is_not_billed_also_if_its_host_is_rebooted_then(
    daemon: Daemon, boot_id: str
) -> None:
    node = FakeAgentNode("gpu-1", NODE_TOKEN)
    request = UploadUsageWindowsRequest()
    try:
        await node.start(daemon.endpoints["grpc"])
        await _until_node_is(daemon, Node.STATE_READY)
        _add(request, 0, time.monotonic_ns() - 10 * SECOND_NS)
        await node.kill()
        await _until_node_is(daemon, Node.STATE_LOST)
        _add(request, 1, time.monotonic_ns())
        await asyncio.sleep(1)  # the duration
        node.boot_id = boot_id
        await node.start(daemon.endpoints["grpc"])
        await _upload(daemon, request)
    finally:
        await node.kill()
    asked = ListUsageRequest(include_windows=True, page_token="windows/")
    listed = await daemon.channel.call(daemon.channel.usage.ListUsage, asked, 10)
    assert [(one.seq, one.unbilled_ns) for one in listed.windows] == [(0, 0), (1, SECOND_NS)]


async def test_a_node_that_was_given_up_is_let_back_by_the_next_scheduler_even_if_it_could_not_be_stored(
    tmp_path: Path,
) -> None:
    node, request = FakeAgentNode("gpu-1", NODE_TOKEN), UploadUsageWindowsRequest()
    _add(request, 0, time.monotonic_ns())
    try:
        async with running(tmp_path) as first:
            await node.start(first.endpoints["grpc"])
            await _until_node_is(first, Node.STATE_READY)
            await node.kill()
            await _until_node_is(first, Node.STATE_LOST)
            await end(first, signal.SIGKILL)
        with sqlite3.connect(tmp_path / "state" / "scheduler.db") as database:
            assert database.execute("DELETE FROM nodes").rowcount == 1
        database.close()
        async with running(tmp_path) as second:
            await node.start(second.endpoints["grpc"])
            await _upload(second, request)
    finally:
        await node.kill()


async def _upload(daemon: Daemon, request: UploadUsageWindowsRequest) -> None:
    """Repeat it until the node is back."""
    async with DaemonChannel(daemon.endpoints["grpc"], NODE_TOKEN) as agent, asyncio.timeout(20):
        while True:
            try:
                await agent.call(agent.usage.UploadUsageWindows, request, 10)
                return
            except UnavailableError as error:
                if error.reason != "NODE_GIVEN_UP":
                    raise
            await asyncio.sleep(0.1)


def _add(request: UploadUsageWindowsRequest, seq: int, start_ns: int) -> None:
    """A second of the boot `boot-1`."""
    window = replace(WINDOW, seq=seq, start_mono_ns=start_ns, end_mono_ns=start_ns + SECOND_NS)
    request.windows.append(window_to_proto(replace(window, active_ns=0, idle_ns=SECOND_NS)))


async def _until_node_is(daemon: Daemon, state: Node.State.ValueType) -> None:
    async with asyncio.timeout(20):
        while True:
            answer = await daemon.channel.call(daemon.channel.scheduler.ListNodes, ListNodesRequest(), 10)
            if [node.state for node in answer.nodes] == [state]:
                return
            await asyncio.sleep(0.05)


async def test_only_a_node_may_upload(daemon: Daemon) -> None:
    with pytest.raises(PermissionDeniedError):
        await daemon.channel.call(daemon.channel.usage.UploadUsageWindows, UploadUsageWindowsRequest(), 10)


def test_the_price_book_that_is_shipped_is_the_documented_one() -> None:
    example = Path(__file__).parents[2] / "systemd" / "price-book.example.yaml"
    assert PRICE_BOOK.read_bytes() == example.read_bytes()
