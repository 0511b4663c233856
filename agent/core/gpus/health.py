"""GPU health: `step` takes NVML's answers and returns the cordons to put and to lift. Pure; times are monotonic ns.

Cordoned are, besides a GPU with a fatal XID (`xid_codes.py`):

- a device that NVML reports lost: for good
- a device with several failed samples in a row: until several are good in a row, so that a flapping one stays cordoned
- all devices while the driver does not answer
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import assert_never

from agent.core.gpus.xid_codes import meaning_of
from agent.core.types import SECOND_NS, GpuSample, Xid

XID, LOST, NVML, SILENT = "xid", "lost", "nvml", "silent"
"""The sources of these cordons; each has at most one on a GPU."""


@dataclass(frozen=True, slots=True)
class HealthLimits:
    """Samples in a row that cordon a device (`bad`) and that lift the cordon (`good`); a driver that has not answered
    for `silent_ns` cordons all."""

    bad_samples: int = 5
    good_samples: int = 10
    silent_ns: int = 10 * SECOND_NS


@dataclass(frozen=True, slots=True)
class DeviceHealth:
    """Failed and good samples in a row (one of the two is 0), and the cordons in force."""

    bad: int = 0
    good: int = 0
    failing: bool = False
    lost: bool = False


@dataclass(frozen=True, slots=True)
class Health:
    """All devices of the node by uuid. `answered_ns`: the driver's last answer; `silent`: all are cordoned."""

    devices: Mapping[str, DeviceHealth]
    answered_ns: int
    silent: bool = False
    limits: HealthLimits = field(default_factory=HealthLimits)


def healthy(uuids: Sequence[str], now_ns: int, limits: HealthLimits | None = None) -> Health:
    """The health of a node at start: no cordons."""
    return Health({uuid: DeviceHealth() for uuid in uuids}, now_ns, limits=limits or HealthLimits())


# ---- events and effects -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sampled:
    """The driver answered with these samples; devices without a sample keep their health."""

    samples: tuple[GpuSample, ...]


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """The driver did not answer."""


Event = Sampled | NoAnswer | Xid


@dataclass(frozen=True, slots=True)
class PutCordon:
    """Cordon these GPUs. `reason` begins with a word in UPPER_SNAKE; `lasting` as in the allocator's `Cordon`."""

    uuids: tuple[str, ...]
    reason: str
    source: str
    lasting: bool


@dataclass(frozen=True, slots=True)
class LiftCordon:
    """Lift the source's cordon."""

    uuids: tuple[str, ...]
    source: str


Effect = PutCordon | LiftCordon


# ---- step ---------------------------------------------------------------------------------------------------------


def step(health: Health, event: Event, now_ns: int) -> tuple[Health, tuple[Effect, ...]]:
    """The node's health after the event, and the effects. Devices that the node does not have are ignored."""
    match event:
        case Sampled(samples):
            return _sampled(health, samples, now_ns)
        case NoAnswer():
            return _no_answer(health, now_ns)
        case Xid(uuid, code):
            return health, _xid(health, uuid, code)
        case _:
            assert_never(event)


def _sampled(health: Health, samples: Sequence[GpuSample], now_ns: int) -> tuple[Health, tuple[Effect, ...]]:
    effects: list[Effect] = []
    if health.silent:
        effects.append(LiftCordon(tuple(health.devices), SILENT))
    devices = dict(health.devices)
    for sample in samples:
        if sample.uuid in devices:
            devices[sample.uuid], caused = _seen(devices[sample.uuid], sample, health.limits)
            effects.extend(caused)
    return replace(health, devices=devices, answered_ns=now_ns, silent=False), tuple(effects)


def _seen(device: DeviceHealth, sample: GpuSample, limits: HealthLimits) -> tuple[DeviceHealth, list[Effect]]:
    here = (sample.uuid,)
    effects: list[Effect] = []
    if sample.lost and not device.lost:
        device = replace(device, lost=True)
        text = f"GPU_LOST: {sample.error or 'NVML lost it'}; reset the GPU, then restart the agent, or restart the host"
        effects.append(PutCordon(here, text, LOST, lasting=True))
    if not sample.error:
        device = replace(device, bad=0, good=min(device.good + 1, limits.good_samples))
        if device.failing and device.good >= limits.good_samples:
            device = replace(device, failing=False)
            effects.append(LiftCordon(here, NVML))
    elif not sample.lost:
        device = replace(device, good=0, bad=min(device.bad + 1, limits.bad_samples))
        if not device.failing and device.bad >= limits.bad_samples:
            device = replace(device, failing=True)
            effects.append(PutCordon(here, f"NVML_ERROR: {sample.error}", NVML, lasting=False))
    else:
        device = replace(device, good=0)
    return device, effects


def _no_answer(health: Health, now_ns: int) -> tuple[Health, tuple[Effect, ...]]:
    if health.silent or now_ns - health.answered_ns < health.limits.silent_ns:
        return health, ()
    seconds = health.limits.silent_ns // SECOND_NS
    text = f"DRIVER_SILENT: NVML has not answered for {seconds} s"
    return replace(health, silent=True), (PutCordon(tuple(health.devices), text, SILENT, lasting=False),)


def _xid(health: Health, uuid: str, code: int) -> tuple[Effect, ...]:
    meaning = meaning_of(code)
    if not meaning.fatal or uuid not in health.devices:
        return ()
    return (PutCordon((uuid,), f"XID_{code}: {meaning.text}", XID, lasting=True),)
