"""Raises an instance's own memory limit while its GPU image is in host memory.

The copy of VRAM is charged to the instance's memory cgroup; hitting its limit is an OOM kill during the checkpoint
(agent/docs/facts/emulated-driver.md, pitfalls 7 and 8). The old limit is written to `<folder>/<uid>.json` before it
changes, and the file is removed after it is restored: an agent that dies in between leaves what `recover` needs. No
fsync: only the kernel's own end loses a written file, and that ends the instance and its cgroup too.

Lowering never kills. v1 answers EBUSY instead. v2 would reclaim and then kill, so `memory.high` is lowered first, which
only reclaims and slows growth, and `memory.max` follows only when the charge, cache included, is below it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from agent.adapters.kernel import cgroup
from agent.adapters.kernel.memory_cgroup import V1_CAPS, V2_CAPS, Cap, MemoryCgroup
from agent.core.gpus.host_memory import MARGIN_BYTES
from agent.core.sizes import shortage_in_mib
from agent.core.types import Handle
from agent.log import get_logger

PAGE_BYTES = 4096
LOWERING_SLACK_BYTES = 4 << 20
MAX, HIGH = "memory.max", "memory.high"

log = get_logger()


@dataclass(frozen=True, slots=True)
class _Record:
    """The old limits: the text of each limit file that exists."""

    boot_id: str
    version: int
    path: str
    limits: dict[str, str]


class MemoryLimits:
    """The raised limits of one state directory. One writer; `is_raised` may be called from any thread."""

    def __init__(self, folder: Path, boot_id: str) -> None:
        self._folder = folder
        self._boot_id = boot_id
        # Cached, so that a wake without a raised limit never touches the disk.
        self._raised = {path.stem for path in folder.glob("*.json")}

    def is_raised(self, uid: str) -> bool:
        return uid in self._raised

    def raise_by_need(self, handle: Handle, own: MemoryCgroup, need_bytes: int) -> str:
        """Let `own` hold `need_bytes` plus the margin more than now. Returns "" or why not (then nothing changed)."""
        wanted = need_bytes + MARGIN_BYTES
        above = own.headroom_above_bytes()
        if above is not None and above < wanted:
            leaves, needed = shortage_in_mib(above, wanted)
            return f"a memory limit above the instance's own leaves {leaves}, {needed} are needed; raise that one"
        caps = own.own_caps()
        if all(cap.limit_bytes - cap.used_bytes >= wanted for cap in caps):
            return ""
        if why := _not_own(handle, own):
            return why
        try:
            if handle.uid not in self._raised:  # if raised before, the record already holds the original
                self._write(handle.uid, _Record(self._boot_id, own.version, str(own.path), _texts(own)))
            for name, limit in _raised(own.version, caps, wanted):
                (own.path / name).write_text(str(limit), encoding="ascii")
        except OSError as error:
            self.lower(handle.uid)
            return f"the instance's memory limit can't be raised ({error.strerror}); raise its memorySize"
        return ""

    def lower(self, uid: str) -> None:
        """Restore the limit. While more than that is in use it stays raised, and the next call retries."""
        if uid not in self._raised:
            return
        record = self._read(uid)
        if record and record.boot_id == self._boot_id:
            own = MemoryCgroup(record.version, Path(record.path), Path(record.path))
            try:
                if not (_lower_v2 if own.version == 2 else _lower_v1)(own, record.limits):
                    log.info("memory_limit.still_in_use", uid=uid, used_bytes=own.usage_bytes())
                    return
            except (FileNotFoundError, NotADirectoryError, ProcessLookupError):
                pass  # the instance has ended, its cgroup with it
            except OSError as error:
                log.warning("memory_limit.not_lowered", uid=uid, error=str(error))
                return
        (self._folder / f"{uid}.json").unlink(missing_ok=True)
        self._raised.discard(uid)

    def recover(self, frozen: Collection[str]) -> None:
        """After a restart: frozen instances keep their raised limit, all others get their old one back."""
        for uid in sorted(self._raised - set(frozen)):
            self.lower(uid)

    def _write(self, uid: str, record: _Record) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = self._folder / f"{uid}.partial"
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(msgspec.json.encode(record))
        partial.replace(self._folder / f"{uid}.json")
        self._raised.add(uid)

    def _read(self, uid: str) -> _Record | None:
        """None if the file is gone or damaged. A damaged one is renamed and logged, and the limit stays raised."""
        path = self._folder / f"{uid}.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=_Record)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            aside = path.with_suffix(".unreadable")
            log.error("memory_limit.record_unreadable", uid=uid, error=str(error), kept=str(aside))
            with suppress(OSError):
                path.replace(aside)
            return None


def _not_own(handle: Handle, own: MemoryCgroup) -> str:
    """ "" if this cgroup holds only the instance; shared limits are not changed."""
    inside = set(cgroup.procs(own.path))
    instance = set(cgroup.procs(Path(handle.cgroup))) if handle.cgroup else {handle.process.pid}
    if own.path == own.top or handle.process.pid not in inside or not inside <= instance:
        return "its memory limit is shared with other processes, so it is not raised; raise that limit"
    return ""


def _texts(own: MemoryCgroup) -> dict[str, str]:
    """Every limit file and its content, "max" included. Without swap accounting there is no memsw."""
    found = {}
    for name, _ in V2_CAPS if own.version == 2 else V1_CAPS:
        with suppress(FileNotFoundError):
            found[name] = (own.path / name).read_text(encoding="ascii").strip()
    return found


def _raised(version: int, caps: Sequence[Cap], wanted_bytes: int) -> list[tuple[str, int]]:
    """Files and their new limits in the order of writing. No limit shrinks. memsw is first: v1 requires memsw >=
    limit."""
    new = {cap.name: max(cap.limit_bytes, _whole_pages(cap.used_bytes + wanted_bytes)) for cap in caps}
    if version == 1:
        limit, memsw = (name for name, _ in V1_CAPS)
        if memsw in new:
            new[memsw] = max(new[memsw], new.get(limit, 0))
    return list(reversed(new.items()))


def _whole_pages(bytes_: int) -> int:
    return -(-bytes_ // PAGE_BYTES) * PAGE_BYTES


def _lower_v1(own: MemoryCgroup, texts: Mapping[str, str]) -> bool:
    """False if more is in use, or the kernel could not reclaim enough (EBUSY; it kills nothing)."""
    if any(cap.used_bytes > int(texts[cap.name]) for cap in own.own_caps()):
        return False  # the kernel would swap the instance out before it answers
    try:
        for name, _ in V1_CAPS:  # the limit before memsw
            if name in texts:
                (own.path / name).write_text(texts[name], encoding="ascii")
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def _lower_v2(own: MemoryCgroup, texts: Mapping[str, str]) -> bool:
    """False if too much stays charged."""
    if texts[MAX] != "max":
        target = max(0, int(texts[MAX]) - LOWERING_SLACK_BYTES)
        high = own.path / HIGH
        before = high.read_text(encoding="ascii")
        high.write_text(str(target), encoding="ascii")
        used = own.usage_bytes()
        if used is None or used > target:
            high.write_text(before, encoding="ascii")
            return False
        (own.path / MAX).write_text(texts[MAX], encoding="ascii")
    (own.path / HIGH).write_text(texts[HIGH], encoding="ascii")
    return True
