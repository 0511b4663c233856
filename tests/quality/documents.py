"""What a text says about other files of the repository: links, paths, sections; and whether they exist."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path, PurePosixPath

ROOTS = ("agent", "tests", "scripts", "systemd", "protos")
"""Top-level folders. A path that begins with one of them must exist."""
BESIDE = ("agent", "agent/docs", "agent/emulated", "tests", "protos")
"""Folders that texts leave out at the beginning of a path; so they do with the folder of the text itself."""
FOREIGN = "agent/docs/facts/"
"""Pages that cite other projects: there only paths below ROOTS are checked."""
TEXTS = {".md", ".py", ".c", ".h", ".proto", ".yaml", ".sh", ".toml", ".service", ".conf"}

_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(<?([^()\s<>]+)>?\)|^\s*\[[^\]]+\]:\s+(\S+)", re.MULTILINE)
_URL = re.compile(r"[a-z][a-z0-9+.-]*://\S+|mailto:\S+")
_CHARS = r"[\w.*<>{},-]"
_ROOTED = re.compile(rf"(?<![\w./$@~<>{{}}-])(?:{'|'.join(ROOTS)})/(?:{_CHARS}+/?)*")
_RELATIVE = re.compile(rf"(?<![\w./$@~<>{{}}-])(?!(?:{'|'.join(ROOTS)})/)(?:{_CHARS}+/)+{_CHARS}+\.(?:py|md)\b")
_SOURCE = re.compile(r"(?<![\w./-])src/[\w*]+\.[ch]\b")
_WRAP = r"(?:[ \t]+|[ \t]*\n[ \t]*(?:[#*/]+[ \t]+)?)"
_SECTION = re.compile(
    rf"(?<![\w/.-])([\w./-]+\.md|README|ARCHITECTURE)[)`]*,?{_WRAP}(?:\"([^\"\n]+)\"|(sections?|pitfalls?)\s+(\d+)"
    r"(?:(?:\s+and|\s+to|,)\s+(\d+))?)"
)
_ANCHORED = re.compile(r"(?<![\w/.(-])([\w./-]+\.md)#([\w-]+)")
_GONE = re.compile(r"\bDESIGN\b|\bSTYL[E]\b|\b[Ff]acts \d|\b[Ff]acts:(?= the)|\bhouse\.md\b|(?<![\w/])shared/\w+\S*")
_PYTHON = re.compile(
    r"(?P<long>[rRbBfFuU]{0,2}(?:\"{3}(?:\\.|[^\\])*?\"{3}|'{3}(?:\\.|[^\\])*?'{3}))"
    r"|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'|(?P<comment>#[^\n]*)",
    re.DOTALL,
)
"""Strings and comments. A long string that begins its line is taken for a docstring."""
_BLANK = re.compile(r"[^\n]")
_HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)
_FENCE = re.compile(r"^([ \t]*)(`{3,}|~{3,}).*?^[ \t]*\2[ \t]*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Tree:
    """The files of a repository, by their path from its root."""

    files: frozenset[str]
    texts: dict[str, str] = field(default_factory=dict, compare=False, hash=False)
    """Contents of the Markdown files."""

    @cached_property
    def all(self) -> frozenset[str]:
        """Files and their folders."""
        folders = {str(folder) for name in self.files for folder in PurePosixPath(name).parents}
        return self.files | folders

    def find(self, path: str, beside: Iterable[str]) -> str | None:
        """The file or folder that `path` names from one of the folders `beside`; of those that fit wildcards, one."""
        for folder in beside:
            name = _normal(f"{folder}/{path}")
            if name is not None and "*" not in name and name in self.all:
                return name
            if name is not None and "*" in name:
                pattern = re.compile(re.escape(name).replace(r"\*", "[^/]*"))
                found = min((one for one in self.all if pattern.fullmatch(one)), default=None)
                if found is not None:
                    return found
        return None


def wrong_in(name: str, text: str, tree: Tree) -> list[str]:
    """`name:line: mention: why` for every reference in a file that leads nowhere."""
    prose = _prose_of(name, text)
    found = [(text.count("\n", 0, offset) + 1, *rest) for offset, *rest in _wrong_in(name, prose, tree)]
    if name.endswith(".md"):
        found += _wrong_links(name, text, tree)
    return [f"{name}:{line}: {mention}: {why}" for line, mention, why in sorted(set(found))]


def anchors_of(text: str) -> set[str]:
    """What may follow the # of a link to this Markdown, as GitHub makes it of the headings."""
    anchors: set[str] = set()
    for title in _titles_of(text):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = 0
        while (anchor := slug if number == 0 else f"{slug}-{number}") in anchors:
            number += 1
        anchors.add(anchor)
    return anchors | set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))


def _normal(path: str) -> str | None:
    """Without `.` and `..`; None for a path that leaves the repository."""
    parts: list[str] = []
    for part in path.split("/"):
        if part == ".." and not parts:
            return None
        if part == "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts) or "."


def _titles_of(text: str) -> list[str]:
    return _HEADING.findall(_FENCE.sub("", text))


def _prose_of(name: str, text: str) -> str:
    """What speaks to people, in its place: all of a text, but of Python comments, docstrings and messages that name
    a document (tests hold made-up ones)."""
    if not name.endswith(".py"):
        return text
    prose = list(_BLANK.sub(" ", text))
    for hit in _PYTHON.finditer(text):
        is_docstring = hit["long"] and not text[text.rfind("\n", 0, hit.start()) + 1 : hit.start()].strip()
        if hit["comment"] or is_docstring or (".md" in hit[0] and name.startswith("agent/")):
            prose[hit.start() : hit.end()] = hit[0]
    return "".join(prose)


def _wrong_in(name: str, text: str, tree: Tree) -> Iterator[tuple[int, str, str]]:
    """(offset, mention, why) of each reference that is no link."""
    text = _URL.sub(lambda url: " " * len(url[0]), text)
    here = [".", str(PurePosixPath(name).parent), *BESIDE]
    for hit in _ROOTED.finditer(text):
        yield from _missing(hit, here, tree)
    if not name.startswith(FOREIGN):
        for pattern in (_RELATIVE, _SOURCE):
            for hit in pattern.finditer(text):
                yield from _missing(hit, here, tree)
    for hit in _GONE.finditer(text):
        yield hit.start(), hit[0], "not in the repository"
    for hit in _SECTION.finditer(text):
        document = _document(hit[1], here, tree)
        if document is None:
            continue  # the path itself is wrong, or another project's
        for wanted in filter(None, (hit[4], hit[5])):
            if not _has_number(tree.texts[document], hit[3], wanted):
                yield hit.start(), " ".join(hit[0].split()), f"{document} has no {hit[3].rstrip('s')} {wanted}"
        if hit[2] and hit[2] not in _titles_of(tree.texts[document]):
            yield hit.start(), " ".join(hit[0].split()), f"{document} has no such heading"
    for hit in _ANCHORED.finditer(text):
        document = _document(hit[1], here, tree)
        if document is not None and hit[2] not in anchors_of(tree.texts[document]):
            yield hit.start(), hit[0], f"{document} has no such heading"


def _missing(hit: re.Match[str], here: list[str], tree: Tree) -> Iterator[tuple[int, str, str]]:
    mention = hit[0].rstrip(".,-<{/")
    if ".." in mention or "{}" in mention or mention.startswith("}"):
        return  # `tests/...`, a format string, or `${env('PWD')}/...`
    path = re.sub(r"<[^<>/]*>", "*", mention)
    if any(tree.find(one, here) is None and tree.find(f"{one}.py", here) is None for one in _alternatives(path)):
        yield hit.start(), mention, "not in the repository"


def _alternatives(path: str) -> list[str]:
    """The paths that braces stand for; a comma outside of braces ends the path."""
    parts = re.split(r"\{([^{}]*)\}", path)
    if len(parts) == 1:
        return [path.partition(",")[0]]
    choices = [part.split(",") if index % 2 else [part] for index, part in enumerate(parts)]
    return ["".join(one) for one in product(*choices)]


def _document(path: str, here: list[str], tree: Tree) -> str | None:
    known = {"README": "README.md", "ARCHITECTURE": "agent/ARCHITECTURE.md"}
    found = known.get(path) or tree.find(path, here[1:2] + here)
    return found if found in tree.texts else None


def _has_number(text: str, kind: str, number: str) -> bool:
    """A heading `## 9. Title` for a section, a list's item `9. ...` for a pitfall."""
    lead = r"#{1,6}\s+" if kind.startswith("section") else r"\s*"
    return re.search(rf"^{lead}{number}\.\s", text, re.MULTILINE) is not None


def _wrong_links(name: str, text: str, tree: Tree) -> list[tuple[int, str, str]]:
    blank = _FENCE.sub(lambda code: re.sub(r"[^\n]", " ", code[0]), text)
    blank = re.sub(r"`[^`\n]*`", lambda code: "_" * len(code[0]), blank)
    found = []
    for hit in _LINK.finditer(blank):
        target = hit[1] or hit[2]
        if _URL.match(target):
            continue
        path, _, anchor = target.partition("#")
        document = tree.find(path, [str(PurePosixPath(name).parent)]) if path else name
        line = blank.count("\n", 0, hit.start(1) if hit[1] else hit.start(2)) + 1
        if document is None:
            found.append((line, target, "not in the repository"))
        elif anchor and anchor not in anchors_of(tree.texts.get(document, "")):
            found.append((line, target, f"{document} has no such heading"))
    return found


def read_tree(root: Path, tracked: Iterable[Path]) -> Tree:
    names = {path.relative_to(root).as_posix(): path for path in tracked}
    texts = {name: path.read_text(encoding="utf-8") for name, path in names.items() if name.endswith(".md")}
    return Tree(frozenset(names), texts)
