"""Pulls from a registry that is really there: what Docker and Podman answer is what the images' room understands."""

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
class Place:
    """An engine, the images' room on it, and a registry that wants a login."""

    engine: Engine
    api: EngineApi
    images: Images
    registry: OciRegistry

    async def refusal(self, image: str, login: RegistryLogin | None = None) -> HibernodeError:
        with pytest.raises(HibernodeError) as caught:
            await self.images.ensure(image, login)
        return caught.value

    def here(self) -> set[str]:
        """The images of the registry that the engine has."""
        listed = self.engine.must("GET", "/images/json")
        return {tag for one in listed for tag in one["RepoTags"] or () if tag.startswith(self.registry.address)}


@pytest.fixture
async def place(engine: Engine) -> AsyncIterator[Place]:
    api = EngineApi(engine.socket)
    async with oci_registry({"ann": ANN.password}) as registry:
        found = Place(engine, api, Images(api, stall_s=2.0, auth_files=()), registry)
        try:
            yield found
        finally:
            registry.hold.set()
            await found.images.close()
            for tag in found.here():
                engine.must("DELETE", f"/images/{tag}")
            await api.close()


async def test_a_private_image_comes_with_the_functions_login_and_once_for_all(place: Place) -> None:
    image = place.registry.add("team/ocr", "3", {"model": os.urandom(2 * MIB)})
    said: list[str] = []
    found = await asyncio.gather(*(place.images.ensure(image, ANN, said.append) for _ in range(3)))
    assert len(set(map(_identity, found))) == 1
    assert found[0].environment["LD_LIBRARY_PATH"] == "/image/lib"
    assert found[0].architecture == "amd64"
    assert f"pulling {image}" in said
    assert place.here() == {image}
    asked = sum(place.registry.pulls.values())
    await place.images.ensure(image, ANN)
    assert sum(place.registry.pulls.values()) == asked  # it was here
    assert place.registry.logins == {"ann:correct horse"}


def _identity(image: ImageFacts) -> str:
    return image.id


async def test_who_may_not_is_told_so_and_the_password_is_not(place: Place) -> None:
    image = place.registry.add("team/ocr", "3", {"model": b"x"})
    without = await place.refusal(image)
    assert without.reason == "IMAGE_PULL_DENIED"
    assert "give the function a registryConfig" in without.message
    wrong = await place.refusal(image, RegistryLogin("ann", "battery staple"))
    assert wrong.reason == "IMAGE_PULL_DENIED"
    assert "battery staple" not in str(wrong)
    assert place.here() == set()


async def test_what_the_registry_does_not_have(place: Place) -> None:
    image = place.registry.add("team/ocr", "3", {"model": b"x"})
    for missing in (image.replace("/ocr:3", "/ocr:4"), image.replace("team/ocr", "team/other")):
        refused = await place.refusal(missing, ANN)
        assert refused.reason == "IMAGE_NOT_FOUND", refused.message


async def test_an_image_of_another_processor(place: Place) -> None:
    image = place.registry.add("team/arm", "1", {"model": b"x"}, architecture="arm64")
    found = await place.refusal(image, ANN)
    assert found.reason == "IMAGE_PULL_FAILED"
    assert "arm64" in found.message


async def test_a_registry_that_is_not_there(place: Place) -> None:
    assert (await place.refusal("127.0.0.1:1/team/ocr:3")).reason == "IMAGE_PULL_FAILED"


async def test_a_registry_that_stops_in_the_middle_is_given_up_and_can_be_tried_again(place: Place) -> None:
    image = place.registry.add("team/ocr", "3", {"model": os.urandom(4 * MIB)})
    place.registry.hold.clear()
    stuck = await place.refusal(image, ANN)
    assert stuck.reason == "IMAGE_PULL_FAILED"
    assert "no more data arrived" in stuck.message
    assert place.here() == set()
    place.registry.hold.set()
    await place.images.ensure(image, ANN)
    assert place.here() == {image}


async def test_one_caller_leaves_and_the_other_gets_the_image(place: Place) -> None:
    image = place.registry.add("team/ocr", "3", {"model": os.urandom(2 * MIB)})
    place.registry.hold.clear()
    leaving, staying = (asyncio.create_task(place.images.ensure(image, ANN)) for _ in range(2))
    async with asyncio.timeout(10):
        await place.registry.asked.wait()
    leaving.cancel()
    with suppress(asyncio.CancelledError):
        await leaving
    place.registry.hold.set()
    assert (await staying).id
    assert place.here() == {image}
