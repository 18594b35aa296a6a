"""Text -> rows of token ids: fill-in-the-middle, tokenizing on every core, packing.

Half of the documents of a pass are left to right: `text <eos>`, laid end to end and cut into rows.
The other half are cut into windows of at most WINDOW_CHARS characters, at line ends; each window is
split at two characters (so also inside a word) into prefix, middle, suffix and becomes, with P, S, M
for the FIM control tokens,
    PSM (3 of 4):  P prefix S suffix M middle <eos>
    SPM (1 of 4):  P S suffix M prefix middle <eos>
Half of the middles are short (up to 200 characters, or the rest of a line), half lie between two
uniform points. A FIM sample is never cut: a row takes as many as fit and is filled up with
left-to-right text. Each pass over the corpus draws anew which documents are FIM, and the splits.
"""

from __future__ import annotations

import random
from concurrent.futures import ProcessPoolExecutor

import numpy as np

import spm

FIM_SHARE = 0.5
SPM_SHARE = 0.25
WINDOW_CHARS = (400, 4200)

_tokenizer: spm.Tokenizer | None = None


def fim_windows(text: str, rng: random.Random) -> list[str]:
    """Consecutive pieces of the text, cut after a newline where there is one."""
    windows, start = [], 0
    while start < len(text):
        end = start + rng.randint(*WINDOW_CHARS)
        newline = text.rfind("\n", start, end)
        if end < len(text) and newline > start:
            end = newline + 1
        windows.append(text[start:end])
        start = end
    return windows


def fim_split(text: str, rng: random.Random) -> tuple[str, str, str]:
    """(prefix, middle, suffix) with prefix + middle + suffix == text."""
    if rng.random() < 0.5:
        begin, end = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
    else:
        begin = rng.randint(0, len(text))
        end = min(len(text), begin + rng.randint(1, 200))
        line_end = text.find("\n", begin, end)
        if line_end > begin and rng.random() < 0.5:
            end = line_end
    return text[:begin], text[begin:end], text[end:]


def fim_ids(tokenizer: spm.Tokenizer, text: str, rng: random.Random) -> list[int]:
    prefix, middle, suffix = fim_split(text, rng)
    if rng.random() < SPM_SHARE:
        return [spm.FIM_PREFIX_ID, spm.FIM_SUFFIX_ID, *tokenizer.encode(suffix), spm.FIM_MIDDLE_ID,
                *tokenizer.encode(prefix + middle), spm.EOS_ID]
    return [spm.FIM_PREFIX_ID, *tokenizer.encode(prefix), spm.FIM_SUFFIX_ID, *tokenizer.encode(suffix),
            spm.FIM_MIDDLE_ID, *tokenizer.encode(middle), spm.EOS_ID]


def _start_worker(model: bytes) -> None:
    global _tokenizer
    _tokenizer = spm.Tokenizer(model)


def _encode_batch(job: tuple[int, list[str]]) -> tuple[np.ndarray, list[np.ndarray], int]:
    """One batch of documents: left-to-right ids, FIM samples, and how many documents do not decode
    to themselves."""
    seed, texts = job
    rng = random.Random(seed)
    plain: list[int] = []
    samples, broken = [], 0
    for text in texts:
        if rng.random() < FIM_SHARE:
            samples += [np.array(fim_ids(_tokenizer, window, rng), np.int16)
                        for window in fim_windows(text, rng)]
        else:
            ids = _tokenizer.encode(text)
            broken += _tokenizer.decode(ids) != text
            plain += [*ids, spm.EOS_ID]
    return np.array(plain, np.int16), samples, broken


def pack(plain: np.ndarray, samples: list[np.ndarray], row: int) -> np.ndarray:
    """[rows, row] int16: first the rows of FIM samples, then the rest of the left-to-right stream."""
    at, rows = 0, []
    pending: list[np.ndarray] = []
    filled = 0

    def close() -> None:
        nonlocal at, filled
        rows.append(np.concatenate([*pending, plain[at:at + row - filled]]))
        at += row - filled
        pending.clear()
        filled = 0

    for sample in samples:
        if len(sample) > row:
            continue
        if filled + len(sample) > row:
            close()
        pending.append(sample)
        filled += len(sample)
    fim_rows = [r for r in rows if len(r) == row]
    rest = plain[at:]
    rest = rest[:len(rest) // row * row].reshape(-1, row)
    return np.concatenate([np.stack(fim_rows), rest]) if fim_rows else rest


def encode_passes(texts: list[str], model: bytes, passes: int, row: int, workers: int,
                  seed: int = 0) -> tuple[list[np.ndarray], int]:
    """One [rows, row] int16 array for each pass over the texts, rows shuffled, and the number of
    texts that did not survive encode -> decode (0 is expected)."""
    arrays, broken = [], 0
    rng = random.Random(seed)
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(model,)) as pool:
        for _ in range(passes):
            order = rng.sample(texts, len(texts))
            jobs = [(rng.getrandbits(62), order[i:i + 64]) for i in range(0, len(order), 64)]
            plain, samples = [], []
            for ids, batch, bad in pool.map(_encode_batch, jobs):
                plain.append(ids)
                samples += batch
                broken += bad
            rng.shuffle(samples)
            rows = pack(np.concatenate(plain), samples, row)
            arrays.append(rows[np.random.default_rng(rng.getrandbits(62)).permutation(len(rows))])
    return arrays, broken
