#!/usr/bin/env python3
"""Run NVIDIA's perf_analyzer (it comes inside the tritonclient wheel) with the libraries that it misses.

    python tools/perf_analyzer.py -m ensemble -u 127.0.0.1:8001 -i grpc --streaming --async --input-data input.json ...

It runs with one malloc arena, and an export (--profile-export-file) that it could not finish is an error. Of an output that a response does not
have (log-probabilities that were not asked for, timings before the last response) it exports as a number what lies in memory that it has not
written; where those bits are a NaN, it stops writing and says nothing. They are malloc's own links, which in the arenas of threads, by their
addresses, are NaNs in one run of ten, and in the main one hardly ever.
"""
from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}  # in the nvidia-pytriton wheel


def find_binary() -> Path:
    beside = Path(sys.executable).parent / "perf_analyzer"
    found = beside if beside.exists() else shutil.which("perf_analyzer")
    if not found:
        raise FileNotFoundError("no perf_analyzer beside this Python nor on PATH: pip install 'tritonclient==2.51.0' on Linux x86-64")
    return Path(found)


def link_libraries(directory: Path) -> None:
    """Under the names that perf_analyzer asks for; whatever the wheel lacks must be on the machine."""
    spec = importlib.util.find_spec("pytriton")
    bundled = Path(spec.origin).parent.parent / "nvidia_pytriton.libs" if spec and spec.origin else None
    for name, pattern in LIBRARIES.items():
        for file in bundled.glob(pattern) if bundled else ():
            (directory / name).symlink_to(file)
            break


def export_of(arguments: list[str]) -> Path | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--profile-export-file", type=Path)
    return parser.parse_known_args(arguments)[0].profile_export_file


def is_whole(export: Path) -> bool:
    try:
        json.loads(export.read_bytes())
        return True
    except ValueError:
        return False


def main() -> int:
    try:
        binary = find_binary()
    except FileNotFoundError as error:
        print(f"perf_analyzer: {error}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="perf-analyzer-") as directory:
        link_libraries(Path(directory))
        paths = [directory] + [p for p in [os.environ.get("LD_LIBRARY_PATH")] if p]
        environment = {"MALLOC_ARENA_MAX": "1"} | os.environ | {"LD_LIBRARY_PATH": ":".join(paths)}
        code = subprocess.run([binary, *sys.argv[1:]], env=environment).returncode
    export = export_of(sys.argv[1:])
    if code == 0 and export is not None and export.exists() and not is_whole(export):
        print(f"perf_analyzer: {export} is not whole: it met a number that JSON does not have among outputs that a response lacks; run it again", file=sys.stderr)
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
