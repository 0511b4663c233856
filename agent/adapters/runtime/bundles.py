"""Bundle folders: `<state_dir>/instances/<uid>/` is the truth about a container, independent of any agent.

    handle.json   who it is (boot, pid, start time), where it listens, its cgroup, whose it is; written before it runs
    scratch/      its working directory and HOME, owned by its user; a container of an engine has none

No fsync: the record must outlive the agent, not the host. After a reboot the process is gone and the record with it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import msgspec

from agent.adapters.kernel.remove_tree import remove_tree
from agent.core.types import Handle
from agent.log import get_logger

FORMAT = 1
UID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

log = get_logger()


@dataclass(frozen=True, slots=True)
class WorkloadUser:
    """The user a workload runs as: resolved once, by the agent, from `runtime.process.user`."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Record:
    """The contents of handle.json. `stop_signal`: an image's own, which asks its main process to end; 0 = SIGTERM."""

    version: int
    state_uuid: str
    handle: Handle
    stop_signal: int = 0


@dataclass(frozen=True, slots=True)
class Bundle:
    """One folder found. `handle` is None when the start never got as far as a record. `foreign`: the record names
    another state directory (a copied folder); such a container is never touched."""

    uid: str
    handle: Handle | None
    foreign: bool = False
    stop_signal: int = 0

    @property
    def container(self) -> Handle | None:
        """The handle of an engine's container of ours, None for anything else."""
        return self.handle if self.handle and self.handle.container_id and not self.foreign else None


class Bundles:
    """The bundle folders of one state directory."""

    def __init__(self, state_dir: Path, state_uuid: str) -> None:
        self._folder = state_dir / "instances"
        self._state_uuid = state_uuid

    def scratch(self, uid: str) -> Path:
        return self._folder / uid / "scratch"

    def create(self, uid: str, user: WorkloadUser | None) -> None:
        """Make the folder and its scratch. FileExistsError if there is one: the caller destroys it first."""
        self._folder.mkdir(mode=0o711, parents=True, exist_ok=True)
        (self._folder / uid).mkdir(mode=0o711)
        scratch = self.scratch(uid)
        scratch.mkdir(mode=0o700)
        if user:
            os.chown(scratch, user.uid, user.gid)

    def create_bare(self, uid: str) -> None:
        """Make the folder alone, or take the one that is there."""
        (self._folder / uid).mkdir(mode=0o711, parents=True, exist_ok=True)

    def write(self, handle: Handle, stop_signal: int = 0) -> None:
        """Record the container: whole or not at all."""
        target = self._folder / handle.uid / "handle.json"
        record = _Record(FORMAT, self._state_uuid, handle, stop_signal)
        partial = target.with_suffix(".partial")
        partial.write_bytes(msgspec.json.encode(record))
        partial.chmod(0o600)
        partial.replace(target)

    def read(self, uid: str) -> Bundle | None:
        """One bundle; None if there is no folder of that name."""
        folder = self._folder / uid
        if not folder.is_dir():
            return None
        try:
            record = msgspec.json.decode((folder / "handle.json").read_bytes(), type=_Record)
        except (FileNotFoundError, msgspec.DecodeError):
            # Not there yet, or torn by a power failure: in both cases no process of this boot is behind it.
            return Bundle(uid, None)
        return Bundle(uid, record.handle, record.state_uuid != self._state_uuid, record.stop_signal)

    def all(self) -> list[Bundle]:
        """Every bundle, also of containers that have ended since."""
        try:
            uids = sorted(os.listdir(self._folder))
        except FileNotFoundError:
            return []
        return [bundle for uid in uids if (bundle := self.read(uid))]

    def remove(self, uid: str) -> None:
        """Delete it with its scratch. Idempotent; what can't be removed stays and is logged. May take long: not for
        the loop's thread."""
        try:
            remove_tree(self._folder / uid)
        except OSError as error:
            log.error("runtime.scratch_stays", uid=uid, error=str(error))
