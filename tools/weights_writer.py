"""Writes a weights directory atomically: safetensors shards under a temporary name, config.json last.

config.json is the commit mark: a directory without it holds no model, so a killed conversion is never loaded.
"""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable

import numpy as np
from codefuse_triton import _native

from checkpoint import BF16, CheckpointError
from rounding import GROUPS, check_format

FORMAT_VERSION = 1
SHARD_BYTES = 2 << 30  # files are the unit in which checksums are verified side by side
ELEMENTS = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": BF16, "I8": np.dtype("i1"), "U8": np.dtype("u1"), "I32": np.dtype("<i4")}
_NAMES = {dtype: name for name, dtype in ELEMENTS.items()}
_ALIGN = 64  # of every tensor in the file, so that mapped rows suit vector loads


@dataclass(frozen=True)
class Planned:
    """A tensor to write: `load` is called once, when its turn comes. `format` is the format id of a quantized matrix's codes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]
    format: str = ""

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def planned_matrix(name: str, shape: tuple[int, ...], format: str, make: Callable[[], dict[str, np.ndarray]]) -> list[Planned]:
    """The tensors that take a matrix's place: codes, scale and, with a zero per group, zero. make: its stored parts (_native.pack)."""
    check_format(name, format, shape)
    rows, columns = shape
    base = name.removesuffix(".weight")
    parts: dict[str, np.ndarray] = {}

    def weight() -> np.ndarray:
        parts.update(make())
        return parts.pop("weight")

    if format == "q8_row":
        return [Planned(name, shape, np.dtype("i1"), weight, format),
                Planned(f"{base}.scale", (rows,), np.dtype("<f4"), lambda: parts.pop("scale"))]
    groups = columns // GROUPS[format]
    return [Planned(name, (rows, columns // 2), np.dtype("u1"), weight, format),
            Planned(f"{base}.scale", (rows, groups), np.dtype("<f2"), lambda: parts.pop("scale")),
            Planned(f"{base}.zero", (rows, groups), np.dtype("u1"), lambda: parts.pop("zero"))]


def _shards(tensors: list[Planned]) -> list[list[Planned]]:
    shards, size = [[]], 0
    for t in tensors:
        if shards[-1] and size + t.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(t)
        size += t.nbytes
    return shards


def _write_shard(path: Path, tensors: list[Planned], metadata: dict[str, str], progress: Callable[[int], None]) -> dict:
    header, at = {"__metadata__": {**metadata, **{f"{t.name}.format": t.format for t in tensors if t.format}}}, 0
    for t in tensors:
        header[t.name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _ALIGN)
    checksums = {}
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors:
            value = np.ascontiguousarray(t.load())
            if value.shape != t.shape or value.dtype != t.dtype:
                raise AssertionError(f"{t.name}: {value.dtype}{value.shape}, planned {t.dtype}{t.shape}")
            raw = value.reshape(-1).view(np.uint8)
            checksums[t.name] = f"{_native.xxh3_64(raw):016x}"
            for begin in range(0, raw.nbytes, 16 << 20):
                part = raw[begin:begin + (16 << 20)]
                f.write(memoryview(part))
                progress(part.nbytes)
        f.flush()
        os.fsync(f.fileno())
    written = np.memmap(path, np.uint8, "r")
    return {"name": path.name, "bytes": written.nbytes, "xxh3_64": f"{_native.xxh3_64(written):016x}", "tensors": checksums}


def check_target(directory: Path) -> None:
    """Refuses a target that holds weights files that are not ours to replace."""
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"target {directory} exists and is not a directory")
    foreign = [p.name for p in directory.glob("*.safetensors")] if directory.exists() else []
    if foreign and not _installed(directory):
        raise CheckpointError(f"target {directory} holds {foreign[0]} without a config.json of this tool; name another directory")


def _installed(directory: Path) -> list[str]:
    """Files that an earlier conversion put there."""
    try:
        config = json.loads((directory / "config.json").read_text())
        return [f["name"] for f in config["files"]] + list(config.get("tokenizer_files", []))
    except (OSError, ValueError, KeyError, TypeError):
        return []


def write_weights(directory: Path, config: dict, tensors: Iterable[Planned], tokenizer_files: Iterable[Path],
                  progress: Callable[[int], None] = lambda n: None, inspect: Callable[[Path], dict] | None = None, threads: int = 1) -> None:
    """Writes tensors (in canonical order), tokenizer files and config.json into `directory`, replacing an earlier conversion.

    Everything is written to a temporary directory inside `directory` first; on any error it is removed and the earlier
    conversion is untouched. `inspect` sees that directory when it is complete, and returns what is added to config.json; it raises to refuse.
    threads: files written at once, each with a tensor in memory.
    """
    check_target(directory)
    new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    for stale in directory.glob(".convert-*"):
        shutil.rmtree(stale)
    temp = directory / f".convert-{os.getpid()}"
    temp.mkdir()
    try:
        metadata = {"format": "codefuse-triton", "version": str(FORMAT_VERSION), "source": str(config.get("source", "")),
                    "architecture": str(config.get("architecture", ""))}
        shards = _shards(list(tensors))
        paths = [temp / f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        with ThreadPoolExecutor(threads) as pool:
            files = list(pool.map(lambda path, shard: _write_shard(path, shard, metadata, progress), paths, shards)) if shards[0] else []
        copied = [Path(shutil.copyfile(f, temp / f.name)).name for f in tokenizer_files]
        full = {"format_version": FORMAT_VERSION, **config, "files": files, "tokenizer_files": copied}
        (temp / "config.json").write_text(json.dumps(full, indent=1) + "\n")
        if inspect:
            (temp / "config.json").write_text(json.dumps({**full, **inspect(temp)}, indent=1) + "\n")
        old = _installed(directory)
        (directory / "config.json").unlink(missing_ok=True)
        for name in old:
            (directory / name).unlink(missing_ok=True)
        for name in [f["name"] for f in files] + copied + ["config.json"]:
            os.replace(temp / name, directory / name)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
        if new and not any(directory.iterdir()):
            directory.rmdir()
