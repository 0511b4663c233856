"""Which sources a proof was made from: a checksum of all of them, and the commit if it is certain."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

GIT_S = 10.0
PACK_FILE = "pack.json"
"""What `pack.py` notes beside the packages."""


def sources_sha256(checkout: Path) -> str:
    """SHA-256 over name and content of every source file of the agent."""
    digest = hashlib.sha256()
    for path in sorted((checkout / "agent").rglob("*")):
        if path.suffix in {".py", ".c", ".h"} and path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.relative_to(checkout)}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def origin_of(checkout: Path, carried: str) -> dict[str, Any]:
    """Keys `commit` (None: not certain), `commit_note` and `sources_sha256`.

    A copy without git has the commit that was noted in the folder `carried`, if the sources are still those."""
    digest = sources_sha256(checkout)
    commit = commit_of(checkout)
    if commit is not None:
        return {"commit": commit[0], "commit_note": commit[1], "sources_sha256": digest}
    noted = _noted(Path(carried)) if carried else {}
    if noted.get("sources_sha256") == digest and noted.get("commit"):
        note = f"{noted['commit_note']}, by the note of the carried packages, whose checksum fits"
        return {"commit": noted["commit"], "commit_note": note, "sources_sha256": digest}
    return {"commit": None, "commit_note": f"sources' SHA-256 {digest}", "sources_sha256": digest}


def commit_of(checkout: Path) -> tuple[str, str] | None:
    """The commit, and whether the agent's files differ from it; None without git or a repository."""
    try:
        if _git(checkout, "rev-parse", "--show-toplevel") != str(checkout.resolve()):
            return None  # the checkout lies within another repository
        changed = _git(checkout, "status", "--porcelain", "--", "agent", "scripts")
        return _git(checkout, "rev-parse", "HEAD"), "with local changes" if changed else "without local changes"
    except (OSError, subprocess.SubprocessError):
        return None


def _git(checkout: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(checkout), *arguments], capture_output=True, text=True, timeout=GIT_S, check=True
    )
    return done.stdout.strip()


def _noted(carried: Path) -> dict[str, Any]:
    try:
        found = json.loads((carried / PACK_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
