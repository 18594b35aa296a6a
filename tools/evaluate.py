#!/usr/bin/env python3
"""What quantization changed: a weights directory against its original, on the same text.

    python tools/evaluate.py ORIGINAL QUANTIZED                   # on the held-out sample of the demo corpus
    python tools/evaluate.py ORIGINAL QUANTIZED --text FILE_OR_DIRECTORY --tokens 50000 --device cuda

ORIGINAL is a weights directory, or a checkpoint that tools/convert.py reads, in 16 or 32 bits. Both models run in our own engine's ops, each in its own
weights' format. Reported, with 95 % intervals (bootstrap over windows of text):

    perplexity         of both, and the ratio
    KL divergence      of the quantized model's next-token distribution from the original's: mean and largest
    greedy agreement   how often the likeliest next token is the same
    lines completed    from the middle of each line of the text, greedily, to its end: how many come out exactly, by both
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from codefuse_triton import DeviceError, LoadError, Vocab
from codefuse_triton._native import testing

import calibration
from arguments import device, integer
from checkpoint import CheckpointError, is_weights_directory, read_json
from convert import convert, progress_bar

WINDOW = 512  # tokens; each window is read on its own
TOKENS = 40_000
RESAMPLES, CONFIDENCE = 2000, 0.95
_SHORTEST_LINE = 4  # tokens, its end among them


class Logits:
    """A weights directory's logits of windows of tokens, at every position."""

    def __init__(self, weights: Path, window: int, device: str = "auto"):
        self._runner = testing.Runner(str(weights), device=device, slots=1, prefill_rows=testing.DECODE_ROWS, max_len=window)
        self.vocab = self._runner.vocab

    def window(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        """[at most DECODE_ROWS, vocab] float32 at a time, in order."""
        table = list(range(-(-self._runner.max_len // testing.PAGE_TOKENS)))
        for begin in range(0, len(ids), testing.DECODE_ROWS):
            part = ids[begin:begin + testing.DECODE_ROWS].tolist()
            n = len(part)
            yield self._runner.logits(dict(decode_rows=0, token=part, slot=[0] * n, position=list(range(begin, begin + n)), chunks=[(0, n, 0, begin)],
                                           logit_row=list(range(n)), sample=[], table_slot=[0], table=table))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def lines_of(ids: np.ndarray, vocab: Vocab) -> list[tuple[int, int]]:
    """(s, e): tokens s .. e are the second half of a whole line, e the token with its end. The first line of a window may be a part."""
    table, found, begin = vocab.token_bytes, [], None
    for i, token in enumerate(ids.tolist()):
        if b"\n" not in (table[token] if token < len(table) else b""):
            continue
        if begin is not None and i + 1 - begin >= _SHORTEST_LINE:
            found.append((begin + (i + 1 - begin) // 2, i))
        begin = i + 1
    return found


def _completed(choice: np.ndarray, ids: np.ndarray, line: tuple[int, int], vocab: Vocab) -> bool:
    """Whether greedy decoding from before the line's second half writes it, up to the newline. choice[i]: the likeliest token after ids[: i + 1]."""
    s, e = line
    if (choice[s - 1:e - 1] != ids[s:e]).any():
        return False
    end, want = (vocab.token_bytes[int(t)] if int(t) < len(vocab.token_bytes) else b"" for t in (choice[e - 1], ids[e]))
    return b"\n" in end and end.split(b"\n")[0] == want.split(b"\n")[0]


def _measure(a: Logits, b: Logits, ids: np.ndarray, vocab: Vocab) -> list[float]:
    """Of one window: tokens predicted, nats of both, sum of KL, largest KL, agreements, lines, lines completed by both."""
    nats, kl, choices, at = np.zeros(2), [], ([], []), 0
    for logits in zip(a.window(ids[:-1]), b.window(ids[:-1])):
        if not all(np.isfinite(x).all() for x in logits):
            raise CheckpointError("a model's logits hold NaN or Inf")
        p, q = (_log_softmax(x) for x in logits)
        rows = np.arange(len(p))
        after = ids[at + 1:at + 1 + len(p)]
        nats -= [p[rows, after].sum(), q[rows, after].sum()]
        kl.append((np.exp(p) * (p - q)).sum(1).clip(min=0))
        for kept, x in zip(choices, logits):
            kept.append(x.argmax(1))
        at += len(p)
    divergence, (x, y) = np.concatenate(kl), (np.concatenate(c) for c in choices)
    lines = lines_of(ids, vocab)
    done = [sum(_completed(c, ids, line, vocab) for line in lines) for c in (x, y)]
    return [len(x), *nats, divergence.sum(), divergence.max(), (x == y).sum(), len(lines), *done]


def _summary(rows: np.ndarray) -> dict[str, list[float]]:
    """Figures of windows [W, 9] (_measure), each [value, low, high]."""
    count = len(rows)
    times = np.random.default_rng(0).multinomial(count, [1 / count] * count, RESAMPLES)
    times = np.concatenate([np.ones((1, count), np.int64), times])  # the windows themselves, then the resamples
    tokens, nats, other_nats, kl, _, same, lines, done, other_done = (times @ rows).T
    largest = np.where(times > 0, rows[:, 4], 0).max(1)
    lines = np.maximum(lines, 1)
    values = {
        "perplexity_original": np.exp(nats / tokens), "perplexity": np.exp(other_nats / tokens), "perplexity_ratio": np.exp((other_nats - nats) / tokens),
        "kl_mean": kl / tokens, "kl_max": largest, "greedy_agreement": same / tokens,
        "lines_completed_original": done / lines, "lines_completed": other_done / lines,
    }
    tail = 100 * (1 - CONFIDENCE) / 2
    return {k: [float(f"{x:.6g}") for x in (v[0], *np.percentile(v[1:], [tail, 100 - tail]))] for k, v in values.items()}


def evaluate(original: Path, quantized: Path, vocab: Vocab, texts: list[str], name: str, tokens: int = TOKENS, device: str = "auto",
             progress: Any = None) -> dict[str, Any]:
    """Compares two weights directories; the result as it is written into config.json ("quality")."""
    length = min(WINDOW, read_json(original / "config.json")["max_positions"])
    ids = calibration.windows(vocab, texts, length, max(1, tokens // length))
    a, b = Logits(original, length, device), Logits(quantized, length, device)
    if a.vocab != b.vocab:
        raise CheckpointError(f"{quantized}: vocab is {b.vocab}; the original's is {a.vocab}")
    if ids.max() >= a.vocab:
        raise CheckpointError(f"the tokenizer gives token {ids.max()}; the model's vocab is {a.vocab}")
    rows = []
    with progress_bar(ids.size, "tokens") if progress is None else progress as tick:
        for window in ids:
            rows.append(_measure(a, b, window, vocab))
            tick(len(window))
    figures = np.array(rows)
    return {"text": name, "windows": len(rows), "tokens": int(figures[:, 0].sum()), "lines": int(figures[:, 6].sum()), "confidence": CONFIDENCE,
            **_summary(figures)}


def shown(quality: dict[str, Any]) -> str:
    """A few lines for people."""
    def at(key: str, factor: float = 1, digits: int = 4) -> str:
        value, low, high = (f"{factor * x:.{digits}f}" for x in quality[key])
        return f"{value} ({low} .. {high})"

    return "\n".join((
        f"on {quality['tokens']:,} tokens of {quality['text']}, {100 * quality['confidence']:g} % intervals:",
        f"  perplexity        {at('perplexity')}, original {at('perplexity_original')}",
        f"  ratio             {at('perplexity_ratio', digits=5)}",
        f"  KL, nats          mean {at('kl_mean', digits=6)}, largest {at('kl_max', digits=3)}",
        f"  greedy agreement  {at('greedy_agreement', 100, 2)} %",
        f"  lines completed   {at('lines_completed', 100, 1)} %, original {at('lines_completed_original', 100, 1)} % of {quality['lines']:,}",
    ))


@contextlib.contextmanager
def as_weights(source: Path, beside: Path, ignore: set[str] = frozenset()) -> Iterator[Path]:
    """A weights directory as it is; what tools/convert.py reads, converted to one that is removed afterwards, in a hidden directory in `beside`."""
    if is_weights_directory(source):
        yield source
        return
    for stale in beside.glob(".original-*"):
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(prefix=".original-", dir=beside) as scratch:
        convert(source, Path(scratch) / "weights", ignore=ignore, tokenizer=False)
        yield Path(scratch) / "weights"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("original", type=Path, help="weights directory or checkpoint")
    p.add_argument("quantized", type=Path, help="weights directory, with the tokenizer")
    p.add_argument("--text", type=Path, help="text file, .jsonl with a key \"text\", or directory; default: the held-out sample of the demo corpus")
    p.add_argument("--tokens", type=integer(WINDOW), default=TOKENS, help=f"of the text to read (default {TOKENS:,})")
    p.add_argument("--device", type=device, default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--json", action="store_true", help="print the figures as JSON")
    p.add_argument("--ignore-field", action="append", default=[], metavar="NAME", help="a config.json field of a checkpoint that does not matter")
    a = p.parse_args(argv)
    try:
        texts, name = (calibration.read_texts(a.text), a.text.name) if a.text else (calibration.held_out(), calibration.HELD_OUT)
        vocab = calibration.open_vocab(a.quantized)
        with as_weights(a.original, a.quantized, set(a.ignore_field)) as original:
            quality = evaluate(original, a.quantized, vocab, texts, name, a.tokens, a.device)
    except (ValueError, LoadError, DeviceError, OSError) as e:
        print(f"evaluate: {e}", file=sys.stderr)
        return 1
    print(json.dumps(quality, indent=1) if a.json else shown(quality))
    return 0


if __name__ == "__main__":
    sys.exit(main())
