#!/usr/bin/env python3
"""Weights directory or checkpoint (any that tools/convert.py reads) -> weights directory with quantized matrices.

    python tools/quantize.py CHECKPOINT_DIR model_repository/generator/1 --format q8_row
    python tools/quantize.py model_repository/generator/1 /data/my-model-q4 --format q4_g128 --method gptq --lm-head q8_row

Formats (native/formats/format.h): q8_row has 8-bit codes and a scale per row; q4_g128 and q4_g64 4-bit codes and a scale and a zero per
128 or 64 columns. The embedding, norms and biases are kept. Each weight is rounded to the nearest, or calibrated on code by GPTQ. A checkpoint that
GPTQ or AWQ has quantized to 4 bits keeps its codes (only its LM head is quantized here).

The result is measured against the original (tools/evaluate.py); the figures go into its config.json, and one that loses too much is
refused. Memory use is about two matrices, with GPTQ a layer. A run that fails or is killed leaves an earlier result as it was; one with
GPTQ goes on where it was when the same command is given again (its finished layers wait in TARGET/.gptq). This tool chooses scales and
codes; the native module packs them.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from codefuse_triton import DeviceError, LoadError, _native

import calibration
import evaluate as evaluation
from arguments import integer, number
from checkpoint import CheckpointError, TensorInfo, is_weights_directory, read_json, read_safetensors
from convert import DTYPES, TOKENIZER_FILES, checked, plan_source, progress_bar
from rounding import ANY_FORMAT, FORMATS, GROUPS, check_format, round_to_nearest
from weights_writer import Planned, check_target, planned_matrix, write_weights

MAX_LOSS = (0.5, 10.0)  # percent of perplexity, in 8 and in 4 bits
BLOCK = 16 << 20  # elements rounded at a time
_TABLES = ("embed.weight", "position.weight")  # looked up by row, never quantized


def _rounded(t: Planned, format: str) -> dict[str, np.ndarray]:
    """The stored parts of a matrix, each weight rounded to the nearest."""
    whole, step = t.load(), max(1, BLOCK // t.shape[1])
    blocks = []
    for begin in range(0, t.shape[0], step):
        w = checked(t.name, whole[begin:begin + step], DTYPES["f32"])
        try:
            blocks.append(_native.pack(format, *round_to_nearest(format, np.ascontiguousarray(w))))
        except ValueError as e:
            raise CheckpointError(f"tensor {t.name}: {e}") from None
    return {key: np.concatenate([b[key] for b in blocks]) for key in blocks[0]}


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
    """Config, tensors and tokenizer files of a weights directory or of what tools/convert.py reads."""
    if is_weights_directory(source):
        config = read_json(source / "config.json")
        names = config.get("tokenizer_files", [])
        kept = {k: v for k, v in config.items() if k not in ("format_version", "files", "tokenizer_files", "formats", "quality", "calibration")}
        return kept, _native_tensors(source, config), [source / n for n in names] if tokenizer else []
    files = [source / n for n in TOKENIZER_FILES if (source / n).is_file()] if tokenizer else []
    return *plan_source(source, ignore, None), files


@dataclass(frozen=True)
class Gptq:
    """How to calibrate. text: documents; name: what they are, for config.json."""

    text: list[str]
    name: str
    windows: int = 128
    window_tokens: int = 512
    device: str = "auto"


@dataclass(frozen=True)
class Gate:
    """What the result must be worth (tools/evaluate.py). max_loss: of perplexity, in percent; None: by format. accept: write it anyway."""

    text: list[str]
    name: str
    tokens: int = evaluation.TOKENS
    max_loss: float | None = None
    accept: bool = False
    device: str = "auto"

    def limit(self, format: str) -> float:
        return MAX_LOSS[GROUPS[format] > 0] if self.max_loss is None else self.max_loss


class Refused(CheckpointError):
    """The result loses too much."""


def _formats_of(tensors: list[Planned], format: str, lm_head: str) -> dict[str, str]:
    """Format id of each matrix to quantize; those of a checkpoint that is quantized already stay as they are."""
    wanted = {t.name: lm_head if t.name == "lm_head.weight" else format
              for t in tensors if len(t.shape) == 2 and t.name not in _TABLES and t.name.endswith(".weight") and not t.format}
    for t in tensors:
        if wanted.get(t.name, "keep") != "keep":
            check_format(t.name, wanted[t.name], t.shape)
    return {n: f for n, f in wanted.items() if f != "keep"}


def _gptq_run(gptq: Gptq, source: Path, work: Path, config: dict[str, Any], tensors: list[Planned], formats: dict[str, str], progress) -> Any:
    """The finished run: its parts(name) are the results."""
    try:
        import gptq_layers
    except ModuleNotFoundError as e:
        raise CheckpointError(f"--method gptq needs the package {e.name}, which is not installed; install it, or use --method nearest") from None
    length = min(gptq.window_tokens, config["max_positions"])
    ids = calibration.windows(calibration.open_vocab(source), gptq.text, length, gptq.windows)
    if ids.max() >= config["vocab"]:
        raise CheckpointError(f"the tokenizer gives token {ids.max()}; the model's vocab is {config['vocab']}")
    files = {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(source.iterdir()) if f.suffix in (".safetensors", ".bin", ".json")}
    identity = {"source": str(source.resolve()), "files": files, "config": config, "formats": formats, "text": xxhash.xxh3_64_hexdigest(ids.tobytes())}
    with progress_bar(config["layers"] + 1, "layers") if progress is None else progress as tick:
        run = gptq_layers.LayerRun(config, {t.name: t for t in tensors}, lambda t: checked(t.name, t.load(), DTYPES["f32"]), formats, ids, work, identity,
                                   gptq_layers.pick_device(gptq.device), tick)
        run.run()
    config["calibration"] = {"text": gptq.name, "windows": len(ids), "tokens": int(ids.size)}
    return run


def _inspected(gate: Gate, source: Path, ignore: set[str], format: str, progress) -> Callable[[Path], dict[str, Any]]:
    def inspect(result: Path) -> dict[str, Any]:
        with evaluation.as_weights(source, result, ignore) as original:
            quality = evaluation.evaluate(original, result, calibration.open_vocab(result), gate.text, gate.name, gate.tokens, gate.device, progress)
        loss, limit = 100 * (quality["perplexity_ratio"][0] - 1), gate.limit(format)
        print(evaluation.shown(quality), file=sys.stderr)
        if loss > limit and not gate.accept:
            raise Refused(f"perplexity rises by {loss:.3g} %, more than --max-loss {limit:g}; nothing was written (--accept writes it anyway)")
        return {"quality": quality}

    return inspect


def quantize(source: Path, target: Path, format: str, lm_head: str = "", dtype: str = "auto", ignore: set[str] = frozenset(), tokenizer: bool = True,
             progress=None, embedding: str = "", gptq: Gptq | None = None, gate: Gate | None = None) -> dict[str, Any]:
    """Quantizes `source` into `target`; returns the written config. lm_head: a format, "keep", or "" (q8_row, kept where it is the embedding).
    dtype: of what is kept; embedding: of the embedding, where it is another. gptq: calibrated instead of rounded to the nearest. gate: the
    result is measured, and refused if it is too bad. CheckpointError names what is wrong."""
    if format not in FORMATS:
        raise CheckpointError(f"format is {format!r}; expected {ANY_FORMAT}")
    if lm_head not in ("", "keep", *FORMATS):
        raise CheckpointError(f"lm_head is {lm_head!r}; expected keep, {ANY_FORMAT}")
    if embedding not in ("", "auto", *DTYPES):
        raise CheckpointError(f"embedding is {embedding!r}; expected auto, {', '.join(DTYPES)}: it is looked up by row and never quantized")
    check_target(target)
    if target.resolve() == source.resolve():
        raise CheckpointError(f"target {target} is the source; name another directory")
    if gate:
        _native.check_device(gate.device)
    config, tensors, files = _source(source, ignore, tokenizer)
    if gate and not any(f.name in ("tokenizer.json", "tokenizer.model") for f in files):
        raise CheckpointError(f"{source}: no tokenizer.json and no tokenizer.model to measure the result with; pass --no-evaluate")
    if config.get("tied") and lm_head not in ("", "keep"):
        raise CheckpointError(f"lm_head is {lm_head!r}, but this model's LM head is its embedding, which is kept; expected keep")
    if imported := config.get("formats"):
        if gptq:
            raise CheckpointError(f"method is gptq, but {source} is quantized already, by {imported['method']}; expected nearest, for its LM head")
        if imported["matrices"] != format:
            raise CheckpointError(f"format is {format!r}, but {source} is quantized already; expected {imported['matrices']}, which keeps its codes")
    head = "keep" if config.get("tied") else lm_head or "q8_row"
    formats = _formats_of(tensors, format, head)
    new, work = not target.exists(), target / ".gptq"
    try:
        run = _gptq_run(gptq, source, work, config, tensors, formats, progress) if gptq else None
        planned: list[Planned] = []
        for t in tensors:
            if t.name in formats:
                make = partial(run.parts, t.name) if run else partial(_rounded, t, formats[t.name])
                planned += planned_matrix(t.name, t.shape, formats[t.name], make)
                continue
            if imported and (t.format or t.name.endswith((".scale", ".zero", ".order"))):
                planned.append(t)
                continue
            kept = (embedding or dtype) if t.name in _TABLES else dtype
            out = t.dtype if kept == "auto" else DTYPES[kept]
            planned.append(Planned(t.name, t.shape, out, lambda t=t, out=out: checked(t.name, t.load(), out)))
        config["formats"] = {"matrices": format, "lm_head": head, "method": imported["method"] if imported else "gptq" if gptq else "nearest"}
        with progress_bar(sum(t.nbytes for t in planned)) if progress is None else progress as tick:
            write_weights(target, config, planned, files, tick, _inspected(gate, source, ignore, format, progress) if gate else None)
        shutil.rmtree(work, ignore_errors=True)
    except CheckpointError as e:
        if not isinstance(e, Refused):  # the layers of a refused run are kept for one that accepts it
            shutil.rmtree(work, ignore_errors=True)
        if new:
            with contextlib.suppress(OSError):
                target.rmdir()
        raise
    return config


def _texts(path: Path | None, default: Callable[[], list[str]], name: str) -> tuple[list[str], str]:
    return (calibration.read_texts(path), path.name) if path else (default(), name)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", type=Path, help="weights directory (of tools/convert.py) or a checkpoint that tools/convert.py reads")
    p.add_argument("target", type=Path, help="weights directory to write")
    p.add_argument("--format", required=True, choices=FORMATS, help="of every matrix but the embedding and the LM head")
    p.add_argument("--method", default="nearest", choices=["nearest", "gptq"], help="nearest needs no text; gptq needs torch, and uses a GPU where torch has one")
    p.add_argument("--lm-head", default="", choices=["keep", *FORMATS], metavar="FORMAT", help="q8_row (default), q4_g128, q4_g64 or keep")
    p.add_argument("--embedding", default="", choices=["auto", *DTYPES], metavar="DTYPE", help="its type, f32, f16 or bf16; never quantized (default: --dtype)")
    p.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="of what is kept (embedding, norms, biases); auto keeps each tensor's own")
    p.add_argument("--calibration", type=Path, metavar="TEXT", help="for gptq: text file, .jsonl with a key \"text\", or directory; default: Python's standard library")
    p.add_argument("--windows", type=integer(1), default=128, help="for gptq: pieces of that text (default 128)")
    p.add_argument("--window-tokens", type=integer(16), default=512, help="for gptq: their length (default 512)")
    p.add_argument("--evaluate", type=Path, metavar="TEXT", help="text to measure the loss on; default: the held-out sample of the demo corpus")
    p.add_argument("--evaluate-tokens", type=integer(evaluation.WINDOW), default=evaluation.TOKENS, help=f"of it (default {evaluation.TOKENS:,})")
    p.add_argument("--max-loss", type=number(0), metavar="PERCENT", help=f"refuse if perplexity rises by more (default {MAX_LOSS[0]:g} in 8 bits, {MAX_LOSS[1]:g} in 4)")
    p.add_argument("--accept", action="store_true", help="write the result whatever it loses")
    p.add_argument("--no-evaluate", action="store_true", help="do not measure the loss")
    p.add_argument("--device", default="auto", help="for gptq and the measurement: auto, cpu, cuda or cuda:N")
    p.add_argument("--ignore-field", action="append", default=[], metavar="NAME", help="a config.json field that does not matter")
    p.add_argument("--no-tokenizer", action="store_true", help="without tokenizer files (and so without a measurement)")
    a = p.parse_args(argv)
    try:
        gptq = gate = None
        if a.method == "gptq":
            gptq = Gptq(*_texts(a.calibration, calibration.standard_library, calibration.STANDARD_LIBRARY), a.windows, a.window_tokens, a.device)
        if not (a.no_evaluate or a.no_tokenizer):
            gate = Gate(*_texts(a.evaluate, calibration.held_out, calibration.HELD_OUT), a.evaluate_tokens, a.max_loss, a.accept, a.device)
        quantize(a.source, a.target, a.format, a.lm_head, a.dtype, set(a.ignore_field), not a.no_tokenizer, None, a.embedding, gptq, gate)
    except (ValueError, LoadError, DeviceError, OSError) as e:
        print(f"quantize: {e}", file=sys.stderr)
        return 1
    print(f"wrote {a.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
