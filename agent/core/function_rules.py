"""The rules for a function's spec: Function Compute's ranges and Hibernode's own bounds.

The same check runs at a deploy (scheduler) and at a create (agent), since any program may call them. `s.yaml` has its
own messages with line numbers (`cli/fc3/schema.py`); a test keeps its ranges within these. An error names the field as
the protos do, and the fix.
"""

from __future__ import annotations

import ipaddress
import re
from typing import NoReturn

from agent.core.errors import InvalidArgumentError
from agent.core.sizes import size_text
from agent.core.types import MIB, SECOND_NS, ContainerOptions, FunctionSpec, HealthCheck, Hooks, Volume

HOST_IMAGE = "host"
MAX_CONCURRENCY = 200
MAX_TIMEOUT_NS = 86_400 * SECOND_NS
MAX_QUEUE_LENGTH = 100_000
MAX_QUEUE_TIMEOUT_NS = 3_600 * SECOND_NS
MAX_WAKE_FACTOR = 1_000_000
MAX_ENVIRONMENT_BYTES = 4096
MAX_ARGUMENT_BYTES = 128 * 1024
"""Entrypoint and command together: Linux's bound for one argument."""
MAX_GPUS = 64
MAX_VCPU_MILLIS = 1_024_000
MAX_SIZE_BYTES = 1 << 50
RESERVED_PREFIX = "FC_"

LEAST_CONTAINER_BYTES = 6 * MIB
"""The least memory with which engines start a container."""
MAX_PIDS = 4_194_304
MAX_OPEN_FILES = 1_048_576
MAX_EXTRA_HOSTS = 64
MAX_NODE_LABELS = 32
MAX_VOLUMES = 32
MAX_PATH_BYTES = 4095
MAX_LOGIN_BYTES = 16 * 1024
"""Function Compute's variable for the port that an instance listens on."""
SHM_VARIABLE = "FCGPU_RUNTIME_SHMSIZE"
"""Function Compute's variable for the size of /dev/shm, in bytes."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9._-]{0,64}", re.ASCII)
# Some of these texts become header values (x-fc-region, x-fc-function-handler): no line ends.
_VISIBLE = re.compile(r"[\x21-\x7e]*", re.ASCII)
_PRINTABLE = re.compile(r"[\x20-\x7e]*", re.ASCII)
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,31})?", re.ASCII)
_HOST_NAME = re.compile(
    r"[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*", re.ASCII
)
# A registry's image reference, or an image id. It becomes part of a path of the engine's API.
_IMAGE_PART = r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*"
_IMAGE = re.compile(
    rf"(?:[A-Za-z0-9][A-Za-z0-9.-]*(?::[0-9]{{1,5}})?/)?{_IMAGE_PART}(?:/{_IMAGE_PART})*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?",
    re.ASCII,
)
_IMAGE_ID = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_SIZE = re.compile(r"[0-9]{1,16}", re.ASCII)


def check_function(spec: FunctionSpec) -> None:
    """Raise InvalidArgumentError SPEC_INVALID for the first wrong field of `spec`, with `field` in its metadata."""
    if not _NAME.fullmatch(spec.name):
        wrong("name", "must be 1 to 64 letters, digits, `_` or `-`")
    if not _REVISION.fullmatch(spec.revision):
        wrong("revision", "must be at most 64 letters, digits, `.`, `_` or `-`")
    _check_program(spec)
    bounded("port", spec.port, 1, 65535)
    bounded("instance_concurrency", spec.instance_concurrency, 1, MAX_CONCURRENCY)
    bounded("timeout_ns", spec.timeout_ns, 1, MAX_TIMEOUT_NS)
    # With 0 no request could wait for a wake: a frozen function could never be called again.
    bounded("queue_length", spec.queue_length, 1, MAX_QUEUE_LENGTH)
    bounded("queue_timeout_ns", spec.queue_timeout_ns, 1, MAX_QUEUE_TIMEOUT_NS)
    _check_sizes(spec)
    bounded("idle_policy.freeze_after_ns", spec.idle.freeze_after_ns, 0, MAX_TIMEOUT_NS)
    bounded("idle_policy.min_awake_ns", spec.idle.min_awake_ns, 0, MAX_TIMEOUT_NS)
    if not 0 <= spec.wake_factor <= MAX_WAKE_FACTOR:
        wrong("wake_factor", f"must be 0 to {MAX_WAKE_FACTOR}")
    _check_hooks(spec.hooks)
    if spec.health_check is not None:
        _check_health(spec.health_check)
    _check_environment(spec.environment)
    _check_container(spec)
    _check_node_labels(spec.node_labels)


def shm_bytes(spec: FunctionSpec) -> int:
    """The size of /dev/shm: the spec's, else FCGPU_RUNTIME_SHMSIZE of its environment; 0 = the engine's default
    (64 MiB). Raises InvalidArgumentError SPEC_INVALID if the variable is not a size."""
    if spec.container.shm_bytes:
        return spec.container.shm_bytes
    text = dict(spec.environment).get(SHM_VARIABLE, "").strip()
    if not text:
        return 0
    if not _SIZE.fullmatch(text) or not 0 <= int(text) <= MAX_SIZE_BYTES:
        wrong(f"environment.{SHM_VARIABLE}", f"must be a number of bytes, 0 to {MAX_SIZE_BYTES}")
    return int(text)


def bounded(field: str, value: int, low: int, high: int) -> None:
    """Raises InvalidArgumentError unless low <= value <= high."""
    if not low <= value <= high:
        show = size_text if field.endswith("_bytes") else str
        wrong(field, f"must be {show(low)} to {show(high)}, got {show(value)}")


def wrong(field: str, problem: str) -> NoReturn:
    """Raise InvalidArgumentError SPEC_INVALID for `field`."""
    raise InvalidArgumentError("SPEC_INVALID", f"{field[:100]}: {problem}", field=field[:100])


def _check_program(spec: FunctionSpec) -> None:
    if not spec.image:
        wrong("image", "is required; `host` runs the entrypoint on the host")
    if len(spec.image) > 1024 or not (_IMAGE.fullmatch(spec.image) or _IMAGE_ID.fullmatch(spec.image)):
        wrong("image", "must be an image reference such as registry.example.com/team/ocr:3, at most 1024 characters")
    if spec.image == HOST_IMAGE and not (spec.entrypoint or spec.command):
        wrong("entrypoint", "is required with image `host`")
    for field, words in (("entrypoint", spec.entrypoint), ("command", spec.command)):
        if any("\0" in word for word in words):
            wrong(field, "an argument can't hold a NUL")
    total = sum(len(word.encode("utf-8", "surrogatepass")) + 1 for word in (*spec.entrypoint, *spec.command))
    if total > MAX_ARGUMENT_BYTES:
        wrong("command", f"has {total} bytes together with entrypoint, more than {MAX_ARGUMENT_BYTES}")
    for field, text, most in (("handler", spec.handler, 128), ("region", spec.region, 64)):
        if len(text) > most or not _PRINTABLE.fullmatch(text):
            wrong(field, f"must be at most {most} printable ASCII characters")


def _check_sizes(spec: FunctionSpec) -> None:
    bounded("gpu.count", spec.gpu.count, 0, MAX_GPUS)
    bounded("gpu.memory_bytes", spec.gpu.memory_bytes, 0, MAX_SIZE_BYTES)
    for field, text in (("gpu.model", spec.gpu.model), ("gpu.gpu_type", spec.gpu.gpu_type)):
        if len(text) > 128 or not _PRINTABLE.fullmatch(text):
            wrong(field, "must be at most 128 printable ASCII characters")
    bounded("memory_bytes", spec.memory_bytes, 1, MAX_SIZE_BYTES)
    bounded("disk_bytes", spec.disk_bytes, 0, MAX_SIZE_BYTES)
    bounded("vcpu_millis", spec.vcpu_millis, 1, MAX_VCPU_MILLIS)


def _check_hooks(hooks: Hooks) -> None:
    """Function Compute's bounds: 300 s for the initializer, 90 s for the others."""
    named = (
        ("initializer", hooks.initializer, 300),
        ("pre_freeze", hooks.pre_freeze, 90),
        ("pre_stop", hooks.pre_stop, 90),
    )
    for name, hook, most_s in named:
        if hook is not None:
            bounded(f"hooks.{name}.timeout_ns", hook.timeout_ns, 1, most_s * SECOND_NS)


def _check_health(check: HealthCheck) -> None:
    if not check.path.startswith("/") or len(check.path) > 2048 or not _VISIBLE.fullmatch(check.path):
        wrong("health_check.path", "must begin with / and be at most 2048 visible ASCII characters")
    bounded("health_check.initial_delay_ns", check.initial_delay_ns, 0, 120 * SECOND_NS)
    bounded("health_check.period_ns", check.period_ns, 1, 120 * SECOND_NS)
    bounded("health_check.timeout_ns", check.timeout_ns, 1, 3 * SECOND_NS)
    bounded("health_check.failure_threshold", check.failure_threshold, 1, 120)
    bounded("health_check.success_threshold", check.success_threshold, 1, 120)


def _check_environment(environment: tuple[tuple[str, str], ...]) -> None:
    """Messages hold names only: values are secrets."""
    total = 0
    for name, value in environment:
        total += len(name.encode("utf-8", "surrogatepass")) + len(value.encode("utf-8", "surrogatepass"))
        if name.startswith(RESERVED_PREFIX):
            wrong(f"environment.{name}", f"the prefix {RESERVED_PREFIX} is reserved; choose another name")
        if not name or "=" in name or "\0" in name + value:
            wrong("environment", "holds an impossible name or value of an environment variable")
    if total > MAX_ENVIRONMENT_BYTES:
        wrong("environment", f"has {total} bytes in total, more than {MAX_ENVIRONMENT_BYTES}")


def _check_container(spec: FunctionSpec) -> None:
    options = spec.container
    if spec.image == HOST_IMAGE:
        if options != ContainerOptions():
            wrong("container", "is not possible with image `host`; leave it out")
        return
    bounded("memory_bytes", spec.memory_bytes, LEAST_CONTAINER_BYTES, MAX_SIZE_BYTES)
    bounded("container.shm_bytes", options.shm_bytes, 0, MAX_SIZE_BYTES)
    shm_bytes(spec)
    bounded("container.pids_limit", options.pids_limit, 0, MAX_PIDS)
    bounded("container.open_files", options.open_files, 0, MAX_OPEN_FILES)
    if options.user and not _USER.fullmatch(options.user):
        wrong("container.user", "must be a name or number, or two with a colon: user, user:group, 1000, 1000:1000")
    _check_extra_hosts(options.extra_hosts)
    if len(options.volumes) > MAX_VOLUMES:
        wrong("container.volumes", f"has {len(options.volumes)} entries, more than {MAX_VOLUMES}")
    for index, volume in enumerate(options.volumes):
        _check_volume(f"container.volumes[{index}]", volume)
    if options.registry is not None:
        _check_login(options.registry.username, options.registry.password)


def _check_node_labels(labels: tuple[tuple[str, str], ...]) -> None:
    if len(labels) > MAX_NODE_LABELS:
        wrong("node_labels", f"has {len(labels)} entries, more than {MAX_NODE_LABELS}")
    for key, value in labels:
        if not key or len(key) > 128 or len(value) > 128 or not _PRINTABLE.fullmatch(key + value):
            wrong("node_labels", "keys and values must be at most 128 printable ASCII characters, keys not empty")


def _check_extra_hosts(entries: tuple[tuple[str, str], ...]) -> None:
    if len(entries) > MAX_EXTRA_HOSTS:
        wrong("container.extra_hosts", f"has {len(entries)} entries, more than {MAX_EXTRA_HOSTS}")
    for index, (name, address) in enumerate(entries):
        field = f"container.extra_hosts[{index}]"
        if len(name) > 253 or not _HOST_NAME.fullmatch(name):
            wrong(field, "must begin with a host name, such as db.example.com")
        try:
            ipaddress.ip_address(address)
        except ValueError:
            wrong(field, "must name an IP address, such as 10.0.0.7")
        if "%" in address:
            wrong(field, "must name an IP address without a zone")


def _check_volume(field: str, volume: Volume) -> None:
    """Check the paths' form. The node checks whether it allows the folder."""
    for key, path in (("host_path", volume.host_path), ("container_path", volume.container_path)):
        if not path.startswith("/") or ".." in path.split("/"):
            wrong(f"{field}.{key}", "must be an absolute path without `..`")
        if not path.strip("/."):
            wrong(f"{field}.{key}", "must not be /")
        if "\0" in path or len(path.encode("utf-8", "surrogatepass")) > MAX_PATH_BYTES:
            wrong(f"{field}.{key}", f"must be at most {MAX_PATH_BYTES} bytes, without NUL")


def _check_login(username: str, password: str) -> None:
    """Messages repeat no part of the login."""
    if not username or not password:
        wrong("container.registry", "needs user name and password")
    if (
        len(username.encode("utf-8", "surrogatepass")) + len(password.encode("utf-8", "surrogatepass"))
        > MAX_LOGIN_BYTES
    ):
        wrong("container.registry", f"is longer than {MAX_LOGIN_BYTES} bytes")
    if "\0" in username + password:
        wrong("container.registry", "must not hold a NUL")
