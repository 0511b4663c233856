"""The emulated driver versions and their differences, as data.

550 and 555 were observed on real drivers without a GPU. The rest comes from NVIDIA's release notes, cuda.h and
NVIDIA/cuda-checkpoint's issues; inferred facts are marked. PROFILES can be started; TABLE describes further versions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from agent.core.errors import InvalidArgumentError

INSUFFICIENT_DRIVER = "Insufficient driver"
"""The only output of cuda-checkpoint below CUDA 12.4; exit code 255."""

STATES = ("running", "locked", "checkpointed", "unknown")
STATES_WITH_FAILED = ("running", "locked", "checkpointed", "failed")
"""Inferred: newer drivers print `failed`."""

_TOGGLE = frozenset({"--toggle", "--pid", "--help"})
_ACTIONS = _TOGGLE | {"--get-state", "--get-restore-tid", "--action", "--timeout", "-t", "-p", "-h"}
_MAP = _ACTIONS | {"--device-map", "-d"}
_LAUNCH = _MAP | {"--launch-job", "-j"}


@dataclass(frozen=True, slots=True)
class Utility:
    """The program cuda-checkpoint of one driver: its flags, exit codes after an error and after --help, and the
    --get-state output for CUprocessState 0 to 3."""

    flags: frozenset[str]
    error_exit: int = 1
    help_exit: int = 0
    states: tuple[str, ...] = STATES


@dataclass(frozen=True, slots=True)
class Profile:
    """One driver version. `cuda` as in cuDriverGetVersion: 13000 is 13.0.

    utility: None = prints INSUFFICIENT_DRIVER. public_api: libcuda has cuCheckpointProcess*; otherwise only the utility
    can checkpoint. migration: restore takes gpuPairs. init_suffices: without persistence mode, only callers that have
    called cuInit may restore; otherwise none may. keeps_state: a restore after a planned OUT_OF_MEMORY can be retried;
    before 580 the process is stuck. startable: emulated, not only described. note: uncertainties."""

    name: str
    version: str
    cuda: int
    utility: Utility | None
    public_api: bool = False
    migration: bool = False
    init_suffices: bool = False
    keeps_state: bool = False
    startable: bool = True
    note: str = ""

    def defines(self) -> tuple[str, ...]:
        """Compiler flags: the libraries are built for one driver version, as real ones are."""
        program = self.utility or Utility(frozenset())
        numbers = {
            "CUDA_VERSION": self.cuda,
            "CHECKPOINTS": int(self.utility is not None),
            "PUBLIC_API": int(self.public_api),
            "MIGRATION": int(self.migration),
            "UTILITY_ACTIONS": int("--action" in program.flags),
            "UTILITY_MAP": int("--device-map" in program.flags),
            "UTILITY_FAILED": int("failed" in program.states),
            "ERROR_EXIT": program.error_exit,
            "HELP_EXIT": program.help_exit,
        }
        return (f'-DEMU_DRIVER_VERSION="{self.version}"', *(f"-DEMU_{key}={value}" for key, value in numbers.items()))


_570 = Profile("570", "570.172.08", 12080, Utility(_ACTIONS), public_api=True, init_suffices=True)
_580 = replace(
    _570, name="580", version="580.65.06", cuda=13000, utility=Utility(_MAP, states=STATES_WITH_FAILED),
    migration=True, keeps_state=True,
)  # fmt: skip
_AFTER_580 = replace(_580, utility=Utility(_LAUNCH, states=STATES_WITH_FAILED), startable=False)

TABLE = {
    profile.name: profile
    for profile in (
        Profile("535", "535.183.06", 12020, None),
        Profile("550", "550.163.01", 12040, Utility(_TOGGLE, error_exit=255, help_exit=255)),
        Profile("555", "555.58.02", 12050, Utility(_ACTIONS)),
        _570,
        replace(
            _570, name="575", version="575.57.08", cuda=12090, startable=False,
            note="some 575 builds already have --device-map",
        ),
        _580,
        replace(_AFTER_580, name="590", version="590.44.01", cuda=13010, note="--launch-job is not emulated"),
        replace(
            _AFTER_580, name="595", version="595", cuda=13020, note="adds arm64; its CUDA version is inferred",
        ),
        replace(
            _AFTER_580, name="610", version="610.57.04", cuda=13030,
            note="adds IPC within a job (--launch-job); its CUDA version is inferred",
        ),
        replace(
            _AFTER_580, name="615", version="615.71.09", cuda=13040,
            note="adds custom storage and the states CHECKPOINTING and RESTORING",
        ),
    )
}  # fmt: skip

PROFILES = {profile.name: profile for profile in TABLE.values() if profile.startable}


def find_profile(name: str) -> Profile:
    """Raises InvalidArgumentError EMULATED_PROFILE_UNKNOWN."""
    profile = PROFILES.get(name)
    if profile is None:
        known = "is described, but not emulated" if name in TABLE else "does not exist"
        raise InvalidArgumentError(
            "EMULATED_PROFILE_UNKNOWN",
            f"The driver profile {name!r} {known}; choose one of {', '.join(PROFILES)}.",
            profile=name,
        )
    return profile
