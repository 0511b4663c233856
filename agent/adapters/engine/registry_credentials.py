"""Reads the administrator's registry credentials, as `docker login` stores them.

Docker's daemon stores none: its command line reads this file and sends them, and so does the agent. Credential helpers
(`credHelpers`, `credsStore`: programs that return a secret) are not run.
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
    """`auth`: the credentials sent to the engine, empty = none. `source` names their origin; `problem` says why
    credentials that may exist could not be read."""

    auth: Mapping[str, str] = field(default_factory=dict, repr=False)
    source: str = ""
    problem: str = ""

    @property
    def secrets(self) -> tuple[str, ...]:
        """Texts that must not appear in messages."""
        return tuple(self.auth[key] for key in ("password", "identitytoken") if self.auth.get(key))


def docker_auth_files() -> tuple[Path, ...]:
    """The credentials file of Docker's command for this user. Uses passwd: services may have no HOME."""
    if folder := os.environ.get("DOCKER_CONFIG", ""):
        return (Path(folder) / "config.json",)
    try:
        home = pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        return ()
    return (Path(home) / ".docker/config.json",)


def registry_of(image: str) -> str:
    """The registry host (and port) of an image reference; Docker Hub if it names none."""
    first, slash, _ = image.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return DOCKER_HUB if first in _HUB_NAMES else first
    return DOCKER_HUB


def qualified(image: str) -> str:
    """The reference with its registry spelled out, so that credentials go to that registry only."""
    first, slash, _ = image.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return image
    return f"{DOCKER_HUB}/{image}" if slash else f"{DOCKER_HUB}/library/{image}"


def find_login(image: str, files: Sequence[Path]) -> Login:
    """The login from the first file that knows the image's registry. Never raises. Blocks on disk."""
    registry = registry_of(image)
    problem = ""
    for file in files:
        document, wrong = _read(file)
        if auth := _stored(document, registry):
            return Login(auth, str(file))
        helper = _mapping(document.get("credHelpers")).get(registry) or document.get("credsStore")
        if helper:
            wrong = f"the credential helper named in {file} is not run: give the function a registryConfig"
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
    """The host of a key: `https://index.docker.io/v1/` -> `docker.io` (old files store URLs)."""
    host = key.partition("://")[2] or key
    host = host.partition("/")[0]
    return DOCKER_HUB if host in _HUB_NAMES else host


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
