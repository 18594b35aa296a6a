"""Sampling on CUDA against the CPU's: every kind of choice, edits, masks, the most likely tokens, recorded steps."""

import numpy as np
import pytest
import test_cuda
from codefuse_triton._native import testing
from helpers import Pages, changes, make_batch, make_neox, pages_of, random_changes, runner
from test_cuda import MAX_LEN, ROWS, SLOTS, config

pytestmark = test_cuda.pytestmark


SAMPLING = [dict(), dict(temperature=0.7, seed=1), dict(temperature=1.0, top_k=1, seed=2), dict(temperature=1.3, top_k=20, seed=3),
            dict(temperature=1.0, top_p=0.9, seed=4), dict(temperature=0.8, top_k=50, top_p=0.5, seed=5), dict(temperature=2.0, min_p=0.05, seed=6),
            dict(temperature=1.0, top_k=40, top_p=0.95, min_p=0.01, seed=2**63 + 7), dict(temperature=5.0, top_p=1e-9, seed=8)]


@pytest.mark.parametrize("vocab", [1, 5, 111, 1000, 100864, 152064])
def test_sampling(vocab):
    rng = np.random.default_rng(vocab)
    ops = testing.Ops("cpu", threads=2), testing.Ops("cuda", "float16")
    for o in ops:
        o.plan(config(vocab=vocab), SLOTS, ROWS, MAX_LEN, 512)
    rows = 60
    params = [dict(SAMPLING[i % len(SAMPLING)]) for i in range(rows)]
    logits = (rng.standard_normal((rows, vocab)) * rng.uniform(0.1, 5, (rows, 1))).astype(np.float32)
    logits[0::7] = np.round(logits[0::7])  # ties
    if vocab > 4:
        logits[1::7, ::3] = -np.inf
        logits[2, 1] = np.nan
        logits[3] = 0.25
    batch = make_batch(Pages(SLOTS, MAX_LEN, 512), decode=[(i, 0, i) for i in range(rows)], logits="all", sample=params)
    (want, want_logprob), (got, got_logprob) = (o.sample(batch, logits) for o in ops)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(got_logprob, want_logprob, rtol=1e-5, atol=2e-5)
    one = make_batch(Pages(SLOTS, MAX_LEN, 512), decode=[(13, 0, 13)], logits="all", sample=[params[13]])
    token, logprob = ops[1].sample(one, logits[13:14])
    assert token[0] == got[13] and logprob[0] == got_logprob[13]


@pytest.mark.parametrize("vocab", [1, 5, 33, 1000, 100864])
def test_sampling_with_edits_and_masks(vocab):
    ops = testing.Ops("cpu", threads=2), testing.Ops("cuda", "float16")
    for o in ops:
        o.plan(config(vocab=vocab), SLOTS, ROWS, MAX_LEN, 512)
    rows = 60
    params = [dict(SAMPLING[i % len(SAMPLING)]) for i in range(rows)]
    edits, allowed = random_changes(vocab, rows, vocab)
    edits[17] = [(t, -0.25 * (t % 5), 1.0 + t % 3) for t in range(min(vocab, 2000))]
    logits = (np.random.default_rng(vocab).standard_normal((rows, vocab)) * 3).astype(np.float32)
    for half in (1, 2):  # all samples with their changes, or the first half only
        fields = changes(vocab, [e if i < rows // half else [] for i, e in enumerate(edits)], [a if i < rows // half else None for i, a in enumerate(allowed)])
        batch = make_batch(Pages(SLOTS, MAX_LEN, 512), decode=[(i, 0, i) for i in range(rows)], logits="all", sample=params) | fields
        (want, want_logprob), (got, got_logprob) = (o.sample(batch, logits) for o in ops)
        np.testing.assert_array_equal(got, want)
        np.testing.assert_allclose(got_logprob, want_logprob, rtol=1e-5, atol=2e-5)
    one = make_batch(Pages(SLOTS, MAX_LEN, 512), decode=[(17, 0, 17)], logits="all", sample=[params[17]]) | changes(vocab, [edits[17]], [allowed[17]])
    token, logprob = ops[1].sample(one, logits[17:18])
    assert token[0] == got[17] and logprob[0] == got_logprob[17]
    plain = make_batch(Pages(SLOTS, MAX_LEN, 512), decode=[(i, 0, i) for i in range(rows)], logits="all", sample=params)
    assert ops[1].sample(plain, logits)[0][rows // 2:].tolist() == got[rows // 2:].tolist()


@pytest.mark.parametrize("vocab", [1, 7, 33, 1000, 100864, 200000])
def test_top_tokens(vocab):
    ops = testing.Ops("cpu", threads=2), testing.Ops("cuda", "float16")
    for o in ops:
        o.plan(config(vocab=vocab), SLOTS, ROWS, MAX_LEN, 512)
    rows = 60
    logits = (np.random.default_rng(vocab).standard_normal((rows, vocab)) * 3).astype(np.float32)
    logits[0::5] = np.round(logits[0::5])  # ties
    logits[3, ::2] = -np.inf
    counts = [(s * 7) % (testing.TOP_TOKENS + 1) for s in range(rows)]
    params = [dict(SAMPLING[s % len(SAMPLING)], top_tokens=n, top_edited=s % 2 == 1) for s, n in enumerate(counts)]
    edits, allowed = random_changes(vocab, rows, 1)
    batch = make_batch(Pages(SLOTS, MAX_LEN, 512), decode=[(i, 0, i) for i in range(rows)], logits="all", sample=params) | changes(vocab, edits, allowed)
    np.testing.assert_array_equal(*(o.sample(batch, logits)[0] for o in ops))
    (want, want_logprobs), (got, got_logprobs) = (o.top_tokens for o in ops)
    for s, n in enumerate(counts):
        np.testing.assert_array_equal(got[s, :n], want[s, :n])
        np.testing.assert_allclose(got_logprobs[s, :n], want_logprobs[s, :n], rtol=1e-5, atol=2e-5)


def test_recorded_steps_with_edits(tmp_path):
    """Steps of one number of rows with and without changes alternate: each kind is recorded and replayed, and sees its own changes."""
    _, native = make_neox(tmp_path)
    cpu, gpu = runner(native, device="cpu"), runner(native, device="cuda", dtype="float32")
    out = []
    for r in (cpu, gpu):
        pages, tokens = pages_of(r), []
        for slot in range(3):
            r.step(make_batch(pages, prefill=[(slot, [5 + slot, 9], 0)], sample=[{}]))
        rng = np.random.default_rng(5)
        for i in range(24):
            batch = make_batch(pages, decode=[(slot, testing.LAST_TOKEN, 2 + i) for slot in range(3)], sample=[dict(), dict(temperature=1.0, seed=i), dict(top_tokens=i % 2 * 5)])
            if i % 3:
                banned, allowed = int(rng.integers(131)), np.sort(rng.choice(131, 20, replace=False)).tolist()
                batch |= changes(131, [[(banned, -np.inf, 1.0)], [], [(3, 2.0, 1.5)]], [None, allowed, allowed if i % 2 else None])
            tokens.append(r.step(batch, i % 2)[0].tolist())
        out.append(tokens)
    assert out[0] == out[1]
