"""The committed held-out sample: standard library files that the demo model never sees.

heldout.jsonl has one JSON object a line. The first describes the file (source, licence); each other
one is a document: {"key": "stdlib/webbrowser.py", "text": "..."}. Which files are held out depends
only on a hash of the key (corpus.py), so the split holds for every Python version.

    python3 tools/demo/heldout.py      writes it again from this Python's standard library
"""

from __future__ import annotations

import json
import platform
from pathlib import Path

import corpus

PATH = Path(__file__).with_name("heldout.jsonl")
MAX_BYTES = 300_000


def load(path: Path = PATH) -> list[corpus.Document]:
    with open(path, encoding="utf-8") as lines:
        next(lines)
        return [corpus.Document(**json.loads(line)) for line in lines]


def write(path: Path = PATH) -> None:
    header = {
        "about": f"Files of the Python {platform.python_version()} standard library, held out of the demo model's training",
        "licence": "PSF-2.0, https://docs.python.org/3/license.html",
        "copyright": "Copyright (c) 2001-2023 Python Software Foundation; All Rights Reserved",
    }
    lines = [json.dumps(header)]
    for item in corpus.stdlib_files():
        if corpus.is_held_out(item[0]):
            key, text, _ = corpus.read(item)
            if text is not None:
                lines.append(json.dumps({"key": key, "text": text}))
    body = "\n".join(lines) + "\n"
    if len(body) > MAX_BYTES:
        raise ValueError(f"{path.name}: {len(body)} bytes, at most {MAX_BYTES} wanted")
    path.write_text(body, encoding="utf-8")


if __name__ == "__main__":
    write()
