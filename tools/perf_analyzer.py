#!/usr/bin/env python3
"""Run NVIDIA's perf_analyzer (it comes inside the tritonclient wheel) with the libraries that it misses.

    python tools/perf_analyzer.py -m ensemble -u 127.0.0.1:8001 -i grpc --streaming --async --input-data input.json ...
"""
from __future__ import annotations

import importlib.util
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


def main() -> int:
    try:
        binary = find_binary()
    except FileNotFoundError as error:
        print(f"perf_analyzer: {error}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="perf-analyzer-") as directory:
        link_libraries(Path(directory))
        paths = [directory] + [p for p in [os.environ.get("LD_LIBRARY_PATH")] if p]
        return subprocess.run([binary, *sys.argv[1:]], env=os.environ | {"LD_LIBRARY_PATH": ":".join(paths)}).returncode


if __name__ == "__main__":
    sys.exit(main())
