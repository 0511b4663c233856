"""The emulated GPUs: an identity stored in the directory, memory, and NVML state."""

from __future__ import annotations

import os
import secrets
import uuid
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from agent.core.errors import InvalidArgumentError
from agent.emulated.models import Model, find_model
from agent.emulated.options import Options
from agent.emulated.protocol import DEVICE, ComputeMode
from agent.emulated.vram import Vram

_IDENTITY = "identity"


@dataclass(slots=True)
class Device:
    """One GPU. `uuid`: its 16 bytes. The name starts with "Emulated", so no output can pass for real hardware's.

    nvml_error: nvmlReturn_t of every NVML call on it, 0 = none. silent: NVML calls on it hang."""

    index: int
    uuid: uuid.UUID
    model: Model
    vram: Vram
    persistence: bool
    mig: bool = False
    compute_mode: ComputeMode = ComputeMode.DEFAULT
    nvml_error: int = 0
    silent: bool = False

    @property
    def name(self) -> str:
        return f"Emulated {self.model.name}"

    @property
    def uuid_text(self) -> str:
        return f"GPU-{self.uuid}"

    def set_mig(self, on: bool) -> None:
        """Raises InvalidArgumentError EMULATED_MIG_UNSUPPORTED if the model has no MIG."""
        if on and not self.model.mig:
            raise InvalidArgumentError(
                "EMULATED_MIG_UNSUPPORTED",
                f"A {self.model.name} has no MIG; use a model that does, such as A100, H100 or H20.",
            )
        self.mig = on

    def encode(self) -> bytes:
        """`struct emu_device`."""
        major, minor = self.model.capability
        return DEVICE.pack(
            self.uuid.bytes,
            self.name.encode(),
            self.vram.total_bytes,
            major,
            minor,
            self.model.architecture,
            self.index + 1,
            self.model.pci_id,
            self.model.multiprocessors,
        )


def read_identity(directory: Path) -> uuid.UUID:
    """The directory's random id, created on first use. The GPUs' UUIDs derive from it: stable here, unique
    elsewhere."""
    path = directory / _IDENTITY
    if not path.exists():
        fresh = directory / f".{_IDENTITY}.{os.getpid()}"
        fresh.write_text(secrets.token_hex(16) + "\n")
        fresh.rename(path)
    return uuid.UUID(hex=path.read_text().strip())


def make_devices(options: Options, executor: Executor) -> list[Device]:
    """Raises InvalidArgumentError EMULATED_MODEL_UNKNOWN or EMULATED_MIG_UNSUPPORTED."""
    model = find_model(options.model)
    identity = read_identity(options.directory)
    devices = [
        Device(
            index=index,
            uuid=uuid.uuid5(identity, f"gpu{index}"),
            model=model,
            vram=Vram(f"emulated-gpu{index}", options.memory_bytes, executor),
            persistence=options.persistence,
            compute_mode=options.compute_mode,
        )
        for index in range(options.gpus)
    ]
    for device in devices:
        device.set_mig(options.mig)
    return devices
