#!/usr/bin/env python3
"""What token healing is worth: held-out code cut at every character, continued with it, without it, and by an oracle.

    python tools/evaluate_healing.py WEIGHTS_DIR [--lines 150]
    python tools/evaluate_healing.py WEIGHTS_DIR --first-text [--context 3000]    what it costs: seconds until the first text

For each cut of a line, `rest` is what stood behind it up to and with the line's end.
- healing:   the prompt's text as Vocab.encode_open has it, the output constrained to the typed bytes
- plain:     the prompt's own tokens, token_healing=false
- oracle:    the tokens of the uncut text. It knows where the token that the cut is in begins, and that it is one token.

nats a byte: of the bytes of all rests, -log p along one token sequence each: the one of the uncut text for healing and oracle, the
rest's own encoding for plain. Under a constraint a token's probability is that among the tokens allowed (masked and
normalized, as the engine samples at temperature 1); for the oracle's cut token, among those that begin with its typed bytes.
exact: the greedy completion up to the line's end is the rest.
"""
from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterator

import numpy as np

from codefuse_triton import Engine, Outbox, Vocab
from codefuse_triton._native import testing
from codefuse_triton.prompt import Prompt

import calibration
from arguments import device, integer

KINDS = ("healing", "plain", "oracle")
HELD_OUT = Path(__file__).parent / "demo" / "heldout.jsonl"
MAX_NEW = 64  # tokens of a greedy completion


@dataclass(frozen=True)
class Cut:
    context: str  # in front of the line
    line: str  # with its line end
    at: int  # characters

    @property
    def prompt(self) -> str:
        return self.context + self.line[:self.at]

    @property
    def rest(self) -> str:
        return self.line[self.at:]


@dataclass
class Figures:
    cuts: int = 0
    bytes: int = 0
    healed: int = 0  # cuts at which tokens were given back
    given_back: int = 0  # those tokens
    moved: int = 0  # cuts at which the kept tokens are not those of the uncut text
    broken: int = 0  # outputs that do not begin with the typed bytes
    nats: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    exact: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    def nats_per_byte(self, kind: str) -> float:
        return self.nats[kind] / self.bytes

    def table(self) -> str:
        rows = ["| | nats a byte | rest of the line exact |", "|---|---|---|"]
        rows += [f"| {k} | {self.nats_per_byte(k):.4f} | {100 * self.exact[k] / self.cuts:.1f} % |" for k in KINDS]
        return "\n".join(rows)


def cuts(texts: list[str], lines: int, context_chars: int, seed: int) -> Iterator[list[Cut]]:
    """Of each of so many random lines every cut in front of a character, the first one too."""
    rng = random.Random(seed)
    places = []
    for text in texts:
        start = 0
        for line in text.splitlines(keepends=True):
            if line.strip() and start > 0 and line.endswith("\n"):
                places.append((text, start, line))
            start += len(line)
    for text, start, line in rng.sample(places, min(lines, len(places))):
        begin = text.find("\n", max(0, start - context_chars), start - 1) + 1  # at a line's beginning
        yield [Cut(text[begin:start], line, at) for at in range(len(line))]


class Scorer:
    """Log-probabilities of tokens after tokens, with the keys and values of what the last call has in common with this one."""

    def __init__(self, weights: Path, device: str) -> None:
        self.runner = testing.Runner(str(weights), device=device, slots=1, prefill_rows=512)
        self._pages = list(range(-(-self.runner.max_len // testing.PAGE_TOKENS)))
        self._known: list[int] = []

    def log_probs(self, ids: list[int], begin: int) -> np.ndarray:
        """[len(ids) - begin, vocab] of the tokens ids[begin:], each after all before it; begin >= 1."""
        same = next((i for i, (a, b) in enumerate(zip(ids, self._known)) if a != b), min(len(ids), len(self._known)))
        at, out = min(same, begin - 1), []
        while at < len(ids) - 1:
            count = min(testing.DECODE_ROWS, len(ids) - 1 - at)
            rows = [r for r in range(count) if at + r >= begin - 1]
            batch = dict(decode_rows=0, token=ids[at:at + count], slot=[0] * count, position=list(range(at, at + count)),
                         chunks=[(0, count, 0, at)], logit_row=rows, sample=[], table_slot=[0], table=self._pages)
            logits = self.runner.logits(batch).astype(np.float64)
            if rows:
                top = logits.max(1, keepdims=True)
                out.append(logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True)))
            at += count
        self._known = list(ids[:-1])
        return np.concatenate(out)


def spelled(scores: np.ndarray, tokens: list[int], typed: bytes, vocab: Vocab, size: int) -> float:
    """log p of tokens under the constraint that their bytes begin with typed."""
    constraint = testing.Spelling(vocab.token_bytes, sorted(vocab.never_text), size, typed)
    total = 0.0
    for row, token in zip(scores, tokens):
        total += row[token]
        if not constraint.done:
            total -= float(np.logaddexp.reduce(row[constraint.allowed()]))
            constraint.next(token)
    return total


def split(vocab: Vocab, ids: list[int], size: int) -> tuple[int, bytes]:
    """(How many of ids lie in the first size bytes, the bytes of the next one that do)."""
    at = 0
    for i, token in enumerate(ids):
        end = at + len(vocab.token_bytes[token])
        if end > size:
            return i, vocab.token_bytes[token][:size - at]
        at = end
    return len(ids), b""


def score(scorer: Scorer, vocab: Vocab, cut: Cut, figures: Figures, size: int) -> None:
    whole = vocab.encode(cut.context + cut.line)
    start = vocab.encode_open(cut.prompt)
    rest = cut.rest.encode()
    if whole[:len(start.ids)] == start.ids:
        tokens = whole[len(start.ids):]
    else:
        figures.moved += 1
        tokens = vocab.encode_inner(start.typed + rest)
    figures.nats["healing"] -= spelled(scorer.log_probs(start.ids + tokens, len(start.ids)), tokens, start.typed, vocab, size)

    kept, typed = split(vocab, whole, len(cut.prompt.encode()))
    scores = scorer.log_probs(whole, kept)
    figures.nats["oracle"] -= sum(row[token] for row, token in zip(scores, whole[kept:]))
    if typed:
        begins = [i for i, b in enumerate(vocab.token_bytes) if b.startswith(typed)]
        figures.nats["oracle"] += float(np.logaddexp.reduce(scores[0][begins]))

    prompt, tokens = vocab.encode(cut.prompt), vocab.encode_inner(rest)
    figures.nats["plain"] -= sum(row[token] for row, token in zip(scorer.log_probs(prompt + tokens, len(prompt)), tokens))
    figures.cuts += 1
    figures.bytes += len(rest)
    figures.healed += bool(start.typed)
    figures.given_back += len(start.typed_ids)


def complete(engine: Engine, many: list[Cut], figures: Figures) -> None:
    vocab, box, waiting = engine.vocab, Outbox(), {}
    for cut in many:
        whole = vocab.encode(cut.context + cut.line)
        kept, typed = split(vocab, whole, len(cut.prompt.encode()))
        options = dict(outbox=box, max_tokens=MAX_NEW, stop_at="line", stream=False)
        start = vocab.encode_open(cut.prompt)
        waiting[engine.submit(cut.prompt, include_typed=True, **options)] = ("healing", cut, start.typed)
        waiting[engine.submit(cut.prompt, token_healing=False, **options)] = ("plain", cut, b"")
        waiting[engine.submit(Prompt(whole[:kept], typed), **options)] = ("oracle", cut, b"")
        figures.broken += (vocab.decode(start.ids) + start.typed).removeprefix(b" ") != cut.prompt.encode().removeprefix(b" ")
    while waiting:
        for chunk in box.poll():
            kind, cut, typed = waiting.pop(chunk.uid)
            figures.broken += not chunk.text.startswith(typed)
            figures.exact[kind] += chunk.text[len(typed):] == cut.rest.rstrip("\r\n").encode()


def evaluate(weights: Path, texts: list[str], *, lines: int, context_chars: int = 512, seed: int = 0, device: str = "cpu") -> Figures:
    figures = Figures()
    scorer = Scorer(weights, device)
    sampled = list(cuts(texts, lines, context_chars, seed))
    with Engine(weights, device=device, slots=16, queue=3 * 4096) as engine:
        for line in sampled:
            for cut in line:
                score(scorer, engine.vocab, cut, figures, scorer.runner.vocab)
            complete(engine, line, figures)
    return figures


def first_text(weights: Path, texts: list[str], *, lines: int, context_chars: int, seed: int = 0, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds from a text prompt to the first piece of new text, one request at a time, healed and plain in turn."""
    times: dict[str, list[float]] = {"healing": [], "plain": []}
    rng = random.Random(seed)
    with Engine(weights, device=device, slots=1, prefix_cache="off") as engine:
        for line in cuts(texts, lines, context_chars, seed):
            cut = rng.choice(line)
            for kind in rng.sample(list(times), 2):
                started = time.perf_counter()
                with engine.stream(cut.prompt, max_tokens=8, token_healing=kind == "healing", ignore_eos=True) as stream:
                    next(stream)
                times[kind].append(time.perf_counter() - started)
    return times


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("weights", type=Path, help="a weights directory with its tokenizer")
    p.add_argument("--text", type=Path, default=HELD_OUT, help="text file, .jsonl with a key \"text\", or directory (default: the demo model's held-out files)")
    p.add_argument("--lines", type=integer(1), default=150)
    p.add_argument("--context", type=integer(1), default=512, help="characters in front of a line (default: %(default)s)")
    p.add_argument("--first-text", action="store_true")
    p.add_argument("--seed", type=integer(0), default=0)
    p.add_argument("--device", type=device, default="cpu")
    a = p.parse_args(argv)
    try:
        report(a, calibration.read_texts(a.text))
    except (ValueError, RuntimeError, OSError) as e:
        print(f"evaluate_healing: {e}", file=sys.stderr)
        return 1
    return 0


def report(a: argparse.Namespace, texts: list[str]) -> None:
    if a.first_text:
        times = first_text(a.weights, texts, lines=a.lines, context_chars=a.context, seed=a.seed, device=a.device)
        medians = {kind: statistics.median(t) * 1e3 for kind, t in times.items()}
        ratio = statistics.median(h / p for h, p in zip(times["healing"], times["plain"]))
        print(f"ms to the first text, medians of {a.lines}: healing {medians['healing']:.2f}, plain {medians['plain']:.2f}; of pairs {100 * (ratio - 1):+.1f} %")
        return
    f = evaluate(a.weights, texts, lines=a.lines, context_chars=a.context, seed=a.seed, device=a.device)
    print(f.table())
    print(f"\n{f.cuts} cuts, {f.bytes} bytes; outputs that do not continue the typed bytes: {f.broken}; tokens given back at {f.healed} cuts, "
          f"{f.given_back / max(f.healed, 1):.2f} each; kept tokens are not those of the uncut text at {f.moved} cuts")
    print(f"healing costs {f.nats_per_byte('healing') - f.nats_per_byte('oracle'):.4f} nats a byte against the oracle, "
          f"no healing {f.nats_per_byte('plain') - f.nats_per_byte('oracle'):.4f}")


if __name__ == "__main__":
    sys.exit(main())
