#!/usr/bin/env python3
"""Weights directory or Hugging Face checkpoint -> weights directory with quantized matrices, rounding each weight to the nearest.

    python tools/quantize.py CHECKPOINT_DIR model_repository/generator/1 --format q8_row
    python tools/quantize.py model_repository/generator/1 /data/my-model-q4 --format q4_g128 --lm-head q8_row

Formats (native/formats/format.h): q8_row has 8-bit codes and a scale per row; q4_g128 and q4_g64 4-bit codes and a scale and a zero per
128 or 64 columns. The embedding, norms and biases are kept. Memory use is about two matrices; a run that fails or is killed leaves an
earlier result as it was. This tool chooses scales and codes; the native module packs them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from codefuse_triton import _native

from checkpoint import CheckpointError, TensorInfo, open_checkpoint, read_json, read_safetensors
from convert import DTYPES, TOKENIZER_FILES, checked, plan_tensors, progress_bar, token_ids
from hf_models import plan_for
from rounding import ANY_FORMAT, FORMATS, GROUPS, check_format, round_to_nearest
from weights_writer import Planned, check_target, write_weights

BLOCK = 16 << 20  # elements rounded at a time
_TABLES = ("embed.weight", "position.weight")  # looked up by row, never quantized


def quantized(t: Planned, format: str) -> list[Planned]:
    """The tensors that take a matrix's place: codes, scale and, with a zero per group, zero."""
    check_format(t.name, format, t.shape)
    rows, columns = t.shape
    base = t.name.removesuffix(".weight")
    parts: dict[str, np.ndarray] = {}

    def weight() -> np.ndarray:
        whole = t.load()
        step = max(1, BLOCK // columns)
        blocks = []
        for begin in range(0, rows, step):
            w = checked(t.name, whole[begin:begin + step], DTYPES["f32"])
            try:
                blocks.append(_native.pack(format, *round_to_nearest(format, np.ascontiguousarray(w))))
            except ValueError as e:
                raise CheckpointError(f"tensor {t.name}: {e}") from None
        parts.update({key: np.concatenate([b[key] for b in blocks]) for key in blocks[0]})
        return parts.pop("weight")

    if format == "q8_row":
        return [Planned(t.name, t.shape, np.dtype("i1"), weight, format),
                Planned(f"{base}.scale", (rows,), np.dtype("<f4"), lambda: parts.pop("scale"))]
    groups = columns // GROUPS[format]
    return [Planned(t.name, (rows, columns // 2), np.dtype("u1"), weight, format),
            Planned(f"{base}.scale", (rows, groups), np.dtype("<f2"), lambda: parts.pop("scale")),
            Planned(f"{base}.zero", (rows, groups), np.dtype("u1"), lambda: parts.pop("zero"))]


def _native_tensors(source: Path, config: dict[str, Any]) -> list[Planned]:
    """The tensors of a weights directory in the order of its files."""
    if "random" in config:
        raise CheckpointError(f"{source}: its random weights are made at load; write them with tools/convert.py --random PRESET --write")
    tensors = []
    for file in config.get("files", []):
        stored: dict[str, TensorInfo] = read_safetensors(source / file["name"])
        for name, info in stored.items():
            if info.dtype not in DTYPES.values():
                raise CheckpointError(f"{info.file}: tensor {name} has dtype {info.dtype}: it is quantized already; start from the original")
            tensors.append(Planned(name, info.shape, info.dtype, info.load))
    return tensors


def _source(source: Path, ignore: set[str], tokenizer: bool) -> tuple[dict[str, Any], list[Planned], list[Path]]:
    """Config, tensors and tokenizer files of a weights directory or a Hugging Face checkpoint."""
    config = read_json(source / "config.json")
    if "format_version" in config:
        names = config.get("tokenizer_files", [])
        kept = {k: v for k, v in config.items() if k not in ("format_version", "files", "tokenizer_files", "formats")}
        return kept, _native_tensors(source, config), [source / n for n in names] if tokenizer else []
    plan = plan_for(config, ignore)
    tensors = plan_tensors(plan, open_checkpoint(source), None)
    files = [source / n for n in TOKENIZER_FILES if (source / n).is_file()] if tokenizer else []
    return {**plan.config, **token_ids(source, config), "source": str(source.resolve().name)}, tensors, files


def quantize(source: Path, target: Path, format: str, lm_head: str = "", dtype: str = "auto", ignore: set[str] = frozenset(), tokenizer: bool = True,
             progress=None) -> dict[str, Any]:
    """Quantizes `source` into `target`; returns the written config. lm_head: a format, "keep", or "" (q8_row, kept where it is
    the embedding). dtype: of what is kept. CheckpointError names what is wrong."""
    if format not in FORMATS:
        raise CheckpointError(f"format is {format!r}; expected {ANY_FORMAT}")
    if lm_head not in ("", "keep", *FORMATS):
        raise CheckpointError(f"lm_head is {lm_head!r}; expected keep, {ANY_FORMAT}")
    check_target(target)
    if target.resolve() == source.resolve():
        raise CheckpointError(f"target {target} is the source; name another directory")
    config, tensors, files = _source(source, ignore, tokenizer)
    if config.get("tied") and lm_head not in ("", "keep"):
        raise CheckpointError(f"lm_head is {lm_head!r}, but this model's LM head is its embedding, which is kept; expected keep")
    planned: list[Planned] = []
    for t in tensors:
        wanted = "" if len(t.shape) != 2 or t.name in _TABLES else (lm_head or "q8_row") if t.name == "lm_head.weight" else format
        if wanted not in ("", "keep"):
            planned += quantized(t, wanted)
            continue
        out = t.dtype if dtype == "auto" else DTYPES[dtype]
        planned.append(Planned(t.name, t.shape, out, lambda t=t, out=out: checked(t.name, t.load(), out)))
    config["formats"] = {"matrices": format, "lm_head": "keep" if config.get("tied") else lm_head or "q8_row"}
    with progress_bar(sum(t.nbytes for t in planned)) if progress is None else progress as tick:
        write_weights(target, config, planned, files, tick)
    return config


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", type=Path, help="weights directory (of tools/convert.py) or Hugging Face checkpoint directory")
    p.add_argument("target", type=Path, help="weights directory to write")
    p.add_argument("--format", required=True, choices=FORMATS, help="of every matrix but the embedding and the LM head")
    p.add_argument("--lm-head", default="", choices=["keep", *FORMATS], metavar="FORMAT", help="q8_row (default), q4_g128, q4_g64 or keep")
    p.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="of what is kept (embedding, norms, biases); auto keeps each tensor's own")
    p.add_argument("--ignore-field", action="append", default=[], metavar="NAME", help="a config.json field that does not matter")
    p.add_argument("--no-tokenizer", action="store_true", help="without tokenizer files")
    a = p.parse_args(argv)
    try:
        quantize(a.source, a.target, a.format, a.lm_head, a.dtype, set(a.ignore_field), not a.no_tokenizer)
    except (CheckpointError, OSError) as e:
        print(f"quantize: {e}", file=sys.stderr)
        return 1
    print(f"wrote {a.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
