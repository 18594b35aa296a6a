#!/usr/bin/env python3
"""Where the time of a layer goes: the engine's own kernels, without the engine.

    python tools/bench_kernels.py                                             # CodeFuse-13B's shape, all formats, 1 row at position 320
    python tools/bench_kernels.py --rows 1,8,64 --position 1000 --formats q8_row --json kernels.json
    python tools/bench_kernels.py --rows "" --prefill 512,1024
    python tools/bench_kernels.py --tensor-parallel 2 --rows 1,8,64 --prefill 512

Random weights of a preset's shape; every layer has its own, so that none stay in a cache. A figure is of what the named ops launch in all
layers, recorded as one CUDA graph and replayed, over the number of layers: the median of --repeats, in microseconds a layer. Bytes alone: what a
layer's matrices (and the keys and values of the rows' sequences) take at the read bandwidth measured in the same run.
Decode rows are each of a sequence of its own. Prefill rows are one prompt from its beginning; a product of T rows with N x K weights is 2 T N K
operations, attention 4 heads x head_dim for each pair of a row and a position it sees. With --tensor-parallel also what the sum over that many GPUs takes
that a layer ends with, on average of 1,000 one behind the other; the layers themselves are whole, on one GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from codefuse_triton import _native

sys.path.insert(0, str(Path(__file__).parent))
from arguments import DTYPES, device, integer, output  # noqa: E402
from bench_engine import device_name, git_commit, table  # noqa: E402
from convert import PRESETS, write_random  # noqa: E402

PAIRS = ["linear_pair", "linear_add_pair"]
DECODE = {
    "the two matrix launches": PAIRS,
    "with both norms": ["norm_pair", *PAIRS],
    "with attention as well": ["norm_pair", "linear_pair", "rope_attention", "linear_add_pair"],
    "the same, attention after the whole first launch": ["norm_pair", "linear_pair", "rope_attention after", "linear_add_pair"],
    "both norms alone": ["norm_pair"],
    "attention alone": ["rope_attention"],
}
PRODUCTS = ["qkv", "mlp_up", "attn_out", "mlp_down"]
PREFILL = {"both norms": ["norm_pair"], **{name: [name] for name in PRODUCTS}, "rope and storing K and V": ["rope_store"], "attention": ["attention"],
           "the whole layer": ["norm_pair", "linear_pair", "rope_attention", "linear_add_pair"]}


def operations(layers: Any, what: str, rows: int) -> float:
    """Multiplications and additions of one layer; 0 where they are not what counts."""
    attention = 2.0 * layers.attended_products * rows * (rows + 1) / 2
    products = {name: 2.0 * rows * n * k for name, (n, k) in layers.shapes.items()}
    return {"attention": attention, **products, "the whole layer": sum(products.values()) + attention}.get(what, 0.0)


def measure(a: argparse.Namespace, weights: Path, bandwidth: float) -> dict[str, Any]:
    """One format's figures: microseconds a layer {"median", "min", "max"} by rows and what ran."""
    layers = _native.testing.Layers(str(weights), device=a.device, dtype=a.dtype, decode_rows=max(a.rows, default=1), position=a.position,
                                    prefill_rows=max(a.prefill, default=1), threads=a.threads)

    def spread(ops: list[str], **rows: int) -> dict[str, float]:
        us = [s * 1e6 / layers.layers for s in layers.time(ops, repeats=a.repeats, **rows)]
        return {"median": median(us), "min": min(us), "max": max(us)}

    out: dict[str, Any] = {"device": layers.device, "dtype": layers.dtype, "layers": layers.layers, "weight_bytes": layers.weight_bytes, "decode": [], "prefill": []}
    for rows in a.rows:
        kv = layers.kv_bytes * (a.position + 1) * rows
        out["decode"].append({"rows": rows, "position": a.position, "bytes_us": layers.weight_bytes / bandwidth * 1e6, "kv_bytes_us": kv / bandwidth * 1e6,
                              "us": {what: spread(ops, decode_rows=rows) for what, ops in DECODE.items()}})
    for rows in a.prefill:
        us = {what: spread(ops, prefill_rows=rows) for what, ops in PREFILL.items()}
        out["prefill"].append({"rows": rows, "us": us, "tflops": {what: operations(layers, what, rows) / us[what]["median"] / 1e6 for what in us}})
    return out


def exchanges(a: argparse.Namespace) -> list[dict[str, float]]:
    ranks, hidden = _native.testing.Ranks(a.device, a.tensor_parallel), PRESETS[a.preset]["hidden_size"]
    return [{"rows": rows, "us": 1e6 * ranks.time_sums(rows * hidden)} for rows in sorted({*a.rows, *a.prefill})]


def as_text(r: dict[str, Any]) -> str:
    formats = list(r["formats"])
    some = r["formats"][formats[0]]
    out = [f"{r['preset']}, {some['layers']} layers, on {some['device']} ({r['device_name']}), {some['dtype']}; read bandwidth {r['read_bandwidth_gb_s']:,.1f} GB/s; "
           f"medians of {r['repeats']}; {r['date']}, commit {r['commit'] or 'unknown'}"]
    for i, d in enumerate(some["decode"]):
        each = [r["formats"][f]["decode"][i] for f in formats]
        rows = [["bytes of the weights alone", *(f"{e['bytes_us']:.1f}" for e in each)], ["and of keys and values", *(f"{e['bytes_us'] + e['kv_bytes_us']:.1f}" for e in each)]]
        rows += [[what, *(f"{e['us'][what]['median']:.1f}" for e in each)] for what in DECODE]
        out += ["", f"{d['rows']} decode row{'s' * (d['rows'] > 1)} at position {d['position']}, microseconds a layer", "", table(["", *formats], rows)]
    for i, p in enumerate(some["prefill"]):
        each = [r["formats"][f]["prefill"][i] for f in formats]
        cell = lambda e, what: f"{e['us'][what]['median']:.1f}" + (f" ({e['tflops'][what]:,.1f})" if e["tflops"][what] else "")  # noqa: E731
        out += ["", f"{p['rows']} prefill rows, microseconds a layer (TFLOP/s)", "", table(["", *formats], [[what, *(cell(e, what) for e in each)] for what in PREFILL])]
    if r["exchanges"]:
        rows = [[str(e["rows"]), f"{e['us']:.1f}"] for e in r["exchanges"]]
        out += ["", f"the sum over {r['tensor_parallel']} ranks that a layer ends with, microseconds", "", table(["rows", "us"], rows)]
    return "\n".join(out)


def counts(name: str, most: int) -> Any:
    def parse(text: str) -> list[int]:
        try:
            values = [int(v) for v in text.split(",") if v.strip()]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{name} is {text!r}; expected numbers with commas between") from None
        if any(not 1 <= v <= most for v in values):
            raise argparse.ArgumentTypeError(f"{name} is {text!r}; expected numbers of 1 to {most}")
        return values

    return parse


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", default="gptneox-13b", help="shape of the model (presets of tools/convert.py)")
    p.add_argument("--formats", default="f16,q8_row,q4_g128,q4_g64", help="of the weights, with commas between")
    p.add_argument("--rows", type=counts("rows", _native.testing.DECODE_ROWS), default=[1], metavar="N,..", help='decode rows; "": none')
    p.add_argument("--position", type=integer(0), default=320, help="of each decode row: so many tokens are before it")
    p.add_argument("--prefill", type=counts("prefill", 65536), default=[1024], metavar="N,..", help='prefill rows; "": none')
    p.add_argument("--device", type=device, default="cuda", help="cuda, cuda:N or cpu")
    p.add_argument("--tensor-parallel", type=integer(1, 64), default=1, help="GPUs whose sums are measured, --device the first")
    p.add_argument("--dtype", default="auto", choices=DTYPES, help="of activations and KV cache")
    p.add_argument("--repeats", type=integer(1), default=15)
    p.add_argument("--threads", type=integer(0, 1024), default=0, help="CPU threads, 0: all cores")
    p.add_argument("--json", type=output, metavar="FILE", help="write the figures as JSON too")
    a = p.parse_args(argv)
    if a.preset not in PRESETS:
        p.error(f"preset is {a.preset!r}; known are {', '.join(PRESETS)}")
    if not a.rows and not a.prefill:
        p.error("rows and prefill are both empty; expected some of one")
    return a


def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    try:
        bandwidth = _native.read_bandwidth(a.device, a.threads)
        formats = {}
        for format in a.formats.split(","):
            print(f"  {format} ...", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory() as temp:
                write_random(a.preset, Path(temp) / "weights", format, 0, on_disk=False)
                formats[format] = measure(a, Path(temp) / "weights", bandwidth)
        between = exchanges(a) if a.tensor_parallel > 1 else []
    except (ValueError, RuntimeError, OSError) as e:
        print(f"bench_kernels: {e}", file=sys.stderr)
        return 1
    device = next(iter(formats.values()))["device"]
    r = {"preset": a.preset, "device_name": device_name(device), "read_bandwidth_gb_s": bandwidth / 1e9, "repeats": a.repeats, "formats": formats, "tensor_parallel": a.tensor_parallel, "exchanges": between,
         "commit": git_commit(),
         "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")}
    print(as_text(r))
    if a.json:
        a.json.write_text(json.dumps(r, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
