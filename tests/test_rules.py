"""Biases, penalties, bad words, min_tokens: against transformers' processors on the same logits, and whatever else the batch holds."""
import random

import numpy as np
import pytest
from codefuse_triton import Engine, Outbox, Vocab, _native
from codefuse_triton._native import testing
from fake_model import EOS, fake_engine, held

torch = pytest.importorskip("torch")
from helpers import Pages, make_batch, make_neox, prompt_logits, runner  # noqa: E402
from test_engine_model import ON  # noqa: E402
from test_ops import config  # noqa: E402

VOCAB = 131
PAGE_BYTES = 2 * 2 * 32 * 96 * 4  # K and V, layers, tokens, kv_heads * head_dim, float32
PIECES = [b"ab", b"ba", b"a", b"b", b"c", b"abc", b" ", b"bad", b"d", b"add"]


def table() -> list[bytes]:
    """Token bytes where one text has many tokenizations; the first three ids have none."""
    return [b"", b"", b""] + [PIECES[i % len(PIECES)] + (b"" if i < 40 else bytes([97 + i % 26])) for i in range(VOCAB - 3)]


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return make_neox(tmp_path_factory.mktemp("rules"))[1]


def load(native, pages=40, device="cpu", **options) -> Engine:
    e = testing.held_engine(str(native), table(), device=device, dtype="float32", kv_bytes=pages * PAGE_BYTES, threads=2, **options)
    return Engine._of(e, Vocab.none(str(native)))


@pytest.fixture(scope="module")
def engine(native):
    with load(native) as e:
        yield e


@pytest.fixture(scope="module")
def ops():
    ops = testing.Ops("cpu", threads=2)
    ops.plan(config(vocab=VOCAB), 8, 64, 160, 40)
    return ops


def prompt_of(seed: int, n: int = 12) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB, n).tolist()


def decode(native, ops, prompt: list[int], count: int, process, **params) -> list[int]:
    """Tokens chosen from process(all tokens, logits) of every step."""
    r, tokens = runner(native), list(prompt)
    for _ in range(count):
        logits = process(tokens, prompt_logits(r, tokens)[-1].copy())
        position = len(tokens) - 1
        batch = make_batch(Pages(8, 160, 40), decode=[(0, 0, position)], logits="all", sample=[params])
        tokens.append(int(ops.sample(batch, logits[None])[0][0]))
    return tokens[len(prompt):]


def through(*processors):
    """transformers' processors as a function of tokens and one row of logits."""
    def process(tokens, logits):
        scores, ids = torch.from_numpy(logits)[None], torch.tensor([tokens])
        for p in processors:
            scores = p(ids, scores)
        return scores[0].numpy()
    return process


SAMPLE = [dict(), dict(temperature=0.9, seed=5), dict(temperature=1.0, top_k=20, top_p=0.9, seed=2**63 + 1)]


@pytest.mark.parametrize("params", SAMPLE, ids=["greedy", "sampled", "top"])
@pytest.mark.parametrize("penalty", [0.6, 1.3, 5.0])
def test_repetition_penalty_is_transformers(native, engine, ops, params, penalty):
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    prompt = prompt_of(1)
    want = decode(native, ops, prompt, 24, through(RepetitionPenaltyLogitsProcessor(penalty)), **params)
    got = engine.generate(prompt, max_tokens=24, repetition_penalty=penalty, ignore_eos=True, **params).token_ids.tolist()
    assert got == want and got != engine.generate(prompt, max_tokens=24, ignore_eos=True, **params).token_ids.tolist()


@pytest.mark.parametrize("params", SAMPLE, ids=["greedy", "sampled", "top"])
@pytest.mark.parametrize("presence, frequency", [(1.5, 0.0), (0.0, 0.75), (-0.5, 1.25)])
def test_presence_and_frequency_count_the_text_only(native, engine, ops, params, presence, frequency):
    prompt = prompt_of(2)

    def process(tokens, logits):  # mu[j] - c[j] * frequency - (c[j] > 0) * presence
        counts = np.bincount(tokens[len(prompt):], minlength=VOCAB).astype(np.float32)
        return logits - (np.float32(presence) + np.float32(frequency) * counts) * (counts > 0)

    want = decode(native, ops, prompt, 24, process, **params)
    got = engine.generate(prompt, max_tokens=24, presence_penalty=presence, frequency_penalty=frequency, ignore_eos=True, **params).token_ids.tolist()
    assert got == want and got != engine.generate(prompt, max_tokens=24, ignore_eos=True, **params).token_ids.tolist()


@pytest.mark.parametrize("params", SAMPLE, ids=["greedy", "sampled", "top"])
def test_typed_tokens_are_the_prompts(native, engine, ops, params):
    """The end of the prompt that the output has to spell again has its tokens penalized as the prompt's are: not for occurring in the text."""
    prompt, typed, pieces = prompt_of(8), b"abbaba", table()

    def process(tokens, logits):
        text, seen, counts = b"", set(prompt), np.zeros(VOCAB, np.float32)
        for t in tokens[len(prompt):]:
            text += pieces[t]
            seen.add(t)
            counts[t] += len(text) > len(typed)
        repeated = np.isin(np.arange(VOCAB), list(seen))
        logits = np.where(repeated, np.where(logits > 0, logits / np.float32(1.2), logits * np.float32(1.2)), logits)
        logits = logits - (np.float32(1.5) + np.float32(0.5) * counts) * (counts > 0)
        left = typed[len(text):]
        if left:
            logits[[t for t, p in enumerate(pieces) if not p or not (p.startswith(left) or left.startswith(p))]] = np.nan
        return logits

    want = decode(native, ops, prompt, 24, process, **params)
    got = engine.generate(prompt, max_tokens=18, prefix_bytes=typed, include_typed=True, repetition_penalty=1.2, presence_penalty=1.5, frequency_penalty=0.5,
                          ignore_eos=True, **params)
    assert len(got.token_ids) > 18 and got.token_ids.tolist() == want[:len(got.token_ids)] and got.text.encode().startswith(typed)


@pytest.mark.parametrize("params", SAMPLE, ids=["greedy", "sampled", "top"])
def test_bias_is_transformers_and_comes_after_the_repetition_penalty(native, engine, ops, params):
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

    prompt = prompt_of(3)
    bias = {int(t): float(b) for t, b in zip(range(5, 125, 3), np.random.default_rng(3).normal(0, 4, 40).astype(np.float32))}
    biased = SequenceBiasLogitsProcessor([[[t], b] for t, b in bias.items()])
    want = decode(native, ops, prompt, 20, through(biased), **params)
    assert engine.generate(prompt, max_tokens=20, logit_bias=bias, ignore_eos=True, **params).token_ids.tolist() == want
    want = decode(native, ops, prompt, 20, through(RepetitionPenaltyLogitsProcessor(1.4), biased), **params)
    assert engine.generate(prompt, max_tokens=20, logit_bias=bias, repetition_penalty=1.4, ignore_eos=True, **params).token_ids.tolist() == want
    for token in (7, want[0]):
        assert set(engine.generate(prompt, max_tokens=9, logit_bias={token: 1e30}, ignore_eos=True, **params).token_ids.tolist()) == {token}
        assert token not in engine.generate(prompt, max_tokens=60, logit_bias={token: float("-inf")}, ignore_eos=True, **params).token_ids


def test_logprobs_are_the_models_own(engine):
    prompt = prompt_of(4)
    plain = engine.generate(prompt, max_tokens=1, logprobs=True, ignore_eos=True)
    token = int(plain.token_ids[0])
    for changes in (dict(logit_bias={token: 50.0}), dict(logit_bias={t: -5.0 for t in range(VOCAB) if t != token}), dict(bad_words=[b"zzz"])):
        same = engine.generate(prompt, max_tokens=1, logprobs=True, ignore_eos=True, **changes)
        assert same.token_ids[0] == token and same.logprobs[0] == plain.logprobs[0]


def test_top_logprobs_are_the_models_own(native, engine):
    prompt = prompt_of(4)
    got = engine.generate(prompt, max_tokens=12, logprobs=True, top_logprobs=7, ignore_eos=True, temperature=1.5, seed=3, repetition_penalty=1.7)
    logits = prompt_logits(runner(native), prompt + got.token_ids.tolist())[len(prompt) - 1:-1]
    want = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    values, ids = want.topk(7)
    assert got.top_token_ids.tolist() == ids.tolist()
    np.testing.assert_allclose(got.top_logprobs, values, atol=1e-5)
    np.testing.assert_allclose(got.logprobs, want[np.arange(12), got.token_ids], atol=1e-5)


def test_min_tokens_is_transformers(native, engine, ops):
    from transformers.generation.logits_process import MinNewTokensLengthLogitsProcessor

    prompt = prompt_of(5)
    free = engine.generate(prompt, max_tokens=40, ignore_eos=True).token_ids.tolist()
    ends = free[3:5]  # ends there without min_tokens
    assert engine.generate(prompt, max_tokens=40, eos_ids=ends).finish_reason == "eos"
    want = decode(native, ops, prompt, 40, through(MinNewTokensLengthLogitsProcessor(len(prompt), 20, ends)))
    got = engine.generate(prompt, max_tokens=40, eos_ids=ends, min_tokens=20)
    cut = next((i for i, t in enumerate(want) if t in ends), 40)
    assert cut >= 20 and got.token_ids.tolist() == want[:cut] and not set(want[:20]) & set(ends)


# ---- bad words --------------------------------------------------------------------------------------------------------


def without(words, prompt):
    """A processor that says which tokens would complete a word, from the whole text."""
    pieces = table()

    def process(tokens, logits):
        text = b"".join(pieces[t] for t in tokens)
        for t, piece in enumerate(pieces):
            if any(any((text + piece).endswith(word, 0, len(text) + end) for end in range(1, len(piece) + 1)) for word in words):
                logits[t] = np.nan
        return logits
    return process


@pytest.mark.parametrize("params", SAMPLE, ids=["greedy", "sampled", "top"])
@pytest.mark.parametrize("words", [[b"a"], [b"ab"], [b"bab", b"adda", b" "], [b"abcabc", b"b"], [b"bab", b"ba", b"babb", b"adda", b"ad"]], ids=str)
def test_bad_words_however_they_are_cut(native, engine, ops, params, words):
    prompt = prompt_of(6)
    want = decode(native, ops, prompt, 24, without(words, prompt), **params)
    got = engine.generate(prompt, max_tokens=24, bad_words=words, ignore_eos=True, **params)
    assert got.token_ids.tolist() == want
    assert not any(word in got.text.encode() for word in words)


def test_bad_words_never_appear():
    """Random words over random tables, sampled tokens (the fake device takes any that is allowed), streamed and not."""
    rng = random.Random(1)
    for _ in range(12):
        pieces = [b""] + [bytes(rng.choice(b"abc") for _ in range(rng.randint(1, 4))) for _ in range(63)]
        words = [bytes(rng.choice(b"abc") for _ in range(rng.randint(2, 6))) for _ in range(rng.choice((1, 2, 3, 8)))]
        with fake_engine(token_bytes=pieces, depth=2, pages=64) as engine:
            for seed in range(6):
                prompt = [rng.randrange(1, 64) for _ in range(rng.randint(1, 5))]
                text = engine.generate(prompt, max_tokens=60, seed=seed, bad_words=words, ignore_eos=True).text.encode()
                before = b"".join(pieces[t] for t in prompt)
                for word in words:
                    assert word not in before[max(0, len(before) - len(word) + 1):] + text, (word, before, text)
                chunks = list(engine.stream(prompt, max_tokens=60, seed=seed, bad_words=words, ignore_eos=True))
                assert b"".join(c.text for c in chunks) == text


def test_where_only_bad_words_are_left_they_are_let_through():
    with fake_engine(token_bytes=[b"a"] * 64) as engine:
        assert engine.generate([1], max_tokens=5, bad_words=["a"], ignore_eos=True).text == "aaaaa"


def test_biases_add_up_to_numbers():
    with fake_engine() as engine:
        for penalty in (-3e38, 3e38):
            r = engine.generate([5], max_tokens=8, logit_bias={t: -penalty for t in range(1, 64)}, presence_penalty=penalty, frequency_penalty=penalty,
                                ignore_eos=True)
            assert len(r.token_ids) == 8 and engine.stats()["error"] == ""


def test_long_lists_of_bad_words_are_refused():
    with fake_engine() as engine:
        with pytest.raises(ValueError, match="bad_words has 1025 strings; expected at most 1024"):
            engine.generate([5], bad_words=["ab"] * 1025)
        with pytest.raises(ValueError, match=r"bad_words\[1\] has 1025 bytes; expected at most 1024"):
            engine.generate([5], bad_words=["ab", "a" * 1025])


def test_a_special_token_may_be_a_bad_word(native):
    e = _native.Engine(str(native), table(), device="cpu", dtype="float32", kv_bytes=40 * PAGE_BYTES, threads=2)
    vocab = Vocab(lambda text: [], table(), [1], ids_by_special={"<|end|>": 1})
    with Engine._of(e, vocab) as engine:
        prompt = prompt_of(7)
        assert set(engine.generate(prompt, max_tokens=5, logit_bias={1: 100.0}, ignore_eos=True).token_ids.tolist()) == {1}
        assert 1 not in engine.generate(prompt, max_tokens=5, logit_bias={1: 100.0}, bad_words=["<|end|>"], ignore_eos=True).token_ids


# ---- whatever the batch -------------------------------------------------------------------------------------------------


def options_of(rng: random.Random) -> dict:
    """Any mixture of options."""
    o: dict = dict(temperature=rng.choice([0.0, 0.7, 1.0]), seed=rng.getrandbits(64), top_k=rng.choice([0, 0, 30]), top_p=rng.choice([1.0, 0.9]))
    if rng.random() < 0.4:
        o["repetition_penalty"] = rng.uniform(0.8, 1.6)
    if rng.random() < 0.4:
        o["presence_penalty"], o["frequency_penalty"] = rng.uniform(-1, 1), rng.uniform(-1, 1)
    if rng.random() < 0.4:
        o["logit_bias"] = {rng.randrange(VOCAB): rng.uniform(-5, 5) for _ in range(rng.randint(1, 50))}
    if rng.random() < 0.4:
        o["bad_words"] = [rng.choice(PIECES), b"ca", b"abba"]
    if rng.random() < 0.5:
        o["min_tokens"] = rng.randint(1, 30)
    return o


@ON
@pytest.mark.parametrize("depth", [1, 2])
def test_same_tokens_alone_in_a_batch_and_preempted(native, device, depth):
    rng = random.Random(3)
    requests = [(prompt_of(i, rng.randint(1, 60)), options_of(rng)) for i in range(24)]
    with load(native, depth=depth, slots=8, device=device) as engine:
        alone = [engine.generate(p, max_tokens=50, eos_ids=[2, 40, 41], logprobs=True, **o) for p, o in requests]
    for pages in (40, 6):
        with load(native, pages=pages, depth=depth, slots=8, device=device) as engine:
            box = Outbox()
            with held(engine):
                uids = [engine.submit(p, outbox=box, max_tokens=50, eos_ids=[2, 40, 41], logprobs=True, stream=False, **o) for p, o in requests]
            chunks = {}
            while len(chunks) < len(uids):
                chunks.update({c.uid: c for c in box.poll(20)})
            for uid, want in zip(uids, alone):
                c = chunks[uid]
                assert c.token_ids.tolist() == want.token_ids.tolist() and c.logprobs.tolist() == want.logprobs.tolist()
                assert c.finish_reason == want.finish_reason
            assert (engine.stats()["preemptions"] > 0) == (pages == 6)


@pytest.mark.parametrize("options, said", [
    (dict(repetition_penalty=0.0), "repetition_penalty is 0; expected a finite number above 0"),
    (dict(repetition_penalty=float("nan")), "repetition_penalty is nan"),
    (dict(presence_penalty=float("inf")), "presence_penalty is inf; expected a finite number"),
    (dict(frequency_penalty=float("nan")), "frequency_penalty is nan"),
    (dict(logit_bias={64: 1.0}), "logit_bias has token 64; expected 0..63"),
    (dict(logit_bias={-1: 1.0}), "logit_bias has token -1"),
    (dict(logit_bias={2**40: 1.0}), f"logit_bias has token {2**40}"),
    (dict(logit_bias={1: float("nan")}), "logit_bias of token 1 is nan; expected a finite number, or -inf"),
    (dict(logit_bias={1: 1e39}), "logit_bias of 1 is 1e\\+39; expected a float32 number"),
    (dict(logit_bias={"word": 1.0}), "has no tokenizer"),
    (dict(bad_words=[""]), r"bad_words\[0\] is empty"),
    (dict(bad_words=["x" * 70000]), "bad_words has 70000 bytes; expected at most 65536"),
    (dict(bad_words=["\ud800"]), r"bad_words\[0\] has a lone surrogate"),
    (dict(eos_ids=[EOS] * 2000, min_tokens=1), "eos_ids and stop_token_ids have 2000 tokens; expected at most 1024"),
], ids=str)
def test_bad_options_are_refused(options, said):
    with fake_engine() as engine:
        with pytest.raises(ValueError, match=said):
            engine.generate([1, 2], max_tokens=4, **options)
        assert engine.generate([1, 2], max_tokens=4, ignore_eos=True).num_output_tokens == 4
