"""Collects the training text: Python sources that are installed on this machine.

Two kinds of source: the standard library (PSF licence) and installed distributions whose own
metadata declares only permissive licences. Every document has a `key`, a path that does not depend
on where Python is installed ("stdlib/json/decoder.py", "numpy/numpy/_core/records.py"); the held-out
split is decided by a hash of that key, so it is the same on every machine and for every version.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

MIN_BYTES, MAX_BYTES = 200, 200_000
MAX_DISTRIBUTION_BYTES = 30_000_000   # so that no single package sets the style
STDLIB = "stdlib"
HELD_OUT_PERCENT = {STDLIB: 3.0}   # of the files; other distributions: 1 %
STDLIB_LICENCE = "PSF-2.0"

# Directory names whose files are not written by the distribution's authors, or are mostly data.
SKIP_DIRS = {
    "test", "tests", "testing", "idle_test", "test_data", "testdata", "__pycache__",
    "_vendor", "vendor", "vendored", "_vendored", "third_party", "thirdparty", "extern", "externals",
    "site-packages", "dist-packages", "ensurepip", "pydoc_data", "encodings", "generated", "_generated",
}

_PERMISSIVE = re.compile(
    r"^(mit|mit-0|mit-cmu|expat|hpnd|isc|iscl|0bsd|bsl-1\.0|zlib|unlicense|cc0-1\.0|psf|psf-2\.0|psfl|python-2\.0(\.1)?|cnri-python"
    r"|blueoak-1\.0\.0|bsd|bsd-[123]-clause|(new|modified|simplified|revised|[123]-clause|three-clause) bsd"
    r"|bsd[ -][123][ -]clause|bsd \(3-clause\)|bsd3|apache|apache-2\.0( with llvm-exception)?|apache[ ,]*(version )?v?2(\.0)?|apache software"
    r"|python software foundation|historical permission notice and disclaimer \(hpnd\)|the unlicense( \(unlicense\))?"
    r"|isc( \(iscl\))?|zlib/libpng|mit no attribution( license)?( \(mit-0\))?|public domain)$")

_GENERATED = re.compile(
    r"(?i)\b(auto-?generated|automatically generated|generated (by|from|using|with|automatically)"
    r"|do not (edit|modify)|machine[- ]generated|yacc\.py|protocol buffer compiler)\b")


@dataclass(frozen=True)
class Document:
    key: str     # install-independent path; its first component is the distribution
    text: str


@dataclass
class Corpus:
    train: list[Document]
    held_out: list[Document]
    licences: dict[str, str]                              # distribution -> declared licence
    sizes: dict[str, int] = field(default_factory=dict)   # distribution -> bytes used for training
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> files


def _parts(expression: str) -> list[str]:
    """Licence names of an SPDX expression or of free text, lower case, without the filler words."""
    names = re.split(r"\s+(?:and|or)\s+|[;&|]|\s*,\s*(?=[a-z])", expression.strip().lower().replace("(c)", ""))
    cleaned = []
    for name in names:
        name = name.strip().removeprefix("the ")
        if name.startswith("(") and ")" not in name:
            name = name[1:]
        if name.endswith(")") and "(" not in name:
            name = name[:-1]
        name = re.sub(r"\s+licen[cs]ed?$", "", name.strip())
        name = re.sub(r"\s+licen[cs]e(?= |$)", "", name)
        if name:
            cleaned.append(name)
    return cleaned


def is_permissive(expression: str) -> bool:
    """True if every licence that the text names is on the permissive list."""
    names = _parts(expression)
    return bool(names) and all(_PERMISSIVE.match(name) for name in names)


def declared_licence(meta) -> str | None:
    """The licence a distribution declares: the SPDX expression, else the classifiers, else a short
    `License` field; None where none of them says anything usable."""
    if expression := meta.get("License-Expression"):
        return expression
    classifiers = [c.rsplit("::", 1)[1].strip() for c in meta.get_all("Classifier") or []
                   if c.startswith("License ::") and not c.endswith("OSI Approved")]
    if classifiers:
        return " AND ".join(classifiers)
    text = (meta.get("License") or "").strip()
    if not text or len(text) > 80 or "\n" in text or text.upper() == "UNKNOWN":
        return None
    return text


def _skipped(parts: tuple[str, ...]) -> bool:
    return any(p in SKIP_DIRS or p.endswith((".dist-info", ".egg-info")) for p in parts[:-1])


def _is_source(name: str) -> bool:
    return name.endswith(".py") and not name.endswith(("_pb2.py", "_pb2_grpc.py")) \
        and not name.startswith("test_") and name != "conftest.py"


def stdlib_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not _skipped(parts) and _is_source(path.name):
            found.append(("/".join((STDLIB, *parts)), path))
    return found


def distribution_files() -> tuple[list[tuple[str, Path]], dict[str, str], dict[str, str]]:
    """(key, path) of each source file of the permissive distributions, their licences, and the
    distributions left out with what they declare."""
    found, licences, refused, seen = [], {}, {}, set()
    for dist in metadata.distributions():
        name = (dist.metadata.get("Name") or "").lower().replace("_", "-")
        if not name or name in seen:
            continue
        seen.add(name)
        licence = declared_licence(dist.metadata)
        if licence is None or not is_permissive(licence):
            refused[name] = licence or "none declared"
            continue
        files = [f for f in dist.files or [] if ".." not in f.parts
                 and _is_source(f.name) and not _skipped(f.parts)]
        if files:
            licences[name] = licence
            found += [("/".join((name, *f.parts)), Path(f.locate())) for f in files]
    return sorted(found), licences, refused


def read(item: tuple[str, Path]) -> tuple[str, str | None, str]:
    """(key, text or None, reason for dropping it)."""
    key, path = item
    try:
        raw = path.read_bytes()
    except OSError:
        return key, None, "unreadable"
    if not MIN_BYTES <= len(raw) <= MAX_BYTES:
        return key, None, "too short or too long"
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return key, None, "not UTF-8"
    if "\0" in text:
        return key, None, "not UTF-8"
    if _GENERATED.search(text[:1500]):
        return key, None, "generated"
    lines = text.split("\n")
    if max(map(len, lines)) > 1000 or len(text) / len(lines) > 100:
        return key, None, "long lines (data or minified)"
    letters = sum(map(str.isalpha, text))
    spaces = sum(map(str.isspace, text))
    if letters < 0.45 * (len(text) - spaces):
        return key, None, "mostly numbers or tables"
    return key, text.rstrip() + "\n", ""


def is_held_out(key: str) -> bool:
    digest = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    percent = HELD_OUT_PERCENT.get(key.split("/", 1)[0], 1.0)
    return digest < percent / 100 * 2**32


def _long_lines(text: str) -> set[int]:
    return {hash(s) for line in text.split("\n") if len(s := line.strip()) >= 24}


def _near_duplicate(lines: set[int], seen: set[int], share: float) -> bool:
    return len(lines) >= 5 and len(lines & seen) > share * len(lines)


def collect(extra_held_out: list[Document], workers: int) -> Corpus:
    """Reads, filters, splits and deduplicates. `extra_held_out`: documents (the committed sample)
    whose near copies must not be trained on either."""
    found, licences, _ = distribution_files()
    items = stdlib_files() + found
    licences = {STDLIB: STDLIB_LICENCE, **licences}
    corpus = Corpus([], [], licences)
    with ProcessPoolExecutor(workers) as pool:
        documents = []
        for key, text, reason in pool.map(read, items, chunksize=64):
            if text is None:
                corpus.dropped[reason] = corpus.dropped.get(reason, 0) + 1
            else:
                documents.append(Document(key, text))

    forbidden = set().union(*(_long_lines(d.text) for d in extra_held_out))
    extra_keys = {d.key for d in extra_held_out}
    seen: set[int] = set()
    exact: set[bytes] = set()
    # In hash order, so that a package over its limit loses arbitrary files; the held-out ones last.
    documents.sort(key=lambda d: (is_held_out(d.key), hashlib.sha256(d.key.encode()).digest()))
    for document in documents:
        dist = document.key.split("/", 1)[0]
        digest = hashlib.sha256(" ".join(document.text.split()).encode()).digest()
        lines = _long_lines(document.text)
        reason = ""
        if digest in exact or _near_duplicate(lines, seen, 0.7):
            reason = "duplicate"
        elif is_held_out(document.key):
            if _near_duplicate(lines, seen, 0.4):
                reason = "held out, but close to a training file"
            else:
                corpus.held_out.append(document)
        elif document.key in extra_keys or _near_duplicate(lines, forbidden, 0.4):
            reason = "close to the committed held-out sample"
        elif corpus.sizes.get(dist, 0) > MAX_DISTRIBUTION_BYTES:
            reason = "package over its size limit"
        else:
            exact.add(digest)
            seen |= lines
            corpus.train.append(document)
            corpus.sizes[dist] = corpus.sizes.get(dist, 0) + len(document.text.encode())
        if reason:
            corpus.dropped[reason] = corpus.dropped.get(reason, 0) + 1
    return corpus
