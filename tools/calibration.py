"""Text for calibration and evaluation, as token ids: files given, or Python sources that come with this Python and this project."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from codefuse_triton import LoadError
from codefuse_triton.vocab import Vocab

from checkpoint import CheckpointError

sys.path.append(str(Path(__file__).with_name("demo")))
import corpus  # noqa: E402
import heldout  # noqa: E402


HELD_OUT, STANDARD_LIBRARY = "the demo corpus's held-out sample", "Python's standard library"


def read_texts(path: Path) -> list[str]:
    """Documents of a text file (one), a .jsonl file (key "text" of each line; a line without it is skipped) or a directory (every text file)."""
    try:
        if path.is_dir():
            texts = [t for f in sorted(path.rglob("*")) if f.is_file() for t in read_texts(f)]
        elif path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            texts = [line["text"] for line in lines if isinstance(line, dict) and isinstance(line.get("text"), str)]
        else:
            texts = [path.read_text(encoding="utf-8")]
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except ValueError as e:
        raise CheckpointError(f"{path}: not {'JSON lines' if path.suffix == '.jsonl' else 'UTF-8 text'} ({e})") from None
    if not any(t.strip() for t in texts):
        raise CheckpointError(f"{path}: holds no text")
    return texts


def standard_library() -> list[str]:
    """Python's own sources but those that the held-out sample is chosen from."""
    documents = [corpus.read(item) for item in corpus.stdlib_files() if not corpus.is_held_out(item[0])]
    return [text for _, text, _ in documents if text is not None]


def held_out() -> list[str]:
    """The committed sample that the demo model has never seen (tools/demo/heldout.jsonl)."""
    return [d.text for d in heldout.load()]


def open_vocab(directory: Path) -> Vocab:
    try:
        return Vocab.load(directory)
    except LoadError as e:
        raise CheckpointError(str(e)) from None


def windows(vocab: Vocab, texts: list[str], length: int, count: int, seed: int = 0) -> np.ndarray:
    """`count` windows of `length` tokens [count, length], drawn from the texts without overlap; fewer if there is not enough text. Each document
    starts with the end token, as the models were trained."""
    mark = vocab.eos_ids[:1]
    rng = np.random.default_rng(seed)
    taken: list[list[int]] = []
    rest: list[int] = []
    for i in rng.permutation(len(texts)):
        rest += mark + vocab.encode(texts[i])
        taken += [rest[at:at + length] for at in range(0, len(rest) - length + 1, length)]
        rest = rest[len(rest) // length * length:]
        if len(taken) >= 4 * count:  # windows of several documents, not the first one's alone
            break
    if not taken:
        raise CheckpointError(f"the text has {len(rest)} tokens; expected at least {length}, one window")
    chosen = sorted(rng.permutation(len(taken))[:count])
    return np.array([taken[i] for i in chosen], np.int64)
