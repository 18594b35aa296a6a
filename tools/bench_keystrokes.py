#!/usr/bin/env python3
"""What typing costs: many typists, a completion asked for at every key, with and without sessions and the prefix cache.

    python tools/bench_keystrokes.py model_repository/generator/1 --typists 50 --seconds 15

Each typist types a held-out file on from a place of its own; every key submits the text so far. The times between keys are log-normal, a
shape that fits free text well (Gonzalez et al., "On the shape of timings distributions in free-text keystroke dynamics profiles", Heliyon 7,
2021). A typist's mean is drawn from a log-normal of mean 239 ms and standard deviation 112 ms, those over the 168,000 typists of Dhakal
et al., "Observations on Typing from 136 Million Keystrokes", CHI 2018; around it the key times have --spread, the standard deviation of
their logarithm (an assumption: 0.6). The key times depend on --seed only, so every variant sees the same ones.

survivor: a request whose typist then paused for --pause ms or stopped, and so saw the answer. Its TTFT is from the key to the
first token, its prompt already tokenized, as a server's tokenizer does in a process of its own; those that were refused or had none by the end are counted. wasted: share of the computed tokens, of prompts and generated, that were not a
survivor's. hit rate: share of prompt tokens that were not computed again.
"""
from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codefuse_triton import Engine, Outbox, QueueFull
from codefuse_triton.prompt import Prompt, make_prompt
from codefuse_triton.vocab import Vocab

from arguments import DTYPES, device, integer, number, output

HELD_OUT = Path(__file__).parent / "demo" / "heldout.jsonl"
MEAN_MS, DEVIATION_MS = 239.0, 112.0  # over typists, of their mean time between keys
VARIANTS = {"neither": (False, "off"), "cache": (False, "on"), "sessions": (True, "off"), "both": (True, "on")}  # session, prefix_cache


@dataclass(frozen=True)
class Key:
    at_s: float
    typist: int
    prompt: str
    survives: bool  # the typist looks at the answer


def log_normal(rng: random.Random, mean: float, sigma: float) -> float:
    return rng.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma)


def make_keys(texts: list[str], typists: int, seconds: float, spread: float, pause_ms: float, context: int, seed: int) -> list[Key]:
    """Every key of every typist, in order of time."""
    rng, keys = random.Random(seed), []
    between = math.sqrt(math.log(1 + (DEVIATION_MS / MEAN_MS) ** 2))
    for typist in range(typists):
        text = texts[typist % len(texts)]
        mean_s = log_normal(rng, MEAN_MS, between) / 1e3
        end = rng.randrange(min(context, len(text) // 2), max(len(text) // 2 + 1, len(text) - 1000))
        start, at = max(0, end - context), rng.random() * mean_s
        times = [at]
        while (at := at + log_normal(rng, mean_s, spread)) < seconds and end + len(times) < len(text):
            times.append(at)
        for i, (now, then) in enumerate(zip(times, times[1:] + [math.inf])):
            keys.append(Key(now, typist, text[start:end + i + 1], then - now >= pause_ms / 1e3))
    return sorted(keys, key=lambda k: k.at_s)


def replay(engine: Engine, keys: list[Key], prompts: list[Prompt], sessions: bool, max_tokens: int) -> dict[str, Any]:
    box, asked, first, useful, refused, lost = Outbox(), {}, {}, 0, 0, 0
    started = time.monotonic()
    before = engine.stats()
    waiting = iter(zip(keys, prompts))
    key, prompt = next(waiting, (None, None))
    while key is not None or asked:
        now = time.monotonic() - started
        if key is not None and key.at_s <= now:
            try:
                uid = engine.submit(prompt, outbox=box, max_tokens=max_tokens, session=f"typist {key.typist}" if sessions else "")
                asked[uid] = key
            except QueueFull:
                refused += 1
                lost += key.survives
            key, prompt = next(waiting, (None, None))
        for chunk in box.poll(0.25 if key is None else max(0.0, min(0.25, key.at_s - now))):
            mine = asked[chunk.uid]
            if chunk.num_output_tokens and chunk.uid not in first:
                first[chunk.uid] = time.monotonic() - started - mine.at_s
            if chunk.finish_reason:
                del asked[chunk.uid]
                if mine.survives and chunk.uid in first:
                    useful += chunk.num_input_tokens - chunk.num_cached_tokens + chunk.num_output_tokens
                elif mine.survives:  # ended before its first token; what was computed of its prompt is wasted
                    lost += 1
                else:
                    first.pop(chunk.uid, None)
    after = engine.stats()
    computed, cached = (sum(after[n] - before[n] for n in names) for names in (("prefill_tokens", "decode_tokens"), ("cached_tokens",)))
    prefilled = after["prefill_tokens"] - before["prefill_tokens"]
    ttft = sorted(first.values())
    return {"keys": len(keys), "survivors": sum(k.survives for k in keys), "refused": refused, "unanswered": lost, "computed_tokens": computed,
            "wasted": 1 - useful / computed if computed else 0.0, "hit_rate": cached / (cached + prefilled) if cached + prefilled else 0.0,
            "ttft_p50_ms": 1e3 * ttft[len(ttft) // 2] if ttft else math.nan, "ttft_p99_ms": 1e3 * ttft[min(len(ttft) - 1, len(ttft) * 99 // 100)] if ttft else math.nan,
            "seconds": time.monotonic() - started}


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| variant | computed tokens | wasted | hit rate | refused | survivors without a token | survivor TTFT p50 ms | p99 ms |", "|---|---|---|---|---|---|---|---|"]
    for name, r in results.items():
        lines.append(f"| {name} | {r['computed_tokens']:,} | {100 * r['wasted']:.0f} % | {100 * r['hit_rate']:.1f} % | {r['refused']} | {r['unanswered']} of {r['survivors']} "
                     f"| {r['ttft_p50_ms']:.1f} | {r['ttft_p99_ms']:.1f} |")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("weights", type=Path, help="weights directory with its tokenizer")
    p.add_argument("--typists", type=integer(1), default=50)
    p.add_argument("--seconds", type=number(0, above=True), default=15, help="of typing")
    p.add_argument("--max-tokens", type=integer(1), default=32, help="of a completion")
    p.add_argument("--context", type=integer(1), default=1500, help="characters in front of the first key")
    p.add_argument("--spread", type=number(0), default=0.6)
    p.add_argument("--pause", type=number(0), default=500)
    p.add_argument("--variants", default=",".join(VARIANTS), help="of: %(default)s")
    p.add_argument("--device", type=device, default="auto")
    p.add_argument("--dtype", default="auto", choices=DTYPES)
    p.add_argument("--slots", type=integer(1, 64), default=16)
    p.add_argument("--prefill-tokens", type=integer(1), default=512)
    p.add_argument("--kv-memory-mb", type=integer(0, 2**24), default=0)
    p.add_argument("--threads", type=integer(0, 1024), default=0)
    p.add_argument("--seed", type=integer(0), default=0)
    p.add_argument("--json", type=output)
    a = p.parse_args(argv)
    unknown = [v for v in a.variants.split(",") if v not in VARIANTS]
    if unknown:
        p.error(f"--variants has {unknown[0]!r}; expected some of {', '.join(VARIANTS)}")
    return a


def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    texts = [t for t in (json.loads(line).get("text", "") for line in HELD_OUT.read_text().splitlines()) if len(t) > 2000]
    keys = make_keys(texts, a.typists, a.seconds, a.spread, a.pause, a.context, a.seed)
    results: dict[str, dict[str, Any]] = {}
    try:
        vocab = Vocab.load(a.weights)
        started = time.perf_counter()
        prompts = [make_prompt(vocab, key.prompt) for key in keys]
        tokenizing_ms = 1e3 * (time.perf_counter() - started) / max(1, len(keys))
        for name in a.variants.split(","):
            sessions, cache = VARIANTS[name]
            with Engine(a.weights, device=a.device, dtype=a.dtype, slots=a.slots, prefill_tokens=a.prefill_tokens, kv_memory_mb=a.kv_memory_mb,
                        threads=a.threads, prefix_cache=cache) as engine:
                print(f"{name} on {engine.device}: {len(keys)} keys of {a.typists} typists ...", file=sys.stderr, flush=True)
                engine.generate(texts[0][:200], max_tokens=4)  # warms up
                results[name] = replay(engine, keys, prompts, sessions, a.max_tokens)
    except (ValueError, RuntimeError, OSError) as e:
        print(f"bench_keystrokes: {e}", file=sys.stderr)
        return 1
    print(f"{table(results)}\n\ntokenizing a prompt, beforehand: {tokenizing_ms:.2f} ms")
    if a.json:
        a.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
