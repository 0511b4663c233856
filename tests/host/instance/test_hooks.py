"""The calls that Function Compute makes to an instance: hooks, health checks, headers."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from agent.core.lifecycle import events as ev
from agent.core.types import MILLISECOND_NS, SECOND_NS, HealthCheck, Hook, Hooks, InstanceState
from agent.http.exchange import Exchange
from tests.host.ingress.test_ingress import a_door
from tests.host.rig import OCR, Handler, NodeRig, enter, environment_of, eventually, hangs, node_rig, until

ROOT = Path(__file__).parents[3]
S = InstanceState
SOON = Hook(timeout_ns=30 * MILLISECOND_NS)
ALL_HOOKED = replace(
    OCR, timeout_ns=60 * SECOND_NS, hooks=Hooks(initializer=Hook(), pre_freeze=Hook(), pre_stop=Hook())
)
OF_THE_FUNCTION = {
    b"x-fc-function-name": b"ocr",
    b"x-fc-function-handler": b"index.handler",
    b"x-fc-function-memory": b"512",
    b"x-fc-function-timeout": b"60",
    b"x-fc-region": b"local",
    b"x-fc-account-id": b"0",
    b"x-fc-qualifier": b"LATEST",
    b"x-fc-version-id": b"1",
    b"x-fc-retry-count": b"0",
}


async def stopped(rig: NodeRig, actor_uid: str) -> None:
    await eventually(lambda: actor_uid in rig.node.ended)


# ---- what is called, and how ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "method", "length"),
    [("/initialize", b"POST", b"0"), ("/pre-freeze", b"GET", None), ("/pre-stop", b"GET", None)],
)
async def test_hooks_are_called_as_function_compute_does(path: str, method: bytes, length: bytes | None) -> None:
    async with node_rig() as rig:
        actor = await rig.running(ALL_HOOKED)
        rig.clock.advance(10 * SECOND_NS)
        await until(actor, S.FROZEN)
        await enter(actor)
        actor.gate.leave()
        actor.handle(ev.StopAsked(SECOND_NS))
        await stopped(rig, actor.uid)
        assert rig.app.paths().count(path) == 1
        (head,) = [one for one in rig.app.requests if one.target == path.encode()]
        headers = dict(head.headers)
        assert (head.method, headers.get(b"content-length"), head.has_body) == (method, length, False)
        ours = {name: value for name, value in headers.items() if name.startswith(b"x-fc-")}
        assert ours.pop(b"x-fc-request-id").count(b"-") == 3
        assert ours == {b"x-fc-control-path": path.encode(), **OF_THE_FUNCTION}


async def test_a_request_carries_exactly_these() -> None:
    async with a_door() as door:
        actor = await door.rig.running(ALL_HOOKED)
        await door.ask(actor, "x-hibernode-client-ip: 203.0.113.9", "x-fc-request-id: 1-67a59f35-150c1267-f381ba1c085c")
        seen = dict(door.rig.app.requests[-1].headers)
        assert {name: value for name, value in seen.items() if name.startswith((b"x-fc-", b"x-hib"))} == {
            b"x-fc-request-id": b"1-67a59f35-150c1267-f381ba1c085c",
            b"x-fc-control-path": b"/http-invoke",
            b"x-fc-client-ip": b"203.0.113.9",
            **OF_THE_FUNCTION,
        }


@pytest.mark.parametrize("image", ["host", "registry.example/ocr:1"])
async def test_environment_describes_the_instance(image: str) -> None:
    async with node_rig() as rig:
        rig.runtime.accepted_images.add(image)
        actor = await rig.running(replace(OCR, image=image, region="cn-shanghai"))
        told = dict(environment_of(rig, actor.uid))
        assert told.pop("FC_FUNC_CODE_PATH", None) == (None if image == "host" else "/code")
        assert told == {
            "FC_FUNCTION_NAME": "ocr",
            "FC_FUNCTION_HANDLER": "index.handler",
            "FC_FUNCTION_MEMORY_SIZE": "512",
            "FC_REGION": "cn-shanghai",
            "FC_ACCOUNT_ID": "0",
            "FC_INSTANCE_ID": actor.uid,
        }  # FC_CUSTOM_LISTEN_PORT is the runtime's, which knows the port


async def test_hooks_that_are_not_configured_are_not_called() -> None:
    async with node_rig() as rig:
        actor = await rig.running()
        rig.clock.advance(10 * SECOND_NS)
        await until(actor, S.FROZEN)
        await enter(actor)
        actor.gate.leave()
        actor.handle(ev.StopAsked(SECOND_NS))
        await stopped(rig, actor.uid)
        assert rig.app.paths() == []


# ---- what their answers mean ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "state", "said"),
    [
        (200, S.RUNNING, ""),
        (204, S.RUNNING, ""),
        (302, S.FAILED, "answered 302"),
        (404, S.FAILED, "answered 404"),
        (500, S.FAILED, "answered 500"),
        (hangs, S.FAILED, "did not answer within 0.03 s"),
    ],
)
async def test_an_initializer_must_answer_2xx_in_time(answer: int | Handler, state: S, said: str) -> None:
    async with node_rig() as rig:
        rig.app.answers["/initialize"] = answer
        hook = Hook() if isinstance(answer, int) else SOON
        actor = await rig.create(replace(OCR, hooks=Hooks(initializer=hook)))
        await until(actor, S.RUNNING, S.FAILED)
        assert actor.state is state
        assert said in actor.instance.message
        if state is S.FAILED:
            assert actor.instance.reason == "INITIALIZATION_ERROR"


@pytest.mark.parametrize(("answer", "noted"), [(200, False), (302, False), (404, True), (500, True), (hangs, True)])
async def test_no_answer_of_pre_stop_prevents_the_stop(answer: int | Handler, noted: bool) -> None:
    async with node_rig() as rig:
        rig.app.answers["/pre-stop"] = answer
        actor = await rig.running(replace(OCR, hooks=Hooks(pre_stop=Hook() if isinstance(answer, int) else SOON)))
        actor.handle(ev.StopAsked(SECOND_NS))
        await stopped(rig, actor.uid)
        assert actor.state is S.STOPPED
        assert ("instance.pre_stop_failed" in rig.names()) == noted
        assert [call for call, _ in rig.runtime.calls][2] == "terminate", "TERM comes after the hook"


# ---- health check ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "state"),
    [(200, S.RUNNING), (302, S.RUNNING), (399, S.RUNNING), (400, S.FAILED), (503, S.FAILED), (hangs, S.FAILED)],
)
async def test_the_first_probe_comes_after_the_initializer_and_must_pass(answer: int | Handler, state: S) -> None:
    check = HealthCheck("/healthz?deep=1", timeout_ns=SECOND_NS if isinstance(answer, int) else 30 * MILLISECOND_NS)
    async with node_rig() as rig:
        rig.app.answers["/healthz"] = answer
        actor = await rig.create(replace(OCR, hooks=Hooks(initializer=Hook()), health_check=check))
        await until(actor, S.RUNNING, S.FAILED)
        assert actor.state is state
        assert rig.app.paths()[:2] == ["/initialize", "/healthz"]
        assert rig.app.requests[1].target == b"/healthz?deep=1"


async def test_a_page_may_be_the_health_check() -> None:
    """The start page of a web UI has hundreds of kilobytes, and is what people name."""

    async def page(exchange: Exchange) -> None:
        await exchange.answer(200, [(b"content-type", b"text/html")], b"<p>" * 300_000)

    check = HealthCheck("/", period_ns=MILLISECOND_NS, failure_threshold=1)
    async with node_rig() as rig:
        rig.app.answers["/"] = page
        actor = await rig.running(replace(OCR, health_check=check))
        await rig.app.until_asked("/", times=5)
        assert actor.healthy
        assert "instance.unhealthy" not in rig.names()


async def test_the_thresholds_count_failures_and_successes_in_a_row() -> None:
    """Unhealthy at the third failure in a row, not in all; healthy again at the second success in a row."""
    answers = iter([200, 500, 500, 200, 500, 500, 500, 200, 500, 200, 200])
    healthy: list[bool] = []
    check = HealthCheck("/healthz", period_ns=MILLISECOND_NS, failure_threshold=3, success_threshold=2)
    done = asyncio.Event()

    async with node_rig() as rig:

        async def by_script(exchange: Exchange) -> None:
            healthy.append(not rig.node.actors or next(iter(rig.node.actors.values())).healthy)
            status = next(answers, 0)
            if not status:
                done.set()
                await hangs(exchange)
            await exchange.answer(status, [])

        rig.app.answers["/healthz"] = by_script
        await rig.running(replace(OCR, health_check=check))
        await asyncio.wait_for(done.wait(), 10)
        # Seen by each probe before its own answer.
        assert healthy == [True] * 7 + [False] * 4 + [True]


@pytest.mark.parametrize(("answer", "healthy"), [(hangs, True), (503, False)])
async def test_missing_answer_of_a_busy_instance_does_not_count_but_an_error_does(
    answer: int | Handler, healthy: bool
) -> None:
    """Servers with one thread answer no probe while they serve a request."""
    check = HealthCheck("/healthz", period_ns=MILLISECOND_NS, timeout_ns=200 * MILLISECOND_NS, failure_threshold=1)
    async with node_rig() as rig:
        actor = await rig.running(replace(OCR, health_check=check))
        await enter(actor)
        rig.app.answers["/healthz"] = answer
        before = rig.app.paths().count("/healthz")
        await rig.app.until_asked("/healthz", times=before + 3)  # so that one probe is over
        assert actor.healthy is healthy
        actor.gate.leave()
        await eventually(lambda: not actor.healthy)  # idle and silent is unhealthy


async def test_instance_frozen_while_unhealthy_can_be_woken() -> None:
    """The dispatcher sends nothing to an unhealthy instance, and only a request wakes a frozen one."""
    check = HealthCheck("/healthz", period_ns=MILLISECOND_NS, failure_threshold=1)
    async with node_rig() as rig:
        actor = await rig.running(replace(OCR, health_check=check))
        rig.app.answers["/healthz"] = 500
        await eventually(lambda: not actor.healthy)
        rig.clock.advance(10 * SECOND_NS)
        await until(actor, S.FROZEN)
        assert actor.healthy
        await enter(actor)
        await eventually(lambda: not actor.healthy)  # awake, it is probed again


UNREACHABLE = """
ip link set lo up
ip link add v0 type veth peer name v1
ip addr add 10.99.0.1/24 dev v0
ip link set v0 up
ip link set v1 up
ip route add default via 10.99.0.2
exec "$0" -c '
import asyncio
from agent.host.instance.hooks import wait_until_listening
async def probe():
    await wait_until_listening("198.51.100.7", 9000, asyncio.get_running_loop().time() + 0.05, lambda: False)
asyncio.run(probe())
'
"""


@pytest.mark.root
def test_readiness_never_asks_a_gateway_for_an_instance() -> None:
    """In a network of its own, whose only way to the address is a default route."""
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("needs root, unshare(1) and ip(8)")
    command = ["unshare", "-n", "sh", "-euc", UNREACHABLE, sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, cwd=ROOT)
    assert "Network is unreachable" in done.stderr, done.stderr
