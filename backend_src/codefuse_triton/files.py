"""Paths and small files, read alike in every process: Python in Triton's stub would encode paths in ASCII, whatever the locale."""
from __future__ import annotations

import json
import os
from typing import Any

from ._native import LoadError


def on_disk(path: str) -> bytes:
    """A path for Python's own functions, which in Triton's stub would encode it in ASCII, whatever the locale."""
    return path.encode(errors="surrogateescape")


def is_file(path: str) -> bool:
    return os.path.isfile(on_disk(path))


def read_json(path: str) -> dict[str, Any]:
    """The object in a file, {} without the file; LoadError."""
    if not is_file(path):
        return {}
    try:
        with open(on_disk(path), encoding="utf-8") as f:
            value = json.load(f)
    except ValueError as e:
        raise LoadError(f"{path}: not JSON: {e}") from None
    if not isinstance(value, dict):
        raise LoadError(f"{path}: expected an object")
    return value
