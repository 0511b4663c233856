"""Random walks on a host with little memory: the ledger never reserves the same byte twice.

The model has the true sizes (images, other memory use); the ledger knows them from answers and, after a restart of the
agent, partly from estimates.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from agent.core.gpus.host_memory import MemoryLedger
from agent.core.types import MIB

TOTAL, RESERVE, LIMIT = 4096 * MIB, 256 * MIB, 2048 * MIB


@dataclass
class Life:
    """The true memory of one instance: `wanted` during a freeze, `held` while it is frozen."""

    floor: int
    wanted: int = 0
    held: int = 0

    @property
    def to_come(self) -> int:
        return max(self.floor, self.wanted, self.held) - self.held


@dataclass
class Host:
    dice: random.Random
    limit: int
    ledger: MemoryLedger = field(init=False)
    lives: dict[str, Life] = field(default_factory=dict)
    others: int = 512 * MIB
    born: int = 0
    refusals: int = 0
    admissions: int = 0

    def __post_init__(self) -> None:
        self.ledger = MemoryLedger(self.limit, RESERVE)

    @property
    def available(self) -> int:
        return TOTAL - self.others - sum(life.held for life in self.lives.values())

    @property
    def to_come(self) -> int:
        return sum(life.to_come for life in self.lives.values())

    def admitted(self, before: MemoryLedger, short: str) -> bool:
        if short:
            self.refusals += 1
            assert self.ledger is before, "a refusal changes nothing"
            return False
        self.admissions += 1
        if self.ledger.reserved_bytes > before.reserved_bytes:
            assert not self.limit or self.ledger.reserved_bytes <= self.limit
            assert self.ledger.outstanding_bytes + RESERVE <= self.available
        return True

    def create(self) -> None:
        uid, floor = f"i-{self.born}", self.dice.choice((0, 0, self.some()))
        self.born += 1
        before = self.ledger
        self.ledger, short = before.pledge(uid, floor, self.available)
        if self.admitted(before, short):
            self.lives[uid] = Life(floor)

    def freeze_begins(self, uid: str) -> None:
        life, before = self.lives[uid], self.ledger
        wanted = self.some()
        self.ledger, short = before.reserve(uid, wanted, self.available)
        if self.admitted(before, short):
            life.wanted = wanted

    def freeze_ends(self, uid: str) -> None:
        life = self.lives[uid]
        if self.dice.random() < 0.7:
            life.held, life.wanted = life.wanted, 0
            self.ledger = self.ledger.took(uid, life.held)
        else:  # rolled back
            life.wanted = 0
            self.ledger = self.ledger.restored(uid)

    def wake(self, uid: str) -> None:
        self.lives[uid].held = 0
        self.ledger = self.ledger.restored(uid)

    def measured(self, uid: str) -> None:
        life, before, floor = self.lives[uid], self.ledger, self.some()
        self.ledger, short = before.pledge(uid, floor, self.available)
        if self.admitted(before, short):
            life.floor = floor

    def end(self, uid: str) -> None:
        del self.lives[uid]
        self.ledger = self.ledger.forget(uid)

    def others_change(self) -> None:
        room = self.available - RESERVE - self.to_come
        self.others = max(0, self.others + self.dice.randint(-256 * MIB, max(0, min(room, 256 * MIB))))

    def restart(self) -> None:
        """The agent restarts: freezes have ended, sizes are known or bounded from above."""
        for uid, life in list(self.lives.items()):
            if life.wanted:
                self.freeze_ends(uid)
        self.ledger = MemoryLedger(self.limit, RESERVE)
        for uid, life in self.lives.items():
            self.ledger = self.ledger.promised(uid, life.floor)
            if life.held:
                estimated = self.dice.random() < 0.3
                size = life.held + estimated * self.some()
                self.ledger = self.ledger.took(uid, size, estimated=estimated)

    def some(self) -> int:
        return self.dice.randint(1, 1024) * MIB

    def step(self) -> None:
        choice = self.dice.random()
        if choice < 0.04 or not self.lives:
            return self.create()
        if choice < 0.06:
            return self.restart()
        if choice < 0.12:
            return self.others_change()
        uid = self.dice.choice(list(self.lives))
        life = self.lives[uid]
        if choice < 0.15:
            return self.end(uid)
        if life.held:
            return self.wake(uid)
        if life.wanted:
            return self.freeze_ends(uid)
        return self.measured(uid) if choice < 0.25 else self.freeze_begins(uid)

    def check(self) -> None:
        assert self.to_come + RESERVE <= self.available, "reserved memory that the host lacks"
        assert self.ledger.outstanding_bytes >= self.to_come, "the same bytes could be reserved again"
        true = sum(max(life.floor, life.wanted, life.held) for life in self.lives.values())
        assert self.ledger.reserved_bytes >= true
        assert set(self.ledger.reservations) == set(self.lives)


@pytest.mark.parametrize("limit", [0, LIMIT])
@pytest.mark.parametrize("seed", range(8))
def test_no_byte_is_reserved_twice(seed: int, limit: int) -> None:
    host = Host(random.Random(seed), limit)
    for _ in range(1500):
        host.step()
        host.check()
    assert min(host.refusals, host.admissions) > 50, "the host is neither empty nor full all the time"
    for uid in list(host.lives):
        host.end(uid)
    assert not host.ledger.reservations
    assert (host.ledger.reserved_bytes, host.ledger.outstanding_bytes) == (0, 0)
