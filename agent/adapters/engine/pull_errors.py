"""Translates an engine's pull error into a reason and advice. The texts differ by engine, version and registry."""

from __future__ import annotations

from agent.adapters.engine.registry_credentials import Login, registry_of
from agent.core.errors import InstanceError

_DENIED = (
    "denied", "unauthorized", "authentication required", "no basic auth credentials", "forbidden",
    "incorrect username or password", "invalid username/password",
)  # fmt: skip
_ARCHITECTURE = ("no matching manifest", "no image found in manifest list", "no image found in image index")
_NOT_FOUND = (
    "manifest unknown", "name unknown", "not found", "no such image", "repository does not exist", "short-name",
    "invalid reference format", "404",
)  # fmt: skip
_PLAIN_HTTP = ("server gave http response to https client",)
_CERTIFICATE = ("x509", "certificate")
_RATE = ("toomanyrequests", "too many requests", "rate limit")
_UNREACHABLE = (
    "connection refused", "no such host", "timeout", "network is unreachable", "no route to host", "connection reset",
    "context deadline exceeded", "server misbehaving", "eof",
)  # fmt: skip


def pull_refused(image: str, text: str, login: Login | None = None) -> InstanceError:
    """The error for a pull that failed with `text`. Secrets of `login` are masked in the quoted text."""
    message = text
    for secret in login.secrets if login is not None else ():
        message = message.replace(secret, "***")
    reason, advice = _classify(message.lower(), registry_of(image), login)
    return InstanceError(reason, f"{image} can't be pulled: {advice} ({message[:500]})", image=image)


def _classify(text: str, registry: str, login: Login | None) -> tuple[str, str]:
    def mentions(phrases: tuple[str, ...]) -> bool:
        return any(phrase in text for phrase in phrases)

    if mentions(_ARCHITECTURE):
        return "IMAGE_PULL_FAILED", "it is not built for this host's architecture; build it for that"
    if mentions(_RATE):
        return "IMAGE_PULL_FAILED", f"{registry} limits the number of pulls; log in there, or wait"
    if mentions(_DENIED):
        return "IMAGE_PULL_DENIED", _login_advice(registry, login)
    if mentions(_NOT_FOUND):
        return "IMAGE_NOT_FOUND", f"{registry} has no such image; check name and tag"
    if mentions(_PLAIN_HTTP):
        fix = "add it to insecure-registries in /etc/docker/daemon.json, or set insecure = true in registries.conf"
        return "IMAGE_PULL_FAILED", f"{registry} has no TLS; {fix}"
    if mentions(_CERTIFICATE):
        fix = f"put its CA into /etc/docker/certs.d/{registry}/ca.crt (Podman: /etc/containers/certs.d)"
        return "IMAGE_PULL_FAILED", f"the certificate of {registry} is not trusted here; {fix}"
    if mentions(_UNREACHABLE):
        return "IMAGE_PULL_FAILED", f"{registry} can't be reached from this node; try again, or check its network"
    return "IMAGE_PULL_FAILED", "the engine failed; see its message"


def _login_advice(registry: str, login: Login | None) -> str:
    if login is None or not login.source:
        hint = f"; {login.problem}" if login is not None and login.problem else ""
        return (
            f"{registry} requires a login for it, or has no such image; give the function a registryConfig, "
            f"or run `docker login {registry}` (or `podman login`) as the agent's user{hint}"
        )
    return f"{registry} refused {login.source}, or has no such image; check user name, password and permissions"


def no_such_image(image: str, policy: str) -> InstanceError:
    """The image is absent and may not be pulled."""
    why = "runtime.engine.pull is never" if policy == "never" else "an id can't be pulled"
    return InstanceError(
        "IMAGE_NOT_FOUND", f"{image} is not on this node and {why}; pull or load it there first", image=image
    )


def wrong_architecture(image: str, found: str, expected: str) -> InstanceError:
    """The image is present but unusable: CPU emulators give no access to the GPU."""
    return InstanceError(
        "IMAGE_PULL_FAILED",
        f"{image} is made for {found}, this node is {expected}; build it for {expected}",
        image=image,
    )
