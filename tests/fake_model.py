"""What native/bind_testing_fake.cpp's fake runner must produce, computed from the tokens alone."""
from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from codefuse_triton import Engine, Vocab, _native

EOS = 0
_MASK = 2**64 - 1


def expected(prompt, max_tokens, seed, vocab=64, eos=(EOS,), min_tokens=0):
    """(output tokens, finish reason): prompt tokens count as prefill rows unless they are few, generated ones as decode rows. No end token
    comes before min_tokens."""
    state = 14695981039346656037
    for token in prompt:
        state = (state ^ (token * 2 + (len(prompt) > _native.testing.SHORT_PROMPT))) * 1099511628211 & _MASK
    out = []
    while True:
        h = state ^ (seed * 0x9E3779B97F4A7C15 & _MASK)
        h = (h ^ (h >> 31)) * 0xBF58476D1CE4E5B9 & _MASK
        allowed = [t for t in range(vocab) if len(out) >= min_tokens or t not in eos]
        token = allowed[(h >> 33) % len(allowed)]
        if token in eos:
            return out, "eos"
        out.append(token)
        if len(out) == max_tokens:
            return out, "length"
        state = (state ^ (token * 2)) * 1099511628211 & _MASK


def letters(vocab=64):
    """Token bytes of one or two letters; eos has none."""
    return [b""] + [bytes([97 + i % 26]) * (1 + i % 2) for i in range(1, vocab)]


def fake_engine(**options) -> Engine:
    options.setdefault("token_bytes", letters(options.get("vocab", 64)))
    return Engine._of(_native.testing.fake_engine(**options), Vocab.none("the fake model"))


@contextlib.contextmanager
def held(engine: Engine, requests: int = 0) -> Iterator[None]:
    """What is submitted in its body runs together: no step begins before its end, and before `requests` have been submitted in it. engine is of
    fake_engine() or testing.held_engine()."""
    before = engine.stats()["submitted"]
    _native.testing.allow(engine._native, 0)
    try:
        yield
        while engine.stats()["submitted"] - before < requests:
            time.sleep(0.001)
    finally:
        _native.testing.allow(engine._native, -1)


def wait_taken(engine: Engine) -> None:
    """Until the engine's thread has taken what was submitted, which its first step may hold up."""
    while engine.stats()["waiting"]:
        time.sleep(0.001)
