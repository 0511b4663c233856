"""Credentials of the host's administrator for registries, as `docker login` leaves them.

Docker's daemon holds none: its command line reads a file and sends them along, and so do we. Only what the file itself
holds is used. Credential helpers (`credHelpers`, `credsStore`: programs that are asked for a secret) are not run.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import pwd
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DOCKER_HUB = "docker.io"
MAX_FILE_BYTES = 1 << 20
_HUB_NAMES = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})


@dataclass(frozen=True, slots=True)
class Login:
    """`auth`: what the engine is sent, empty = nothing. `source` names where it is from, `problem` why there is none
    although there may be."""

    auth: Mapping[str, str] = field(default_factory=dict, repr=False)
    source: str = ""
    problem: str = ""

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must not be repeated."""
        return tuple(self.auth[key] for key in ("password", "identitytoken") if self.auth.get(key))


def docker_auth_files() -> tuple[Path, ...]:
    """Where Docker's command keeps them for this user: services may have no HOME."""
    if folder := os.environ.get("DOCKER_CONFIG", ""):
        return (Path(folder) / "config.json",)
    try:
        home = pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        return ()
    return (Path(home) / ".docker/config.json",)


def registry_of(image: str) -> str:
    """The registry's host (and port) of a reference, as engines read it: without one it is Docker Hub."""
    first, slash, _ = image.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return DOCKER_HUB if first in _HUB_NAMES else first
    return DOCKER_HUB


def qualified(image: str) -> str:
    """The reference with its registry written out: credentials are sent to that one and no other."""
    first, slash, _ = image.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return image
    return f"{DOCKER_HUB}/{image}" if slash else f"{DOCKER_HUB}/library/{image}"


def find_login(image: str, files: Sequence[Path]) -> Login:
    """What the first file that knows the image's registry says. Never raises; reads disk."""
    registry = registry_of(image)
    problem = ""
    for file in files:
        document, wrong = _read(file)
        if auth := _stored(document, registry):
            return Login(auth, str(file))
        helper = _mapping(document.get("credHelpers")).get(registry) or document.get("credsStore")
        if helper:
            wrong = f"the credential helper that {file} names is not asked: give the function a registryConfig"
        problem = problem or wrong
    return Login({}, "", problem)


def _read(file: Path) -> tuple[Mapping[str, Any], str]:
    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_FILE_BYTES)
        return _mapping(json.loads(text)), ""
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{file} can't be read ({type(error).__name__})"


def _stored(document: Mapping[str, Any], registry: str) -> dict[str, str]:
    for key, entry in _mapping(document.get("auths")).items():
        if _host(str(key)) != registry:
            continue
        values = _mapping(entry)
        if token := values.get("identitytoken"):
            return {"identitytoken": str(token), "serveraddress": registry}
        try:
            user, colon, password = base64.b64decode(str(values.get("auth") or "")).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            continue
        if colon and user:
            return {"username": user, "password": password}
    return {}


def _host(key: str) -> str:
    """`https://index.docker.io/v1/` as docker.io; old files write hosts as addresses."""
    host = key.partition("://")[2] or key
    host = host.partition("/")[0]
    return DOCKER_HUB if host in _HUB_NAMES else host


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
