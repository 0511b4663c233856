"""Bundle folders: `<state_dir>/instances/<uid>/` is the record of a container that outlives any agent.

    handle.json   identity (boot, pid, start time), address, cgroup, owner; written before the workload runs
    scratch/      working directory and HOME, owned by its user; an engine's container has none

No fsync: the record must outlive the agent, not the host. After a reboot the process is gone.
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
    """The user a workload runs as, resolved once from `runtime.process.user`."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Record:
    """The contents of handle.json."""

    version: int
    state_uuid: str
    handle: Handle
    stop_signal: int = 0  # the image's own; 0 = SIGTERM


@dataclass(frozen=True, slots=True)
class _Version:
    """What a record of any version has."""

    version: int


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle folder."""

    uid: str
    handle: Handle | None  # None: the start did not get as far as a record
    foreign: bool = False  # of another state directory (a copied folder), or of a newer version: never touched
    stop_signal: int = 0

    @property
    def container(self) -> Handle | None:
        """The handle if this is an engine's container of ours."""
        return self.handle if self.handle and self.handle.container_id and not self.foreign else None


class Bundles:
    """The bundle folders of one state directory."""

    def __init__(self, state_dir: Path, state_uuid: str) -> None:
        self._folder = state_dir / "instances"
        self._state_uuid = state_uuid

    def scratch(self, uid: str) -> Path:
        return self._folder / uid / "scratch"

    def create(self, uid: str, user: WorkloadUser | None) -> None:
        """Make the folder and its scratch. Raises FileExistsError if there is one: the caller destroys it first."""
        self._folder.mkdir(mode=0o711, parents=True, exist_ok=True)
        (self._folder / uid).mkdir(mode=0o711)
        scratch = self.scratch(uid)
        scratch.mkdir(mode=0o700)
        if user:
            os.chown(scratch, user.uid, user.gid)

    def create_bare(self, uid: str) -> None:
        """Make the folder only; use an existing one."""
        (self._folder / uid).mkdir(mode=0o711, parents=True, exist_ok=True)

    def write(self, handle: Handle, stop_signal: int = 0) -> None:
        """Record the container atomically."""
        target = self._folder / handle.uid / "handle.json"
        record = _Record(FORMAT, self._state_uuid, handle, stop_signal)
        partial = target.with_suffix(".partial")
        partial.write_bytes(msgspec.json.encode(record))
        partial.chmod(0o600)
        partial.replace(target)

    def read(self, uid: str) -> Bundle | None:
        """One bundle; None if there is no such folder."""
        folder = self._folder / uid
        if not folder.is_dir():
            return None
        try:
            data = (folder / "handle.json").read_bytes()
        except FileNotFoundError:
            return Bundle(uid, None)
        try:
            record = msgspec.json.decode(data, type=_Record)
        except msgspec.DecodeError as error:
            # Torn by a power failure, then no process of this boot belongs to it; or of a newer version.
            newer = _is_newer(data)
            if newer:
                log.error("runtime.bundle_unreadable", uid=uid, error=str(error))
            return Bundle(uid, None, foreign=newer)
        return Bundle(uid, record.handle, record.state_uuid != self._state_uuid, record.stop_signal)

    def all(self) -> list[Bundle]:
        """Every bundle, ended containers included."""
        try:
            uids = sorted(os.listdir(self._folder))
        except FileNotFoundError:
            return []
        return [bundle for uid in uids if (bundle := self.read(uid))]

    def remove(self, uid: str) -> None:
        """Delete it with its scratch, and log what can't be removed. Idempotent. Slow: call it outside the loop's
        thread."""
        try:
            remove_tree(self._folder / uid)
        except OSError as error:
            log.error("runtime.scratch_stays", uid=uid, error=str(error))


def _is_newer(data: bytes) -> bool:
    try:
        return msgspec.json.decode(data, type=_Version).version > FORMAT
    except msgspec.DecodeError:
        return False
