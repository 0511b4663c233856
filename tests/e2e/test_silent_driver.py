"""NVML stops answering: running instances still serve requests, and figures become unknown instead of outdated."""

from __future__ import annotations

from agent.v1 import types_pb2
from tests.e2e.stack import Stack, echo, running_stack, until

CORDONED, OK = types_pb2.Gpu.HEALTH_CORDONED, types_pb2.Gpu.HEALTH_OK


async def test_silent_driver_affects_only_figures_and_new_instances() -> None:
    async with running_stack() as stack:
        await stack.deploy(echo("ocr"), target=1)
        await stack.wait_for_state(types_pb2.Instance.STATE_RUNNING, 1)

        async def known() -> bool:
            return all(gpu.HasField("memory_used_bytes") for gpu in (await stack.node()).gpus)

        await until("figures are shown", known)
        with stack.driver() as driver:
            uuids = [device.uuid for device in driver.devices()]
            for uuid in uuids:
                driver.set_device(uuid, silent=True)
            try:
                await until("figures are too old to show", lambda: aged(stack))
                await until("nothing new uses these GPUs", lambda: all_are(stack, CORDONED))
            finally:
                for uuid in uuids:
                    driver.set_device(uuid, silent=False)
        await until("the driver answers again", lambda: all_are(stack, OK))
        await until("figures are shown again", known)
        await stack.remove_functions(["ocr"])
        assert not stack.leftovers()


async def aged(stack: Stack) -> bool:
    """Whether the figures are gone, while requests are answered."""
    answer = await stack.ask("ocr", "/answer?n=1")
    assert answer.status == 200, answer.body
    return not any(gpu.HasField("memory_used_bytes") for gpu in (await stack.node()).gpus)


async def all_are(stack: Stack, health: types_pb2.Gpu.Health.ValueType) -> bool:
    answer = await stack.ask("ocr", "/answer?n=2")
    assert answer.status == 200, answer.body
    return all(gpu.health == health for gpu in (await stack.node()).gpus)
