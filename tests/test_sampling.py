"""The sampling rule (native/cpu/sample.cc): which tokens are kept, with what probability one is drawn, and its log-prob."""

import json

import numpy as np
import pytest

from codefuse_triton._native import testing

torch = pytest.importorskip("torch")
from helpers import Pages, changes, make_batch, random_changes  # noqa: E402
from test_ops import config, normal, planned, same_bits  # noqa: E402

SAMPLES = testing.DECODE_ROWS


@pytest.fixture(scope="module")
def ops():
    ops = testing.Ops("cpu", threads=2)
    ops.plan(config(vocab=100831), 8, 64, 20000, 8 * 625)
    return ops


def draw(ops, logits: np.ndarray, params: list[dict], position: int = 0):
    """One token per row of logits [n, V], n <= 64, each to be placed at position + 1 + its row."""
    n = len(logits)
    batch = make_batch(Pages(8, 20000, 5000), prefill=[(0, [0] * n, position)], logits="all", sample=params)
    return ops.sample(batch, logits)


def draws(ops, logits: np.ndarray, count: int, **params) -> np.ndarray:
    """`count` tokens from one row of logits, each with a seed of its own."""
    out = []
    for first in range(0, count, SAMPLES):
        n = min(SAMPLES, count - first)
        out.append(draw(ops, np.tile(logits, (n, 1)), [dict(seed=first + i, **params) for i in range(n)])[0])
    return np.concatenate(out)


def kept_reference(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    """Probabilities of the tokens that are kept, in float64; ties with the last kept token are kept."""
    z = logits.astype(np.float64) / temperature
    p = np.exp(z - z.max())
    keep = np.ones(len(z), bool)
    if top_k:
        keep &= z >= np.sort(z)[::-1][min(top_k, len(z)) - 1]
    if top_p < 1:
        order = np.argsort(-np.where(keep, z, -np.inf), kind="stable")
        mass = np.cumsum(np.where(keep, p, 0)[order]) / p[keep].sum()
        last = order[np.searchsorted(mass, top_p - 1e-12)]
        keep &= z >= z[last]
    keep &= p >= min_p * p.max()
    return np.where(keep, p, 0) / p[keep].sum()


PARAMS = [dict(temperature=t, **rest) for t in (0.7, 1.0, 3.0) for rest in (
    {}, dict(top_k=1), dict(top_k=5), dict(top_k=100), dict(top_p=0.5), dict(top_p=0.05), dict(top_p=0.93), dict(min_p=0.3),
    dict(min_p=1.0), dict(top_k=9, top_p=0.8), dict(top_k=9, top_p=0.8, min_p=0.25), dict(top_p=0.9, min_p=0.2))]


@pytest.mark.parametrize("params", PARAMS, ids=lambda p: json.dumps(p)[1:-1].replace('"', "").replace(" ", ""))
def test_kept_set_and_distribution(ops, params):
    logits = normal(23, seed=5)
    logits[7] = logits[3] = np.sort(logits)[-5]  # ties where a limit may fall
    want = kept_reference(logits, **params)
    count = 6000
    got = np.bincount(draws(ops, logits, count, **params), minlength=len(logits))
    assert got[want == 0].sum() == 0
    sure = want * count > 20
    assert (got[sure] > 0).all()
    chi2 = ((got[sure] - want[sure] * count) ** 2 / (want[sure] * count)).sum()
    free = max(sure.sum() - 1, 1)
    assert chi2 < free + 4.5 * np.sqrt(2 * free)


def test_kept_set_equals_transformers(ops):
    from transformers.generation.logits_process import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    for seed in range(20):
        rng = np.random.default_rng(seed)
        t, k, p, m = rng.uniform(0.3, 2), int(rng.integers(1, 30)), rng.uniform(0.1, 0.99), rng.uniform(0.01, 0.4)
        logits = normal(40, seed=seed, scale=1.5)
        scores = torch.from_numpy(logits)[None]
        for warp in (TemperatureLogitsWarper(t), TopKLogitsWarper(k), TopPLogitsWarper(p), MinPLogitsWarper(m)):
            scores = warp(None, scores)
        np.testing.assert_array_equal(kept_reference(logits, t, k, p, m) > 0, np.isfinite(scores[0].numpy()))


def test_draws_of_one_request_are_independent(ops):
    """One seed, successive positions: the distribution over positions, and of neighbouring pairs, is the product."""
    logits, count = normal(6, seed=2), 18000
    p = kept_reference(logits)
    tokens = np.concatenate([draw(ops, np.tile(logits, (SAMPLES, 1)), [dict(temperature=1.0, seed=99)] * SAMPLES, start)[0]
                             for start in range(0, count, SAMPLES)])
    pairs = np.bincount(tokens[:-1] * 6 + tokens[1:], minlength=36)
    want = np.outer(p, p).ravel() * (len(tokens) - 1)
    chi2 = ((pairs - want) ** 2 / want).sum()
    assert chi2 < 35 + 4.5 * np.sqrt(70)


def test_the_rule_word_for_word(ops):
    """Philox and Gumbel recomputed here in integers and float64."""

    def philox(counter, key):
        c, k = list(counter), [key & 0xFFFFFFFF, key >> 32]
        for _ in range(10):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return c

    assert philox([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], 0x299F31D0A4093822) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    logits, seed, temperature = normal(50, seed=8), 0x123456789ABCDEF0, 0.7
    got, _ = draw(ops, np.tile(logits, (60, 1)), [dict(temperature=temperature, seed=seed)] * 60, 40)
    for i in range(60):
        words = np.array([philox([t // 4, 41 + i, 0, 0], seed)[t % 4] for t in range(50)], np.float64)
        noise = -np.log(-np.log1p(-(words + 0.5) / 2**32))
        assert got[i] == np.argmax(logits / temperature + noise)


def test_greedy_and_ties(ops):
    logits = np.array([[0, 3, 3, 1], [-0.0, 0.0, -1, -2], [np.nan, -np.inf, -5, -5], [np.nan] * 4, [5, 1, np.inf, 7]], np.float32)
    tokens, logprobs = draw(ops, logits, [{}] * 5)
    assert tokens.tolist() == [1, 0, 2, 0, 2]
    assert np.isnan(logprobs[2:4]).all()  # logits that are not numbers show in the log-prob
    tokens, _ = draw(ops, logits[:2], [dict(temperature=1e-30)] * 2)
    assert tokens[0] in (1, 2) and tokens[1] in (0, 1)


@pytest.mark.parametrize("vocab", [1, 2, 111, 4099, 100831])
def test_logprob_is_of_the_raw_logits(ops, vocab):
    logits = normal(4, vocab, seed=vocab, scale=3)
    logits[1] += 1000
    tokens, logprobs = draw(ops, logits, [{}, dict(temperature=2.0, seed=1), dict(temperature=0.5, top_k=7, seed=2), dict(temperature=1.0, top_p=0.3, seed=3)])
    want = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()[np.arange(4), tokens]
    np.testing.assert_allclose(logprobs, want, atol=2e-5 if vocab > 1 else 0, rtol=1e-6)
    assert tokens[0] == logits[0].argmax()


def test_a_draw_does_not_depend_on_the_batch(ops):
    logits = normal(40, 500, seed=1)
    params = [dict(temperature=0.5 + i / 20, top_k=i, top_p=1 - i / 80, min_p=i / 400, seed=i * 77) for i in range(40)]
    tokens, logprobs = draw(ops, logits, params)
    for i in (0, 1, 17, 39):
        token, logprob = draw(ops, logits[i:i + 1], params[i:i + 1], i)
        assert token[0] == tokens[i]
        same_bits(logprob, logprobs[i:i + 1])


def test_last_token_stays_on_the_device():
    ops = planned()
    pages = Pages(8, 200, 64)
    table, logits = normal(97, 5, seed=1), normal(2, 97, seed=2)
    first = make_batch(pages, prefill=[(3, [5], 0), (6, [6], 0)])
    tokens, _ = ops.sample(first, logits)
    second = make_batch(pages, decode=[(6, testing.LAST_TOKEN, 1), (3, testing.LAST_TOKEN, 1)])
    same_bits(ops.embed(second, table), table[tokens[::-1]])


# ---- edits and masks --------------------------------------------------------------------------------------------------


def of_vocab(vocab: int):
    ops = testing.Ops("cpu", threads=2)
    ops.plan(config(vocab=vocab), 8, 64, 20000, 8 * 625)
    return ops


def changed(logits: np.ndarray, edits, allowed) -> np.ndarray:
    """One row after the rule's arithmetic in float32."""
    out = logits.copy()
    for token, add, penalty in edits:
        if penalty != 1:
            out[token] = out[token] / np.float32(penalty) if out[token] > 0 else out[token] * np.float32(penalty)
        out[token] += np.float32(add)
    if allowed is not None:
        out[np.setdiff1d(np.arange(len(out)), list(allowed))] = np.nan
    return out


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 500])
def test_edits_and_masks_equal_changed_logits(vocab):
    """A row with edits and a mask gives the token of the row changed here; the log-prob is that of the row as it was."""
    ops = of_vocab(vocab)
    edits, allowed = random_changes(vocab, 60, vocab)
    logits = normal(60, vocab, seed=vocab, scale=3)
    params = [dict(), dict(temperature=0.8, seed=4), dict(temperature=1.2, top_k=5, seed=5), dict(temperature=1.0, top_p=0.7, min_p=0.01, seed=6)] * 15
    batch = make_batch(Pages(8, 20000, 5000), prefill=[(0, [0] * 60, 0)], logits="all", sample=params)
    tokens, logprobs = ops.sample({**batch, **changes(vocab, edits, allowed)}, logits)
    want, _ = ops.sample(batch, np.stack([changed(*row) for row in zip(logits, edits, allowed)]))
    np.testing.assert_array_equal(tokens, want)
    raw = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()[np.arange(60), tokens]
    np.testing.assert_allclose(logprobs, raw, atol=2e-5, rtol=1e-6)
    for s, tokens_allowed in enumerate(allowed):
        assert tokens_allowed is None or tokens[s] in tokens_allowed
    if vocab == 500:
        plain, _ = ops.sample(batch, logits)
        assert (tokens != plain).sum() > 10 and (tokens[4::12] == plain[4::12]).all()  # rows without changes are as ever


def test_a_mask_is_stronger_than_a_ban():
    ops, logits = of_vocab(40), normal(1, 40, seed=1)
    for params in (dict(), dict(temperature=1.0, seed=1), dict(temperature=1.0, top_k=3, top_p=0.5, seed=1)):
        batch = make_batch(Pages(8, 20000, 5000), prefill=[(0, [0], 0)], logits="all", sample=[params])
        tokens, _ = ops.sample({**batch, **changes(40, [[(7, -np.inf, 1.0), (9, -np.inf, 1.0)]], [[7, 9]])}, logits)
        assert tokens[0] == 7


@pytest.mark.parametrize("fields, said", [
    (dict(edit_begin=[0, 1], edits=[(1, 0.0, 1.0)]), "edit_begin has 2 elements; expected 3"),
    (dict(edit_begin=[0, 1, 1], edits=[(1, 0.0, 1.0)] * 2), "edit_begin is 0 to 1; expected 0 to 2"),
    (dict(edit_begin=[0, 2, 2], edits=[(1, 0.0, 1.0)] * 2), r"edits\[1\] is 1; expected 2 to 100830"),
    (dict(edit_begin=[0, 1, 0], edits=[]), r"edit_begin\[1\] is 1; expected 0 to 0"),
    (dict(edit_begin=[0, 1, 1], edits=[(100831, 0.0, 1.0)]), r"edits\[0\] is 100831; expected 0 to 100830"),
    (dict(edit_begin=[0, 1, 1], edits=[(1, np.nan, 1.0)]), r"edits\[0\] adds nan"),
    (dict(edit_begin=[0, 1, 1], edits=[(1, 0.0, 0.0)]), r"edits\[0\] adds 0 with penalty 0"),
    (dict(edit_begin=[0, 1, 1], edits=[(1, 0.0, np.inf)]), "penalty inf"),
    (dict(edit_begin=[0, 25000, 25000], edits=[(i, 0.0, 1.0) for i in range(25000)]), r"edit_begin\[1\] is 25000; expected 0 to 24096"),
    (dict(mask_of=[0], masks=[1] * 3151), "mask_of has 1 elements; expected 2"),
    (dict(mask_of=[0, -1], masks=[1] * 3150), "masks has 3150 elements; expected 0"),
    (dict(mask_of=[1, -1], masks=[1] * 3151), r"mask_of\[0\] is 1; expected -1 to 0"),
    (dict(mask_of=[0, -1], masks=[0] * 3150 + [2**31]), "mask 0 allows no token"),
], ids=str)
def test_bad_changes_are_refused(ops, fields, said):
    batch = make_batch(Pages(8, 20000, 5000), prefill=[(0, [0, 0], 0)], logits="all", sample=[{}, {}])
    with pytest.raises(ValueError, match=said):
        ops.sample({**batch, **fields}, np.zeros((2, 100831), np.float32))


# ---- the most likely tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 7, 20, 500, 5000])
def test_top_tokens(vocab):
    ops, k = of_vocab(vocab), testing.TOP_TOKENS
    logits = normal(60, vocab, seed=vocab, scale=3)
    logits[1] = np.round(logits[1])  # ties: the lower id first
    logits[2, ::2] = -np.inf
    if vocab > 20:
        logits[3, 5] = np.nan
    counts = [(s * 7) % (k + 1) for s in range(60)]
    params = [dict(top_tokens=n, temperature=0.5 * (s % 2), seed=s) for s, n in enumerate(counts)]
    edits, allowed = random_changes(vocab, 60, 1)  # which do not matter
    batch = make_batch(Pages(8, 20000, 5000), prefill=[(0, [0] * 60, 0)], logits="all", sample=params) | changes(vocab, edits, allowed)
    tokens, logprobs = ops.sample(batch, logits)
    top, top_logprobs = ops.top_tokens
    for s, n in enumerate(counts):
        order = np.argsort(-np.nan_to_num(logits[s].astype(np.float64), nan=-np.inf, neginf=-1e300), kind="stable")[:n]
        assert top[s, :len(order)].tolist() == order.tolist() and (top[s, len(order):n] == -1).all()
        want = torch.log_softmax(torch.from_numpy(logits[s]).double(), -1).numpy()[order]
        np.testing.assert_allclose(top_logprobs[s, :len(order)], want, atol=2e-5, rtol=1e-6)
        if tokens[s] in order:
            assert top_logprobs[s, order.tolist().index(tokens[s])] == logprobs[s] or np.isnan(logprobs[s])
    ops.sample(batch | dict(sample=[{}] * 60), logits)
    assert ops.top_tokens[0].shape == (0, k)
    with pytest.raises(ValueError, match=r"top_tokens\[0\] is 129; expected 0 to 128"):
        ops.sample(batch | dict(sample=[dict(top_tokens=129)] * 60), logits)


def test_top_tokens_of_the_edited_row():
    ops, vocab, k = of_vocab(200), 200, 60
    logits = normal(30, vocab, seed=3, scale=2)
    edits, allowed = random_changes(vocab, 30, 7)
    batch = make_batch(Pages(8, 20000, 5000), prefill=[(0, [0] * 30, 0)], logits="all", sample=[dict(top_tokens=k, top_edited=True)] * 30)
    ops.sample(batch | changes(vocab, edits, allowed), logits)
    top, logprobs = ops.top_tokens
    for s in range(30):
        row = changed(logits[s], edits[s], allowed[s]).astype(np.float64)
        order = np.argsort(-np.where(np.isnan(row), -np.inf, np.where(row == -np.inf, -1e300, row)), kind="stable")[:k]
        assert top[s, :k].tolist() == order.tolist()
        want = row[order] - torch.logsumexp(torch.from_numpy(logits[s]).double(), 0).item()
        np.testing.assert_allclose(logprobs[s, :k], want, atol=2e-5, rtol=1e-6)
