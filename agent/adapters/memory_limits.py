"""Raising an instance's own memory limit for as long as its GPU image is in host memory.

The copy of VRAM is charged to the instance's memory cgroup, and running into its limit is an OOM kill in
mid-checkpoint (facts/emulated-driver.md, pitfalls 7 and 8). What the limit was is durable in `<folder>/<uid>.json`
before it changes, and the file goes only after it is back: an agent that dies in between leaves what `recover` needs.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import msgspec

from agent.adapters import cgroup
from agent.adapters.memory_cgroup import UNLIMITED_BYTES, MemoryCgroup
from agent.core.host_memory import MARGIN_BYTES
from agent.core.types import Handle
from agent.log import get_logger

V1_FILES = ("memory.memsw.limit_in_bytes", "memory.limit_in_bytes")  # the kernel keeps memsw >= limit: raised first
V2_FILES = ("memory.max", "memory.high")
LOWERING_SLACK_BYTES = 4 << 20

log = get_logger()


@dataclass(frozen=True, slots=True)
class _Record:
    """What a limit was: the text of each file, in the order of raising."""

    boot_id: str
    version: int
    path: str
    limits: dict[str, str]


class MemoryLimits:
    """The raised limits of one state directory. One writer."""

    def __init__(self, folder: Path, boot_id: str) -> None:
        self._folder = folder
        self._boot_id = boot_id
        # Remembered, so that a wake without a raised limit never touches the disk.
        self._raised = {path.stem for path in folder.glob("*.json")}

    def raise_by_need(self, handle: Handle, own: MemoryCgroup, need_bytes: int) -> str:
        """Let `own` hold `need_bytes` and the margin more than now. Returns "" or why not (then nothing changed)."""
        wanted = need_bytes + MARGIN_BYTES
        above = own.headroom_above_bytes()
        if above is not None and above < wanted:
            return f"a memory limit above the instance's own leaves {above} bytes, {wanted} are needed; raise that one"
        room = own.own_room_bytes()
        if room is None or room >= wanted:
            return ""
        if why := _not_own(handle, own):
            return why
        old = _limits(own)
        try:
            if handle.uid not in self._raised:  # raised already: what it was then is what it was
                self._write(handle.uid, _Record(self._boot_id, own.version, str(own.path), old))
            for name, text in old.items():
                (own.path / name).write_text(str(int(text) + wanted - room), encoding="ascii")
        except OSError as error:
            self.lower(handle.uid)
            return f"the instance's memory limit can't be raised ({error.strerror}); raise its memorySize"
        return ""

    def lower(self, uid: str) -> None:
        """Put the limit back. While more than that is in use it stays raised, and the next call tries again: writing
        a v2 `memory.max` below the use would kill. No fsync: after a power failure the cgroup is gone as well."""
        if uid not in self._raised:
            return
        record = self._read(uid)
        if record and record.boot_id == self._boot_id:
            own = MemoryCgroup(record.version, Path(record.path), Path(record.path))
            used = own.used_bytes()
            lowest = min((int(text) for text in record.limits.values()), default=UNLIMITED_BYTES)
            if used is not None and used + LOWERING_SLACK_BYTES > lowest:
                log.info("memory_limit.still_in_use", uid=uid, used_bytes=used, limit_bytes=lowest)
                return
            try:
                for name, text in reversed(record.limits.items()):
                    (own.path / name).write_text(text, encoding="ascii")
            except (FileNotFoundError, NotADirectoryError):
                pass  # the instance has ended, its cgroup with it
            except OSError as error:  # v1 answers EBUSY rather than kill
                log.warning("memory_limit.not_lowered", uid=uid, error=str(error))
                return
        (self._folder / f"{uid}.json").unlink(missing_ok=True)
        self._raised.discard(uid)

    def recover(self, frozen: Collection[str]) -> None:
        """After a restart: frozen instances keep their raised limit, everyone else's is what it was."""
        for uid in sorted(self._raised - set(frozen)):
            self.lower(uid)

    def _write(self, uid: str, record: _Record) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = self._folder / f"{uid}.partial"
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(msgspec.json.encode(record))
            file.flush()
            os.fsync(fd)
        partial.replace(self._folder / f"{uid}.json")
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._raised.add(uid)

    def _read(self, uid: str) -> _Record | None:
        try:
            return msgspec.json.decode((self._folder / f"{uid}.json").read_bytes(), type=_Record)
        except (OSError, msgspec.DecodeError) as error:
            log.error("memory_limit.record_unreadable", uid=uid, error=str(error))
            return None


def _not_own(handle: Handle, own: MemoryCgroup) -> str:
    """ "" if this cgroup holds nobody but the instance; shared ones are not ours to change."""
    inside = set(cgroup.procs(own.path))
    instance = set(cgroup.procs(Path(handle.cgroup))) if handle.cgroup else {handle.process.pid}
    if own.path == own.top or handle.process.pid not in inside or not inside <= instance:
        return "its memory limit is shared with other processes, so it is not raised; raise that limit"
    return ""


def _limits(own: MemoryCgroup) -> dict[str, str]:
    """The limits that are set, in the order of raising."""
    found = {}
    for name in V2_FILES if own.version == 2 else V1_FILES:
        try:
            text = (own.path / name).read_text(encoding="ascii").strip()
        except OSError:  # no swap accounting
            continue
        if text != "max" and int(text) < UNLIMITED_BYTES:
            found[name] = text
    return found
