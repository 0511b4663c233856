"""Which driver is emulated: what differs between versions, as data (facts: NVIDIA's release notes and cuda.h)."""

from __future__ import annotations

from dataclasses import dataclass

from agent.core.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True)
class Profile:
    """One driver version. `cuda` as cuDriverGetVersion says it: 13000 is 13.0.

    migration: restore takes gpuPairs, and the utility `--device-map`. recovers: a restore that failed for lack of
    VRAM leaves the process checkpointed, to be tried again; without it the process is stuck for good.
    """

    name: str
    version: str
    cuda: int
    migration: bool
    recovers: bool

    def defines(self) -> tuple[str, ...]:
        """Compiler flags: the libraries are built for one driver version, as the real ones are."""
        return (
            f'-DEMU_DRIVER_VERSION="{self.version}"',
            f"-DEMU_CUDA_VERSION={self.cuda}",
            f"-DEMU_MIGRATION={int(self.migration)}",
        )


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("570", "570.172.08", 12080, migration=False, recovers=False),
        Profile("580", "580.65.06", 13000, migration=True, recovers=True),
    )
}


def find_profile(name: str) -> Profile:
    """Raises InvalidArgumentError EMULATED_PROFILE_UNKNOWN."""
    profile = PROFILES.get(name)
    if profile is None:
        raise InvalidArgumentError(
            "EMULATED_PROFILE_UNKNOWN",
            f"There is no emulated driver {name!r}; choose one of {', '.join(PROFILES)}.",
            profile=name,
        )
    return profile
