#!/usr/bin/env python3
"""Hugging Face checkpoint -> native weights directory (config.json, model-*.safetensors, tokenizer files).

    python tools/convert.py CHECKPOINT_DIR model_repository/generator/1
    python tools/convert.py models/codefuse/fastertransformer/2-gpu /data/codefuse   # a directory of FasterTransformer (config.ini)
    python tools/convert.py --random gptneox-13b /data/random-13b     # weights made at load, for benchmarks
    python tools/convert.py --random gptneox-13b --format q8_row /data/random-13b

A checkpoint that GPTQ or AWQ has quantized to 4 bits keeps its codes, scales and zeros (tools/prequantized.py says which are read).
Tensors are read one at a time (memory use is about one tensor), checked (shape, NaN, Inf, overflow of the output type) and
written in the canonical layout; a run that fails or is killed leaves an earlier conversion as it was.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
from codefuse_triton import _native

from arguments import integer
from checkpoint import BF16, CheckpointError, TensorInfo, open_checkpoint, read_json
from ft_directory import is_ft_directory, open_ft_directory
from hf_models import PRESETS, Plan, Source, plan_for
from prequantized import method_of, open_tensors, plan_quantized
from rounding import FORMATS
from weights_writer import ELEMENTS, FORMAT_VERSION, Planned, check_target, write_weights

DTYPES = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2"), "bf16": BF16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def checked(name: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """value as dtype; refuses NaN, Inf and what overflows in dtype."""
    wide = value if value.dtype == np.float32 else value.astype(np.float32)
    if not np.isfinite(wide).all():
        raise CheckpointError(f"tensor {name} holds {int((~np.isfinite(wide)).sum())} NaN or Inf values of {wide.size}")
    if value.dtype == dtype:
        return value
    limit = {DTYPES["f16"]: 65504.0}.get(dtype)
    if limit is not None and wide.size and (peak := float(np.abs(wide).max())) > limit:
        raise CheckpointError(f"tensor {name} has magnitude {peak:g}, above float16's {limit:g}; convert with --dtype bf16 or f32")
    return value.astype(dtype)


def _planned(name: str, source: Source, info: TensorInfo, dtype: np.dtype | None) -> Planned:
    if info.shape != source.hf_shape:
        raise CheckpointError(f"{info.file}: tensor {info.name} has shape {list(info.shape)}; config.json makes it {list(source.hf_shape)}")
    if info.dtype not in DTYPES.values() and info.dtype != np.float64:
        raise CheckpointError(f"{info.file}: tensor {info.name} has dtype {info.dtype}; expected a float type")
    out = dtype or (np.dtype("<f4") if info.dtype == np.float64 else info.dtype)
    return Planned(name, source.shape, out, lambda: source.transform(checked(info.name, info.load(), out)))


def plan_tensors(plan: Plan, stored: dict[str, TensorInfo], dtype: np.dtype | None) -> list[Planned]:
    """Canonical tensors in writing order; refuses missing and unexpected ones by name. dtype None keeps each tensor's own."""
    used, tensors = set(), []
    for name, source in plan.tensors.items():
        hf_name = source.hf_name if source.hf_name in stored else source.alias
        if hf_name not in stored:
            raise CheckpointError(f"tensor {source.hf_name} (our {name}) is missing from the checkpoint")
        used.add(hf_name)
        tensors.append(_planned(name, source, stored[hf_name], dtype))
    extra = sorted(n for n in stored if n not in used and not n.endswith(plan.ignored_suffixes))
    if extra:
        raise CheckpointError(f"tensor {extra[0]} ({len(extra)} in all) is not part of {plan.config['architecture']} as config.json describes it")
    return tensors


def token_ids(directory: Path, config: dict) -> dict:
    """bos_id (-1: none) and eos_ids from generation_config.json, else config.json."""
    merged = dict(config)
    if (directory / "generation_config.json").exists():
        merged.update({k: v for k, v in read_json(directory / "generation_config.json").items() if k in ("bos_token_id", "eos_token_id") and v is not None})
    bos, eos = merged.get("bos_token_id"), merged.get("eos_token_id")
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    for field, value in [("bos_token_id", bos)] * (bos is not None) + [("eos_token_id", e) for e in eos]:
        if not isinstance(value, int) or not 0 <= value < config["vocab_size"]:
            raise CheckpointError(f"field {field} is {value!r}; expected a token id below vocab_size {config['vocab_size']}")
    return {"bos_id": -1 if bos is None else bos, "eos_ids": eos}


def plan_source(source: Path, ignore: set[str], dtype: np.dtype | None) -> tuple[dict, list[Planned]]:
    """Our config and tensors of a Hugging Face checkpoint, quantized or not, or of a FasterTransformer directory."""
    method = None
    if is_ft_directory(source):
        hf, stored = open_ft_directory(source)
    else:
        hf = read_json(source / "config.json")
        method = method_of(source, hf)
        stored = open_tensors(source) if method else open_checkpoint(source)
    plan = plan_for({k: v for k, v in hf.items() if k != "quantization_config"}, ignore)
    config = {**plan.config, **token_ids(source, hf), "source": str(source.resolve().name)}
    if not method:
        return config, plan_tensors(plan, stored, dtype)
    tensors, format = plan_quantized(plan, method, stored, lambda name, source, info: _planned(name, source, info, dtype))
    return {**config, "formats": {"matrices": format, "lm_head": "keep", "method": method.name}}, tensors


def convert(source: Path, target: Path, dtype: str = "auto", ignore: set[str] = frozenset(), tokenizer: bool = True, progress=None) -> dict:
    """Converts `source` into `target`; returns the written config. CheckpointError names what is wrong."""
    check_target(target)
    config, tensors = plan_source(source, set(ignore), None if dtype == "auto" else DTYPES[dtype])
    files = [source / n for n in TOKENIZER_FILES if (source / n).is_file()] if tokenizer else []
    if tokenizer and not any(f.name in ("tokenizer.json", "tokenizer.model") for f in files):
        raise CheckpointError(f"{source}: no tokenizer.json and no tokenizer.model; save a fast tokenizer there with transformers, or pass --no-tokenizer")
    with progress_bar(sum(t.nbytes for t in tensors)) if progress is None else progress as tick:
        write_weights(target, config, tensors, files, tick)
    return config


def write_random(preset: str, target: Path, format: str, seed: int, on_disk: bool) -> None:
    """A preset's config with random weights: made by the loader (nothing but config.json on disk) or written out."""
    if format not in ("auto", *DTYPES, *FORMATS):
        raise CheckpointError(f"format is {format!r}; expected auto, {', '.join((*DTYPES, *FORMATS))}")
    check_target(target)
    hf = PRESETS[preset]
    plan = plan_for(hf, set())
    ids = token_ids(Path("/nonexistent"), hf)
    config = {**plan.config, **ids, "source": f"random {preset}, seed {seed}"}
    format = "f16" if format == "auto" else format
    made_at_load = {**config, "random": {"seed": seed, "format": format}}
    if not on_disk:
        write_weights(target, made_at_load, [], [])
        return
    place = {name: i for i, name in enumerate(plan.tensors)}
    tensors = []
    for name, (element, id, shape, raw) in _native.random_tensors(json.dumps({"format_version": FORMAT_VERSION, **made_at_load})).items():
        dtype = ELEMENTS[element]
        tensors.append(Planned(name, tuple(shape), dtype, lambda raw=raw, dtype=dtype, shape=shape: raw.view(dtype).reshape(shape), id))
    tensors.sort(key=lambda t: (place[t.name if t.name in place else f"{t.name.rpartition('.')[0]}.weight"], t.name not in place, t.name))
    with progress_bar(sum(t.nbytes for t in tensors)) as tick:
        write_weights(target, config, tensors, [], tick, threads=min(8, os.cpu_count() or 1))


class progress_bar:
    """A progress bar on stderr: `with progress_bar(total) as tick: tick(n)`. unit: of total; "MB" counts bytes."""

    def __init__(self, total: int, unit: str = "MB"):
        self._total, self._done, self._shown, self._unit, self._scale = max(total, 1), 0, -1, unit, 1e6 if unit == "MB" else 1

    def __enter__(self):
        return self._tick

    def _tick(self, n: int) -> None:
        self._done += n
        percent = 100 * self._done // self._total
        if percent == self._shown or not (sys.stderr.isatty() or percent // 25 > self._shown // 25):
            return
        self._shown = percent
        end = "\r" if sys.stderr.isatty() else "\n"
        print(f"  [{'#' * (percent // 4):25s}] {percent:3d} %  {self._done / self._scale:,.0f} of {self._total / self._scale:,.0f} {self._unit}", end=end, file=sys.stderr, flush=True)

    def __exit__(self, *_):
        if sys.stderr.isatty():
            print(file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", nargs="?", type=Path, help="directory of a Hugging Face checkpoint or of FasterTransformer")
    p.add_argument("target", type=Path, help="weights directory to write, e.g. model_repository/generator/1")
    p.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="type of the written tensors; auto keeps each tensor's own")
    p.add_argument("--ignore-field", action="append", default=[], metavar="NAME", help="a config.json field that does not matter")
    p.add_argument("--no-tokenizer", action="store_true", help="convert without tokenizer files (the engine then takes token ids only)")
    p.add_argument("--random", choices=list(PRESETS), help="random weights of this shape instead of a checkpoint")
    p.add_argument("--format", choices=["auto", *DTYPES, *FORMATS], help="with --random: format of its matrices (auto: --dtype, else f16)")
    p.add_argument("--write", action="store_true", help="with --random: write the weights to disk instead of making them at load")
    p.add_argument("--seed", type=integer(0, 2**53), default=0, help="with --random")
    a = p.parse_args(argv)
    if (a.source is None) == (a.random is None):
        p.error("give a checkpoint directory and the target, or the target and --random PRESET")
    if a.format and not a.random:
        p.error("--format is for --random; tools/quantize.py quantizes a checkpoint")
    try:
        if a.random:
            write_random(a.random, a.target, a.dtype if a.format in (None, "auto") else a.format, a.seed, a.write)
        else:
            convert(a.source, a.target, a.dtype, set(a.ignore_field), not a.no_tokenizer)
    except (CheckpointError, OSError) as e:
        print(f"convert: {e}", file=sys.stderr)
        return 1
    print(f"wrote {a.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
