"""Registry credentials: the registry of an image, and the contents of `docker login`'s file."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from agent.adapters.engine.registry_credentials import find_login, qualified, registry_of


def basic(text: str) -> dict[str, str]:
    return {"auth": base64.b64encode(text.encode()).decode()}


@pytest.mark.parametrize(
    ("image", "registry", "full"),
    [
        ("ocr", "docker.io", "docker.io/library/ocr"),
        ("team/ocr:3", "docker.io", "docker.io/team/ocr:3"),
        ("docker.io/team/ocr", "docker.io", "docker.io/team/ocr"),
        ("localhost/ocr", "localhost", "localhost/ocr"),
        ("127.0.0.1:5000/ocr", "127.0.0.1:5000", "127.0.0.1:5000/ocr"),
        ("r.example/a/b@sha256:0f", "r.example", "r.example/a/b@sha256:0f"),
    ],
)
def test_registry_of_a_reference(image: str, registry: str, full: str) -> None:
    assert (registry_of(image), qualified(image)) == (registry, full)


def test_credentials_of_docker_login(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    auths = {
        "https://index.docker.io/v1/": basic("hub:pw:with:colons"),
        "r.example": basic("ann:secret"),
        "https://old.example/v2/": basic("old:pw"),
        "cloud.example": {"auth": "", "identitytoken": "tok"},
        "odd.example": {"auth": "!!!"},
    }
    file.write_text(json.dumps({"auths": auths}))
    found = {image: find_login(image, [tmp_path / "none.json", file]).auth for image in IMAGES}
    assert found == {
        "team/ocr": {"username": "hub", "password": "pw:with:colons"},
        "r.example/ocr": {"username": "ann", "password": "secret"},
        "old.example/ocr": {"username": "old", "password": "pw"},
        "cloud.example/ocr": {"identitytoken": "tok", "serveraddress": "cloud.example"},
        "odd.example/ocr": {},
        "r.example.org/ocr": {},
    }


IMAGES = ("team/ocr", "r.example/ocr", "old.example/ocr", "cloud.example/ocr", "odd.example/ocr", "r.example.org/ocr")


@pytest.mark.parametrize("text", ["{", "[]", '{"auths": 1}', '{"auths": {"r.example": 1}}', "[" * 100_000])
def test_malformed_file_has_no_login(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert find_login("r.example/ocr", [tmp_path / "config.json"]).auth == {}
