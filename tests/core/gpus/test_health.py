"""Cordons by GPU health: XIDs, failed samples, a silent driver."""

from __future__ import annotations

import random

import pytest

from agent.core.gpus import xid_codes
from agent.core.gpus.health import (
    LOST,
    NVML,
    SILENT,
    Effect,
    Event,
    Health,
    HealthLimits,
    LiftCordon,
    NoAnswer,
    PutCordon,
    Sampled,
    healthy,
    step,
)
from agent.core.gpus.xid_codes import meaning_of
from agent.core.types import SECOND_NS, GpuSample, Xid

A, B = "GPU-a", "GPU-b"
LIMITS = HealthLimits(bad_samples=3, good_samples=4, silent_ns=10 * SECOND_NS)
GOOD = (GpuSample(A), GpuSample(B))
BAD_A = (GpuSample(A, error="Unknown Error"), GpuSample(B))
LOST_A = (GpuSample(A, error="GPU is lost", lost=True), GpuSample(B))


def play(*events: Event, health: Health | None = None) -> tuple[Health, list[Effect]]:
    """Apply one event per second."""
    health = health or healthy([A, B], 0, LIMITS)
    effects: list[Effect] = []
    for second, event in enumerate(events, 1):
        health, caused = step(health, event, second * SECOND_NS)
        effects += caused
    return health, effects


@pytest.mark.parametrize("code", [46, 48, 54, 62, 64, 74, 79, 95, 110, 119, 120, 136, 140, 143, 151, 156, 158])
def test_fatal_xid_puts_a_lasting_cordon(code: int) -> None:
    _, (cordon,) = play(Xid(A, code))
    assert cordon == PutCordon((A,), f"XID_{code}: {meaning_of(code).text}", "xid", lasting=True)


@pytest.mark.parametrize(
    "code", [13, 31, 43, 45, 63, 68, 69, 92, 94, 109, 121, 137, 141, 144, 150, 154, 155, 157, 99999]
)
def test_xids_of_programs_and_unknown_ones_put_no_cordon(code: int) -> None:
    assert play(Xid(A, code))[1] == []
    assert meaning_of(code).text


def test_no_xid_is_both_fatal_and_a_note() -> None:
    assert xid_codes._FATAL.keys().isdisjoint(xid_codes._NOTES)


def test_xid_of_an_unknown_gpu_is_ignored() -> None:
    assert play(Xid("GPU-unknown", 79))[1] == []


def test_a_lost_gpu_is_cordoned_once_and_for_good() -> None:
    _, effects = play(Sampled(LOST_A), Sampled(LOST_A), *[Sampled(GOOD)] * 20, Sampled(LOST_A))
    (cordon,) = effects
    assert isinstance(cordon, PutCordon)
    assert (cordon.uuids, cordon.source, cordon.lasting) == ((A,), LOST, True)
    assert "GPU is lost" in cordon.reason


def test_few_failed_samples_put_no_cordon() -> None:
    assert play(*[Sampled(BAD_A), Sampled(BAD_A), Sampled(GOOD)] * 5)[1] == []


def test_failed_samples_in_a_row_cordon_and_good_ones_lift() -> None:
    bad, good = Sampled(BAD_A), Sampled(GOOD)
    health, effects = play(bad, bad, bad, bad)
    assert effects == [PutCordon((A,), "NVML_ERROR: Unknown Error", NVML, lasting=False)]
    health, effects = play(good, good, good, bad, good, good, good, health=health)
    assert effects == []  # it flaps
    assert play(good, health=health)[1] == [LiftCordon((A,), NVML)]


def test_a_silent_driver_cordons_all_until_it_answers() -> None:
    health, none_yet = play(*[NoAnswer()] * 9)
    assert none_yet == []
    health, effects = step(health, NoAnswer(), 10 * SECOND_NS)
    assert effects == (PutCordon((A, B), "DRIVER_SILENT: NVML has not answered for 10 s", SILENT, lasting=False),)
    health, effects = step(health, NoAnswer(), 11 * SECOND_NS)
    assert effects == ()
    health, effects = step(health, Sampled(GOOD), 12 * SECOND_NS)
    assert effects == (LiftCordon((A, B), SILENT),)
    assert step(health, NoAnswer(), 13 * SECOND_NS)[1] == ()  # counted anew


@pytest.mark.parametrize("seed", range(20))
def test_a_random_walk_keeps_the_cordons_it_should(seed: int) -> None:
    dice, health, now_ns = random.Random(seed), healthy([A, B], 0, LIMITS), 0
    steps: list[Event] = [Sampled(GOOD), Sampled(BAD_A), NoAnswer(), Sampled(LOST_A)]
    in_force: set[tuple[str, str]] = set()
    bad, good, answered_ns, ever_lost = 0, 0, 0, False
    for _ in range(500):
        now_ns += dice.choice([1, 1, 1, 4]) * SECOND_NS
        event = dice.choices(steps, [10, 6, 5, 0.02])[0]
        was_failing = (A, NVML) in in_force
        health, effects = step(health, event, now_ns)
        for effect in effects:
            for uuid in effect.uuids:
                place = (uuid, effect.source)
                assert (place in in_force) is isinstance(effect, LiftCordon), "put once, lifted once"
                (in_force.add if isinstance(effect, PutCordon) else in_force.discard)(place)
        if isinstance(event, Sampled):
            answered_ns = now_ns
            sample = event.samples[0]
            ever_lost |= sample.lost
            bad = bad + 1 if sample.error and not sample.lost else (bad if sample.lost else 0)
            good = 0 if sample.error else good + 1
        silent = isinstance(event, NoAnswer) and now_ns - answered_ns >= LIMITS.silent_ns
        assert ((B, SILENT) in in_force) is ((A, SILENT) in in_force) is silent
        assert ((A, LOST) in in_force) is ever_lost
        failing = (bad >= LIMITS.bad_samples or was_failing) and good < LIMITS.good_samples
        assert ((A, NVML) in in_force) is failing
        assert (B, NVML) not in in_force
        assert (B, LOST) not in in_force
