"""A container paused through the engine: the pause is noticed and reported, and nothing hangs."""

from __future__ import annotations

from dataclasses import replace

from agent.core.types import SECOND_NS, IdlePolicy
from agent.v1 import instance_service_pb2 as instances_pb
from agent.v1 import types_pb2
from tests.e2e.stack import CALL_S, until
from tests.engines import images
from tests.engines.engines import Engine
from tests.engines.functions import echo_image
from tests.engines.test_whole import asleep, event_names, the_one, whole


async def test_external_pause_is_noticed_and_ends_with_the_unpause(engine: Engine) -> None:
    images.load(engine, images.ECHO)
    spec = replace(echo_image("paused"), idle=IdlePolicy(freeze_after_ns=3600 * SECOND_NS))
    async with whole(engine) as stack:
        await stack.deploy(spec, target=1)
        await stack.ask_correctly("paused", 1)
        uid = (await the_one(stack, "paused")).uid
        engine.must("POST", f"/containers/hibernode-{uid}/pause")

        async def noticed() -> bool:
            found = await the_one(stack, "paused")
            return found.state_reason == "EXTERNALLY_FROZEN" and not found.healthy

        await until("the pause is noticed", noticed, 10.0)
        engine.must("POST", f"/containers/hibernode-{uid}/unpause")

        async def over() -> bool:
            return (await the_one(stack, "paused")).healthy

        await until("the end of the pause is noticed", over, 10.0)
        assert {"instance.externally_frozen", "instance.externally_thawed"} <= set(await event_names(stack))
        await stack.ask_correctly("paused", 2)


async def test_instance_paused_while_frozen_still_wakes(engine: Engine) -> None:
    """Our wake ends the pause, like any other stop of its threads."""
    images.load(engine, images.ECHO)
    async with whole(engine) as stack:
        await stack.deploy(echo_image("dozing"), target=1)
        await stack.ask_correctly("dozing", 1)
        uid = (await asleep(stack, "dozing")).uid
        engine.must("POST", f"/containers/hibernode-{uid}/pause")
        await stack.ask_correctly("dozing", 2)
        assert (await the_one(stack, "dozing")).uid == uid
        async with stack.channel("agent") as channel:
            request = instances_pb.GetInstanceRequest(uid=uid)
            found = (await channel.call(channel.instances.GetInstance, request, CALL_S)).instance
        assert found.state != types_pb2.Instance.STATE_FAILED
