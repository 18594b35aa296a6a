#!/usr/bin/env python3
"""How long a model takes from process start to its first token, and how its upload compares with one large copy from pinned memory.

    python tools/bench_load.py model_repository/generator/1
    python tools/bench_load.py --random gptneox-13b --format f16 --write /dev/shm/w13          # writes the weights first, and removes them
    python tools/bench_load.py --random gptneox-13b --format q8_row --write /dev/shm/w13q8 --json load.json

Every load is a process of its own; the files are in the page cache (they are read once before the first). Upload: bytes of the files given
to the device over the time from when the device was ready until all of them were in its memory, re-tiled; checksums: until the last file was
checked, from the process's first look at the files. Memory: the most anonymous memory the process held, pinned buffers (8 MB for each of at
most 14 threads) included, the driver's own and mapped files not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from arguments import DTYPES, integer, output

PROMPT_TOKENS = 16


class _Memory(threading.Thread):
    """Samples this process's memory until stop()."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak: dict[str, int] = {}
        self._done = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._done.wait(0.005):
            self._sample()

    def _sample(self) -> None:
        for line in Path("/proc/self/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in ("RssAnon", "RssFile", "RssShmem", "VmHWM"):
                self.peak[key] = max(self.peak.get(key, 0), int(value.split()[0]) * 1024)

    def stop(self) -> dict[str, int]:
        self._done.set()
        self.join()
        self._sample()
        return self.peak


def child(a: argparse.Namespace) -> None:
    """One load; prints times of CLOCK_MONOTONIC and what the engine says, as JSON."""
    memory = _Memory()
    from codefuse_triton import Engine, _native
    imported = time.monotonic()
    with Engine(a.weights, device=a.device, dtype=a.dtype, slots=a.slots, max_len=a.max_len, threads=a.threads) as engine:
        ready = time.monotonic()
        engine.generate([5] * PROMPT_TOKENS, max_tokens=1, ignore_eos=True)
        first = time.monotonic()
        peak = memory.stop()
        result = {"imported": imported, "ready": ready, "first": first, "peak": peak, "stats": engine.load_stats, "device": engine.device, "dtype": engine.dtype}
    if result["device"] != "cpu":
        result["copy_gb_s"] = _native.copy_bandwidth(result["device"]) / 1e9
    print(json.dumps(result))


def run_once(a: argparse.Namespace, weights: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, str(weights), "--child", "--device", a.device, "--dtype", a.dtype, "--slots", str(a.slots), "--max-len", str(a.max_len),
               "--threads", str(a.threads)]
    start = time.monotonic()
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode != 0:
        lines = process.stderr.strip().splitlines()
        raise RuntimeError(f"the load failed: {lines[-1] if lines else f'exit code {process.returncode}'}")
    r = json.loads(process.stdout)
    s = r["stats"]
    out = {"device": r["device"], "dtype": r["dtype"], "python_s": r["imported"] - start, "device_s": s["device_s"], "weights_s": s["weights_s"],
           "verified_s": s["verified_s"], "load_s": s["total_s"], "ready_s": r["ready"] - start, "first_token_s": r["first"] - start,
           "weight_bytes": s["weight_bytes"], "upload_gb_s": s["weight_bytes"] / s["weights_s"] / 1e9,
           "anonymous_bytes": r["peak"].get("RssAnon", 0), "peak_rss_bytes": r["peak"].get("VmHWM", 0)}
    if "copy_gb_s" in r:
        out["copy_gb_s"] = r["copy_gb_s"]
        out["percent_of_copy"] = 100 * out["upload_gb_s"] / r["copy_gb_s"]
    return out


def into_page_cache(weights: Path) -> None:
    import numpy as np
    from codefuse_triton import _native

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda f: _native.xxh3_64(np.memmap(f, np.uint8, "r")), [f for f in weights.glob("*.safetensors") if f.stat().st_size]))


def as_text(r: dict[str, Any]) -> str:
    gpu = "copy_gb_s" in r["loads"][0]
    header = ["first token s", "ready s", "Python s", "device s", "weights s", "checksums s", "upload GB/s", "anonymous MB"]
    header += ["one pinned copy GB/s", "% of it"] if gpu else []
    rows = []
    for x in r["loads"]:
        row = [f"{x[k]:.2f}" for k in ("first_token_s", "ready_s", "python_s", "device_s", "weights_s", "verified_s")]
        row += [f"{x['upload_gb_s']:.1f}", f"{x['anonymous_bytes'] / 1e6:,.0f}"]
        rows.append(row + ([f"{x['copy_gb_s']:.1f}", f"{x['percent_of_copy']:.0f}"] if gpu else []))
    from bench_engine import table

    first = r["loads"][0]
    out = [f"{r['weights']} on {first['device']} ({r['device_name']}), {first['dtype']}, {first['weight_bytes'] / 1e9:,.2f} GB of weights, page cache warm; {r['date']}, commit {r['commit'] or 'unknown'}"]
    if r["write_s"]:
        out.append(f"written in {r['write_s']:.1f} s")
    return "\n".join([*out, "", table(header, rows)])


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("weights", nargs="?", type=Path, help="weights directory (written by tools/convert.py)")
    p.add_argument("--random", metavar="PRESET", help="random weights of this shape (presets of tools/convert.py), written to --write")
    p.add_argument("--format", default="f16", help="of the random weights: f32, f16, bf16 or a quantized format")
    p.add_argument("--write", type=Path, metavar="DIR", help="where to; a directory that does not exist yet")
    p.add_argument("--keep", action="store_true", help="leave the random weights there")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--dtype", default="auto", choices=DTYPES, help="of activations and KV cache")
    p.add_argument("--slots", type=integer(1, 64), default=16)
    p.add_argument("--max-len", type=integer(0), default=0, help="0: the model's")
    p.add_argument("--threads", type=integer(0, 1024), default=0, help="CPU threads, 0: all cores")
    p.add_argument("--repeats", type=integer(1), default=3)
    p.add_argument("--json", type=output, metavar="FILE", help="write the figures as JSON too")
    p.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    if (a.weights is None) == (a.random is None) or (a.random is None) != (a.write is None):
        p.error("give either a weights directory, or --random PRESET and --write DIR")
    if a.write and a.write.exists():
        p.error(f"--write {a.write} exists; name a directory to be made")
    return a


def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    if a.child:
        child(a)
        return 0
    from datetime import datetime, timezone

    from codefuse_triton._native import check_device

    from bench_engine import device_name, git_commit
    weights, write_s = a.weights, 0.0
    try:
        check_device(a.device)  # here: in the child it would take part of the load
        if a.random:
            from convert import PRESETS, write_random
            if a.random not in PRESETS:
                raise ValueError(f"preset is {a.random!r}; known are {', '.join(PRESETS)}")
            weights, start = a.write, time.perf_counter()
            write_random(a.random, weights, a.format, 0, on_disk=True)
            write_s = time.perf_counter() - start
        into_page_cache(weights)
        loads = []
        for i in range(a.repeats):
            print(f"  load {i + 1} of {a.repeats} ...", file=sys.stderr, flush=True)
            loads.append(run_once(a, weights))
    except (ValueError, RuntimeError, OSError) as e:
        print(f"bench_load: {e}", file=sys.stderr)
        return 1
    finally:
        if a.random and not a.keep:
            shutil.rmtree(a.write, ignore_errors=True)
    r = {"weights": f"{a.random} {a.format}" if a.random else weights.resolve().name, "device_name": device_name(loads[0]["device"]), "loads": loads, "write_s": write_s,
         "cores": os.cpu_count(), "commit": git_commit(), "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")}
    print(as_text(r))
    if a.json:
        a.json.write_text(json.dumps(r, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
