"""Pulls from a real registry: the pull errors of Docker and Podman are classified correctly."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass

import pytest

from agent.adapters.engine.api import EngineApi
from agent.adapters.engine.images import ImageFacts, Images
from agent.core.errors import HibernodeError
from agent.core.types import MIB, RegistryLogin
from tests.engines.engines import Engine
from tests.fakes.oci_registry import OciRegistry, oci_registry

ANN = RegistryLogin("ann", "correct horse")


@dataclass(slots=True)
class PullSetup:
    """An engine with its `Images`, and a registry that requires a login."""

    engine: Engine
    api: EngineApi
    images: Images
    registry: OciRegistry

    async def refusal(self, image: str, login: RegistryLogin | None = None) -> HibernodeError:
        with pytest.raises(HibernodeError) as caught:
            await self.images.ensure(image, login)
        return caught.value

    def here(self) -> set[str]:
        """The registry's images on the engine."""
        listed = self.engine.must("GET", "/images/json")
        return {tag for one in listed for tag in one["RepoTags"] or () if tag.startswith(self.registry.address)}


@pytest.fixture
async def pull_setup(engine: Engine) -> AsyncIterator[PullSetup]:
    api = EngineApi(engine.socket)
    async with oci_registry({"ann": ANN.password}) as registry:
        found = PullSetup(engine, api, Images(api, stall_s=2.0, auth_files=()), registry)
        try:
            yield found
        finally:
            registry.hold.set()
            await found.images.close()
            for tag in found.here():
                engine.must("DELETE", f"/images/{tag}")
            await api.close()


async def test_private_image_is_pulled_once_with_the_functions_login(pull_setup: PullSetup) -> None:
    image = pull_setup.registry.add("team/ocr", "3", {"model": os.urandom(2 * MIB)})
    said: list[str] = []
    found = await asyncio.gather(*(pull_setup.images.ensure(image, ANN, said.append) for _ in range(3)))
    assert len(set(map(_identity, found))) == 1
    assert found[0].environment["LD_LIBRARY_PATH"] == "/image/lib"
    assert found[0].architecture == "amd64"
    assert f"pulling {image}" in said
    assert pull_setup.here() == {image}
    asked = sum(pull_setup.registry.pulls.values())
    await pull_setup.images.ensure(image, ANN)
    assert sum(pull_setup.registry.pulls.values()) == asked  # it was local
    assert pull_setup.registry.logins == {"ann:correct horse"}


def _identity(image: ImageFacts) -> str:
    return image.id


async def test_denied_pull_is_reported_without_the_password(pull_setup: PullSetup) -> None:
    image = pull_setup.registry.add("team/ocr", "3", {"model": b"x"})
    without = await pull_setup.refusal(image)
    assert without.reason == "IMAGE_PULL_DENIED"
    assert "give the function a registryConfig" in without.message
    wrong = await pull_setup.refusal(image, RegistryLogin("ann", "battery staple"))
    assert wrong.reason == "IMAGE_PULL_DENIED"
    assert "battery staple" not in str(wrong)
    assert pull_setup.here() == set()


async def test_image_missing_in_the_registry(pull_setup: PullSetup) -> None:
    image = pull_setup.registry.add("team/ocr", "3", {"model": b"x"})
    for missing in (image.replace("/ocr:3", "/ocr:4"), image.replace("team/ocr", "team/other")):
        refused = await pull_setup.refusal(missing, ANN)
        assert refused.reason == "IMAGE_NOT_FOUND", refused.message


async def test_image_of_another_architecture(pull_setup: PullSetup) -> None:
    image = pull_setup.registry.add("team/arm", "1", {"model": b"x"}, architecture="arm64")
    found = await pull_setup.refusal(image, ANN)
    assert found.reason == "IMAGE_PULL_FAILED"
    assert "arm64" in found.message


async def test_unreachable_registry(pull_setup: PullSetup) -> None:
    assert (await pull_setup.refusal("127.0.0.1:1/team/ocr:3")).reason == "IMAGE_PULL_FAILED"


async def test_stalled_pull_is_cancelled_and_can_be_retried(pull_setup: PullSetup) -> None:
    image = pull_setup.registry.add("team/ocr", "3", {"model": os.urandom(4 * MIB)})
    pull_setup.registry.hold.clear()
    stuck = await pull_setup.refusal(image, ANN)
    assert stuck.reason == "IMAGE_PULL_FAILED"
    assert "no more data arrived" in stuck.message
    assert pull_setup.here() == set()
    pull_setup.registry.hold.set()
    await pull_setup.images.ensure(image, ANN)
    assert pull_setup.here() == {image}


async def test_pull_continues_after_one_caller_leaves(pull_setup: PullSetup) -> None:
    image = pull_setup.registry.add("team/ocr", "3", {"model": os.urandom(2 * MIB)})
    pull_setup.registry.hold.clear()
    leaving, staying = (asyncio.create_task(pull_setup.images.ensure(image, ANN)) for _ in range(2))
    async with asyncio.timeout(10):
        await pull_setup.registry.asked.wait()
    leaving.cancel()
    with suppress(asyncio.CancelledError):
        await leaving
    pull_setup.registry.hold.set()
    assert (await staying).id
    assert pull_setup.here() == {image}
