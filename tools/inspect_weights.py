#!/usr/bin/env python3
"""What a weights directory holds: the model, the format and bytes of every kind of tensor, where it came from, how it was quantized, and
whether its files are what they were when they were written.

    python tools/inspect_weights.py model_repository/generator/1
    python tools/inspect_weights.py --json model_repository/generator/1

The exit code is 1 if the directory is not a weights directory or a file is damaged, missing or not one of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from codefuse_triton import _native

from checkpoint import CheckpointError, TensorInfo, read_json, read_metadata, read_safetensors
from weights_writer import FORMAT_VERSION

_IDS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}  # format ids of plain elements
_OWN = {"format_version", "files", "tokenizer_files", "source", "random"}  # keys of config.json that are not the model's


def _kinds(tensors: dict[str, tuple[TensorInfo, str]]) -> list[dict[str, Any]]:
    """tensors: name -> (tensor, format id). One row per name without its layer, format and shape; scales, zeros and orders count to their matrix."""
    rows: dict[tuple[str, str, tuple[int, ...]], dict[str, Any]] = {}
    for name, (info, _) in tensors.items():
        base, _, part = name.rpartition(".")
        owner = f"{base}.weight" if part in ("scale", "zero", "order") and f"{base}.weight" in tensors else name
        matrix, format = tensors[owner]
        key = re.sub(r"^layers\.\d+\.", "layers.*.", owner), format or _IDS.get(matrix.dtype.name, matrix.dtype.name), matrix.shape
        row = rows.setdefault(key, {"tensor": key[0], "format": key[1], "stored_shape": list(key[2]), "count": 0, "bytes": 0})
        row["count"] += owner == name
        row["bytes"] += int(np.prod(info.shape, dtype=np.int64)) * info.dtype.itemsize
    return list(rows.values())


def _state(path: Path, record: dict[str, Any], checksums: bool) -> tuple[str, str]:
    """(ok, unchecked or damaged; what is wrong)"""
    if not path.is_file():
        return "damaged", "missing"
    size = path.stat().st_size
    if size != record["bytes"]:
        return "damaged", f"has {size} bytes; expected {record['bytes']}{': truncated' * (size < record['bytes'])}"
    if not checksums:
        return "unchecked", ""
    found = f"{_native.xxh3_64(np.memmap(path, np.uint8, 'r')):016x}"
    if found == record["xxh3_64"]:
        return "ok", ""
    try:
        for name, info in read_safetensors(path).items():
            expected, value = record.get("tensors", {}).get(name), f"{_native.xxh3_64(info.load()):016x}"
            if expected not in (None, value):
                return "damaged", f"tensor {name}: checksum {value}; expected {expected}"
    except (CheckpointError, KeyError, TypeError, ValueError):
        pass  # its header is what is damaged
    return "damaged", f"checksum {found}; expected {record['xxh3_64']}"


def inspect(directory: Path, checksums: bool = True) -> dict[str, Any]:
    """Everything that is printed. CheckpointError if the directory cannot be understood at all."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; expected a weights directory written by tools/convert.py")
    config = read_json(directory / "config.json")
    version = config.get("format_version")
    if version is None and ("architectures" in config or "model_type" in config):
        raise CheckpointError(f"{directory}/config.json is that of a Hugging Face checkpoint; tools/convert.py makes a weights directory from it")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{directory}/config.json: format_version is {version!r}; expected {FORMAT_VERSION}")
    records = config.get("files", [])
    for i, r in enumerate(records):
        for key, kind in (("name", str), ("bytes", int), ("xxh3_64", str)):
            if not isinstance(r, dict) or not isinstance(r.get(key), kind):
                raise CheckpointError(f"{directory}/config.json: files[{i}].{key} is {r.get(key) if isinstance(r, dict) else r!r}; expected {kind.__name__}")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        states = list(pool.map(lambda r: _state(directory / r["name"], r, checksums), records))
    files = [{"file": r["name"], "bytes": r["bytes"], "checksum": r["xxh3_64"], "state": s, "why": why} for r, (s, why) in zip(records, states)]
    known = {r["name"] for r in records}
    tensors: dict[str, tuple[TensorInfo, str]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        if path.name not in known:
            files.append({"file": path.name, "bytes": path.stat().st_size, "checksum": "", "state": "damaged" if records else "unchecked",
                          "why": "not one of the files of config.json" if records else "config.json has no checksums"})
        try:
            metadata = read_metadata(path)
            tensors.update({n: (i, metadata.get(f"{n}.format", "")) for n, i in read_safetensors(path).items()})
        except (CheckpointError, KeyError, TypeError, ValueError) as e:
            if not any(f["file"] == path.name and f["state"] == "damaged" for f in files):
                raise CheckpointError(str(e)) from None
    kinds = _kinds(tensors)
    return {"directory": str(directory), "source": config.get("source", ""), "random": config.get("random"),
            "model": {k: v for k, v in config.items() if k not in _OWN}, "tensors": kinds, "bytes": sum(k["bytes"] for k in kinds), "files": files,
            "tokenizer_files": config.get("tokenizer_files", []), "ok": all(f["state"] != "damaged" for f in files)}


def _table(header: list[str], rows: list[list[str]], right: set[int]) -> str:
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    return "\n".join("  " + "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths))).rstrip() for r in [header, *rows])


def as_text(r: dict[str, Any]) -> str:
    model = dict(r["model"])
    out = [f"{r['directory']}: {model.pop('architecture', 'unknown architecture')}, from {r['source'] or 'an unknown source'}", "", "model"]
    plain = {k: v for k, v in model.items() if not isinstance(v, (dict, list))}
    out.append("  " + ", ".join(f"{k} {str(v).lower() if isinstance(v, bool) else v}" for k, v in plain.items()))
    out += [f"  {k} {json.dumps(v)}" for k, v in model.items() if k not in plain]
    out += ["", "tensors"]
    if r["random"]:
        out.append(f"  random weights in {r['random'].get('format')}, made at load from seed {r['random'].get('seed')}")
    if r["tensors"]:
        out.append(_table(["kind", "format", "stored shape", "count", "MB"],
                          [[k["tensor"], k["format"], "x".join(map(str, k["stored_shape"])), str(k["count"]), f"{k['bytes'] / 1e6:,.1f}"] for k in r["tensors"]],
                          {3, 4}))
        out.append(f"  {r['bytes'] / 1e6:,.1f} MB in all")
    if r["files"]:
        out += ["", "files", _table(["file", "MB", "checksum", "state"],
                                    [[f["file"], f"{f['bytes'] / 1e6:,.1f}", f["checksum"], f["state"] + (f": {f['why']}" if f["why"] else "")] for f in r["files"]], {1})]
    out += ["", f"tokenizer files: {', '.join(r['tokenizer_files']) or 'none (token ids only)'}"]
    return "\n".join(out)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("weights", type=Path, help="weights directory (written by tools/convert.py)")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.add_argument("--no-checksums", action="store_true", help="do not read the files")
    a = p.parse_args(argv)
    try:
        result = inspect(a.weights, not a.no_checksums)
    except (CheckpointError, OSError) as e:
        print(f"inspect_weights: {e}", file=sys.stderr)
        return 1
    print(json.dumps(result, indent=1) if a.json else as_text(result))
    if not result["ok"]:
        print(f"inspect_weights: {a.weights} is damaged", file=sys.stderr)
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
