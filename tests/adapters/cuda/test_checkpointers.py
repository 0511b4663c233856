"""Tests which checkpointer a host gets, and that it works there, from the facts to a wake."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from agent.adapters.cuda.checkpointers import WORKERS_DOWN, HostCheckpointer, NoCheckpointer, choose_checkpointer
from agent.adapters.cuda.driver_checkpointer import DriverCheckpointer
from agent.adapters.cuda.utility_checkpointer import UtilityCheckpointer
from agent.core.errors import ConfigError, UnavailableError
from agent.core.gpus.capabilities import find_capabilities
from agent.core.gpus.host_facts import HostFacts
from agent.core.types import GIB, MIB, Gpu
from agent.ports import CudaCall, CudaFault, CudaOp, CudaState
from agent.settings import GpuSettings
from tests.fakes.emulated_driver import CudaInstances, EmulatedNvidia, emulated_nvidia

T4 = Gpu("GPU-0", 0, "T4", GIB)
CYCLE = (CudaOp.LOCK, CudaOp.CHECKPOINT, CudaOp.RESTORE, CudaOp.UNLOCK, CudaOp.STATE)


@pytest.fixture(scope="module")
def driver() -> Iterator[Callable[[str], EmulatedNvidia]]:
    """An emulated driver by profile, with persistence mode off for 570 and 580."""
    made: dict[str, EmulatedNvidia] = {}
    with ExitStack() as stack:

        def get(profile: str) -> EmulatedNvidia:
            if profile not in made:
                nvidia = stack.enter_context(emulated_nvidia("--gpus", "2", "--gib", "1", "--profile", profile))
                if profile != "555":
                    for device in nvidia.control.devices():
                        nvidia.control.set_device(device.uuid, persistence=False)
                made[profile] = nvidia
            return made[profile]

        yield get


def facts(profile: str, settings: GpuSettings, *, persistence: bool = True, utility: str = "") -> HostFacts:
    gpus = [Gpu("GPU-0", 0, "T4", GIB, persistence=persistence)]
    cuda = {"535": 12020, "555": 12050, "570": 12080, "580": 13000}[profile]
    return HostFacts(f"{profile}.1", gpus, 0, "x86_64", cuda, checkpointer=settings.checkpointer, utility=utility)


@pytest.mark.parametrize("profile", ["555", "570", "580"])
async def test_chosen_checkpointer_freezes_and_wakes(driver: Callable[[str], EmulatedNvidia], profile: str) -> None:
    """570 and 580 without persistence mode: their workers must call cuInit before they restore, or the target dies."""
    nvidia = driver(profile)
    program = str(nvidia.directory / "bin" / "cuda-checkpoint")
    settings = GpuSettings(utility_path=program)
    found = find_capabilities(facts(profile, settings, persistence=profile == "555", utility=program))
    assert found.idle_mode
    checkpointer = choose_checkpointer(found, settings, environment=nvidia.environment)
    await checkpointer.start()
    assert type(checkpointer) is (UtilityCheckpointer if profile == "555" else DriverCheckpointer)
    instances = CudaInstances(nvidia.environment)
    target, _ = instances.start("cuda", MIB)
    reply = await checkpointer.run([CudaCall(op, target.pid) for op in CYCLE], 10.0)
    assert (reply.ok, reply.answers[-1].state) == (True, CudaState.RUNNING)
    assert target.verify()
    await checkpointer.close()
    await instances.close()


async def test_restore_without_cuinit_kills_its_target(
    driver: Callable[[str], EmulatedNvidia],
) -> None:
    """Shows that the test above proves something (NVIDIA/cuda-checkpoint issue 25)."""
    nvidia = driver("580")
    settings = GpuSettings()
    checkpointer = choose_checkpointer(
        find_capabilities(facts("580", settings)), settings, environment=nvidia.environment
    )
    await checkpointer.start()
    instances = CudaInstances(nvidia.environment)
    target, _ = instances.start("cuda", MIB)
    reply = await checkpointer.run([CudaCall(op, target.pid) for op in CYCLE], 10.0)
    assert [answer.code for answer in reply.answers] == [0, 0, 800]
    assert reply.answers[-1].state is CudaState.NONE
    await checkpointer.close()
    await instances.close()


async def test_host_that_cannot_checkpoint_explains_and_begins_nothing() -> None:
    settings = GpuSettings()
    checkpointer: HostCheckpointer = choose_checkpointer(find_capabilities(facts("535", settings)), settings)
    assert isinstance(checkpointer, NoCheckpointer)
    with pytest.raises(UnavailableError, match="install driver 580") as refused:
        await checkpointer.start()
    assert refused.value.reason == "CHECKPOINT_API_UNAVAILABLE"
    reply = await checkpointer.run([CudaCall(CudaOp.STATE, 1)], 1.0)
    assert (reply.fault, reply.reason) == (CudaFault.NOT_BEGUN, WORKERS_DOWN)  # recovery: what runs is RUNNING
    assert (await checkpointer.run([], 1.0)).ok
    await checkpointer.close()


async def test_program_removed_after_the_check_is_a_config_error(tmp_path: Path) -> None:
    settings = GpuSettings(checkpointer="utility", utility_path=str(tmp_path / "gone"))
    found = find_capabilities(facts("555", settings, utility=settings.utility_path))
    checkpointer = choose_checkpointer(found, settings)
    with pytest.raises(ConfigError, match="utility_path"):
        await checkpointer.start()


async def test_driver_is_usable_where_idle_mode_is_forbidden() -> None:
    """Recovery has to unlock what an earlier agent locked, even after MPS was turned on."""
    settings = GpuSettings()
    found = find_capabilities(HostFacts("580.1", [T4], 0, "x86_64", 13000, mps=True))
    assert not found.idle_mode
    assert isinstance(choose_checkpointer(found, settings), DriverCheckpointer)
