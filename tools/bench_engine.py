#!/usr/bin/env python3
"""Speed of the engine on one device, or several GPUs that share the weights: latency of single requests and throughput of many, through its Python API.

    python tools/bench_engine.py model_repository/generator/1
    python tools/bench_engine.py --random gptneox-13b --device cuda --json figures.json --plot figures.png
    python tools/bench_engine.py model_repository/generator/1 --beside transformers --hf CHECKPOINT_DIR

Greedy, prompts of random token ids, end tokens ignored, everything a served token passes included: scheduler, sampling, stop
checks, polling. Figures are medians of repeated runs with their range. GB/s is what a decode step must read - every layer
weight and the LM head once, and the keys and values so far - times decode tokens per second; the percentage is of the read
bandwidth measured in the same run, of all GPUs together. --beside transformers runs its generate() alternately with the engine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

import codefuse_triton
from codefuse_triton import Engine, Outbox
from codefuse_triton._native import read_bandwidth

from arguments import DTYPES, device, integer, output, several

SHAPES = "16/8,64/32,256/128,1024/512"
ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Shape:
    prompt: int
    output: int

    def __str__(self) -> str:
        return f"{self.prompt}/{self.output}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        prompt, _, output = text.partition("/")
        if not (prompt.isdigit() and output.isdigit() and int(prompt) >= 1 and int(output) >= 2):
            raise argparse.ArgumentTypeError(f"shape is {text!r}; expected PROMPT/OUTPUT in tokens, at least 1/2")
        return cls(int(prompt), int(output))


@dataclass(frozen=True)
class Timing:
    """One request, in seconds from its submission."""

    first: float  # to its first tokens
    last: float
    decode_rate: float  # tokens per second after the first


class Spread:
    """Median, least and greatest of repeated runs."""

    def __init__(self, values: list[float]):
        self.median, self.low, self.high = statistics.median(values), min(values), max(values)

    def text(self, digits: int = 1) -> str:
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f}..{self.high:,.{digits}f})"

    def data(self) -> dict[str, float]:
        return {"median": self.median, "min": self.low, "max": self.high}


def summary(timings: list[Timing]) -> dict[str, Spread]:
    return {"total_ms": Spread([1e3 * t.last for t in timings]), "ttft_ms": Spread([1e3 * t.first for t in timings]),
            "decode_tokens_s": Spread([t.decode_rate for t in timings])}


def run_one(engine: Engine, prompt: np.ndarray, tokens: int) -> Timing:
    """A single streamed request."""
    outbox, seen, first, first_tokens = Outbox(), 0, 0.0, 0
    start = time.perf_counter()
    engine.submit(prompt, outbox=outbox, max_tokens=tokens, ignore_eos=True)
    while True:
        chunk = outbox.poll()[0]
        now = time.perf_counter() - start
        seen += len(chunk.token_ids)
        if not first and seen:
            first, first_tokens = now, seen
        if chunk.finish_reason:
            break
    _check(chunk, seen, tokens)
    if first_tokens == tokens:  # too fast to see from here: the engine's own clock
        return Timing(chunk.queue_s + chunk.prefill_s, now, (tokens - 1) / max(chunk.decode_s, 1e-9))
    return Timing(first, now, (tokens - first_tokens) / (now - first))


def run_many(engine: Engine, prompts: list[np.ndarray], tokens: int) -> float:
    """Output tokens per second of requests submitted together, from the first submission to the last token."""
    outbox, seen, open_requests = Outbox(), {}, len(prompts)
    start = time.perf_counter()
    for prompt in prompts:
        seen[engine.submit(prompt, outbox=outbox, max_tokens=tokens, ignore_eos=True)] = 0
    while open_requests:
        for chunk in outbox.poll():
            seen[chunk.uid] += len(chunk.token_ids)
            if chunk.finish_reason:
                _check(chunk, seen[chunk.uid], tokens)
                open_requests -= 1
    return sum(seen.values()) / (time.perf_counter() - start)


def _check(chunk: Any, seen: int, tokens: int) -> None:
    if chunk.finish_reason != "length" or seen != tokens:
        raise RuntimeError(f"a request ended with {chunk.finish_reason} {chunk.error} after {seen} of {tokens} tokens")


def kv_bytes_per_token(config: dict[str, Any], dtype: str) -> int:
    return 2 * config["layers"] * config["kv_heads"] * config["head_dim"] * ELEMENT_BYTES[dtype]


def step_bytes(engine: Engine, shape: Shape) -> float:
    """Bytes that a decode step has to read, on average over the request."""
    return engine.weight_bytes + kv_bytes_per_token(engine.config, engine.dtype) * (shape.prompt + shape.output / 2)


def device_name(device: str) -> str:
    if device == "cpu":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
        return "CPU"
    try:
        query = ["nvidia-smi", f"--id={device.partition(':')[2] or 0}", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        return ", driver ".join(p.strip() for p in subprocess.run(query, capture_output=True, text=True, check=True).stdout.split(","))
    except (OSError, subprocess.CalledProcessError):
        return device


def git_commit() -> str:
    """Short id of this tool's commit, with + where the tree differs from it; empty outside a repository."""
    try:
        run = subprocess.run(["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def load(a: argparse.Namespace, weights: Path, needed_tokens: int) -> Engine:
    config = json.loads((weights / "config.json").read_text())
    cuda = a.device != "cpu" and any(d.startswith("cuda") for d in codefuse_triton.devices()[0])
    dtype = a.dtype if a.dtype != "auto" else "float16" if cuda else "float32"
    longest = a.max_len or config["max_positions"]
    kv_mb = (max(needed_tokens, longest + 32) * kv_bytes_per_token(config, dtype) // a.tensor_parallel >> 20) + 1  # of each rank
    engine = Engine(weights, device=a.device, dtype=a.dtype, slots=min(64, max(a.streams, default=1)), max_len=a.max_len, kv_memory_mb=kv_mb,
                    prefill_tokens=a.prefill_tokens, threads=a.threads, tensor_parallel=a.tensor_parallel)
    pages = engine.stats()["pages"]
    if pages * 32 < needed_tokens:
        print(f"note: the KV cache holds {pages * 32} tokens, {needed_tokens} would avoid preemption", file=sys.stderr)
    return engine


def measure(a: argparse.Namespace, engine: Engine, other: Any) -> dict[str, Any]:
    """Runs everything; `other` is a bench_transformers.Peer or None."""
    rng = np.random.default_rng(a.seed)

    def prompt(length: int) -> np.ndarray:
        return rng.integers(0, engine.config["vocab"], length, dtype=np.int32)

    limit = read_bandwidth(engine.device, a.threads) * (1 if engine.device == "cpu" else a.tensor_parallel)
    result: dict[str, Any] = {"read_bandwidth_gb_s": limit / 1e9, "shapes": [], "streams": [], "skipped": []}
    for shape in a.shapes:
        if shape.prompt + shape.output > engine.max_len:
            result["skipped"].append(f"{shape}: longer than max_len {engine.max_len}")
            continue
        print(f"  {shape} ...", file=sys.stderr, flush=True)
        ours, theirs = [], []
        for i in range(a.repeats + 1):  # the first run warms up
            ids = prompt(shape.prompt)
            ours.append(run_one(engine, ids, shape.output))
            if other is not None:
                theirs.append(Timing(*other.run(ids, shape.output)))
        row: dict[str, Any] = {"shape": str(shape), **summary(ours[1:])}
        row["gb_s"] = row["decode_tokens_s"].median * step_bytes(engine, shape) / 1e9
        row["percent_of_bandwidth"] = 100e9 * row["gb_s"] / limit
        if other is not None:
            row["transformers"] = summary(theirs[1:])
            row["times_transformers"] = {"total": row["transformers"]["total_ms"].median / row["total_ms"].median,
                                         "decode": row["decode_tokens_s"].median / row["transformers"]["decode_tokens_s"].median}
        result["shapes"].append(row)
    for streams in a.streams:
        shape = a.stream_shape
        if shape.prompt + shape.output > engine.max_len:
            result["skipped"].append(f"{streams} streams of {shape}: longer than max_len {engine.max_len}")
            continue
        print(f"  {streams} streams of {shape} ...", file=sys.stderr, flush=True)
        rates = [run_many(engine, [prompt(shape.prompt) for _ in range(streams)], shape.output) for _ in range(a.repeats + 1)]
        result["streams"].append({"streams": streams, "shape": str(shape), "tokens_s": Spread(rates[1:])})
    return result


def table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    line = lambda cells: "| " + " | ".join(c.rjust(w) for c, w in zip(cells, widths)) + " |"  # noqa: E731
    return "\n".join([line(header), "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|", *map(line, rows)])


def as_text(r: dict[str, Any]) -> str:
    beside = any("transformers" in row for row in r["shapes"])
    header = ["in/out", "total ms", "TTFT ms", "decode tokens/s", "GB/s", "% of read bandwidth"]
    header += ["transformers ms", "its decode tokens/s", "total x", "decode x"] if beside else []
    rows = []
    for s in r["shapes"]:
        cells = [s["shape"], s["total_ms"].text(), s["ttft_ms"].text(), s["decode_tokens_s"].text(), f"{s['gb_s']:,.1f}", f"{s['percent_of_bandwidth']:.0f}"]
        if beside:
            x = s["times_transformers"]
            cells += [s["transformers"]["total_ms"].text(), s["transformers"]["decode_tokens_s"].text(), f"{x['total']:.2f}", f"{x['decode']:.2f}"]
        rows.append(cells)
    devices = f"{r['tensor_parallel']} ranks from {r['device']}" if r["tensor_parallel"] > 1 else r["device"]
    out = [f"{r['weights']} on {devices} ({r['device_name']}), {r['dtype']}, {r['weight_bytes'] / 1e6:,.1f} MB of weights a step",
           f"read bandwidth {r['read_bandwidth_gb_s']:,.1f} GB/s; median (least..greatest) of {r['repeats']} runs; {r['date']}, commit {r['commit'] or 'unknown'}"]
    if beside:
        out.append(r["peer"])
    if rows:
        out += ["", table(header, rows)]
    if any(s["percent_of_bandwidth"] > 100 for s in r["shapes"]):
        out.append("(over 100 %: the weights of a step stay in the processor's cache)")
    if r["streams"]:
        out += ["", table(["streams", "in/out each", "output tokens/s"], [[str(s["streams"]), s["shape"], s["tokens_s"].text(0)] for s in r["streams"]])]
    out += [""] * bool(r["skipped"]) + [f"skipped {s}" for s in r["skipped"]]
    return "\n".join(out)


def plot(r: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(10, 4), layout="constrained")
    left, right = fig.subplots(1, 2)
    names = [s["shape"] for s in r["shapes"]]
    left.bar(names, [s["gb_s"] for s in r["shapes"]], color="#4477aa")
    left.axhline(r["read_bandwidth_gb_s"], color="#bb5566", label="read bandwidth")
    for i, s in enumerate(r["shapes"]):
        left.text(i, s["gb_s"], f"{s['decode_tokens_s'].median:,.0f} tok/s", ha="center", va="bottom")
    left.set(xlabel="prompt/output tokens", ylabel="GB/s while decoding", title="one stream")
    left.legend(loc="lower right")
    right.plot([s["streams"] for s in r["streams"]], [s["tokens_s"].median for s in r["streams"]], marker="o", color="#4477aa")
    right.set(xlabel="streams", ylabel="output tokens/s", ylim=(0, None), title="many streams")
    fig.suptitle(f"{r['weights']}, {r['dtype']}, {r['device_name']}")
    fig.savefig(path, dpi=120)


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("weights", nargs="?", type=Path, help="weights directory (written by tools/convert.py)")
    p.add_argument("--random", metavar="PRESET", help="random weights of this shape (presets of tools/convert.py), made at load")
    p.add_argument("--format", default="auto", help="of the random weights: f32, f16, bf16, q8_row, q4_g128 or q4_g64")
    p.add_argument("--device", type=device, default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--tensor-parallel", type=integer(1, 64), default=1, help="GPUs that share the weights, --device the first; on the CPU groups of threads")
    p.add_argument("--dtype", default="auto", choices=DTYPES, help="of activations and KV cache: auto, float32, float16 or bfloat16")
    p.add_argument("--threads", type=integer(0, 1024), default=0, help="CPU threads, 0: all cores")
    p.add_argument("--shapes", type=several(Shape.parse), default=SHAPES, help="in/out tokens, comma separated")
    p.add_argument("--streams", type=several(integer(1, 64)), default="1,8,32,64", help="numbers of streams, comma separated")
    p.add_argument("--stream-shape", type=Shape.parse, default="256/128")
    p.add_argument("--prefill-tokens", type=integer(1), default=512, help="prompt tokens of one step")
    p.add_argument("--max-len", type=integer(0), default=0, help="0: the model's")
    p.add_argument("--repeats", type=integer(1), default=5)
    p.add_argument("--seed", type=integer(0), default=0, help="of the prompts")
    p.add_argument("--json", type=output, metavar="FILE", help="write the figures as JSON too")
    p.add_argument("--plot", type=output, metavar="FILE.png", help="draw them (needs matplotlib)")
    p.add_argument("--beside", choices=["transformers"], help="run a peer in turn with the engine and print the ratio")
    p.add_argument("--hf", type=Path, metavar="DIR", help="the peer's checkpoint; with --random the peer gets random weights too")
    a = p.parse_args(argv)
    if (a.weights is None) == (a.random is None):
        p.error("give either a weights directory or --random PRESET")
    if a.beside and not (a.hf or a.random):
        p.error("--beside transformers needs --hf DIR, the Hugging Face checkpoint that the weights were converted from")
    return a


def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    if a.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            print("bench_engine: --plot needs matplotlib (pip install matplotlib); everything else works without it", file=sys.stderr)
            return 1
    needed = max([s.prompt + s.output + 32 for s in a.shapes] + [max(a.streams, default=0) * (a.stream_shape.prompt + a.stream_shape.output + 32)])
    with tempfile.TemporaryDirectory() as temp:
        weights = a.weights
        if a.random:
            from convert import PRESETS, write_random
            if a.random not in PRESETS:
                print(f"bench_engine: preset is {a.random!r}; known are {', '.join(PRESETS)}", file=sys.stderr)
                return 1
            weights = Path(temp) / a.random
        try:
            if a.random:
                write_random(a.random, weights, a.format, 0, on_disk=False)
            start = time.perf_counter()
            with load(a, weights, needed) as engine:
                load_s, peer = time.perf_counter() - start, None
                if a.beside:
                    from bench_transformers import Peer
                    peer = Peer(a.hf or a.random, engine.device, engine.dtype, a.threads)
                r = {"weights": a.random or weights.resolve().name, "device": engine.device, "device_name": device_name(engine.device), "dtype": engine.dtype, "tensor_parallel": a.tensor_parallel,
                     "weight_bytes": engine.weight_bytes, "load_s": load_s, "threads": a.threads, "repeats": a.repeats, "commit": git_commit(),
                     "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), "peer": peer.description if peer else ""}
                r.update(measure(a, engine, peer))
        except (ValueError, RuntimeError, ImportError, OSError) as e:
            print(f"bench_engine: {e}", file=sys.stderr)
            return 1
    print(as_text(r))
    if a.json:
        a.json.write_text(json.dumps(r, indent=1, default=Spread.data) + "\n")
    if a.plot:
        plot(r, a.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
