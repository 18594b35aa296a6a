"""Beam search: the decisions against transformers' on a tiny random model in float32, then through the engine."""
import numpy as np
import pytest
from codefuse_triton import Engine, Outbox, Vocab, _native
from codefuse_triton._native import testing
from fake_model import fake_engine

torch = pytest.importorskip("torch")
from helpers import make_neox  # noqa: E402
from test_engine_model import ON  # noqa: E402

VOCAB = 131


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose end tokens are likely enough to end beams now and then."""
    hf, native = make_neox(tmp_path_factory.mktemp("beams"), tie_word_embeddings=False)
    return hf, native


def reference(hf, prompt, width, max_tokens, **options):
    """(tokens without the end token and what pads, score) of every beam."""
    ends = options.pop("eos_token_id", None)
    with torch.no_grad():
        ids = torch.tensor([prompt])
        out = hf.generate(ids, attention_mask=torch.ones_like(ids), num_beams=width, num_return_sequences=width, max_new_tokens=max_tokens,
                          do_sample=False, eos_token_id=ends, pad_token_id=0, return_dict_in_generate=True, output_scores=True, **options)
    rows = []
    for tokens, score, beams in zip(out.sequences[:, len(prompt):].tolist(), out.sequences_scores.tolist(), out.beam_indices.tolist()):
        tokens = tokens[:sum(b >= 0 for b in beams)]
        rows.append((tokens[:-1] if ends and tokens[-1] in ends else tokens, score))
    return rows


def search(hf, prompt, width, max_tokens, end_ids=(), **options):
    s = testing.BeamSearch(width=width, max_tokens=max_tokens, end_ids=list(end_ids), **options)
    k = min(VOCAB, testing.BeamSearch.candidates(width, len(end_ids)))
    ended = False
    while not ended:
        running = [tokens for tokens, _ in s.running]
        with torch.no_grad():
            logits = hf(torch.tensor([prompt + tokens for tokens in running])).logits[:, -1].float()
        values, ids = torch.log_softmax(logits, -1).topk(k)
        ended = s.advance(list(zip(ids.tolist(), values.tolist())))
    return s.finished


def prompt_of(seed: int, n: int = 7) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB, n).tolist()


def same(got, want):
    assert [g[0] for g in got] == [w[0] for w in want]
    np.testing.assert_allclose([g[1] for g in got], [w[1] for w in want], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [2, 3, 8, 40])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -0.7, 2.5])
def test_beams_are_transformers(model, width, length_penalty):
    hf, _ = model
    for seed in range(3):
        prompt = prompt_of(seed)
        for ends in ((), (5,), (5, 17, 90)):
            want = reference(hf, prompt, width, 9, eos_token_id=list(ends) or None, length_penalty=length_penalty)
            got = search(hf, prompt, width, 9, ends, length_penalty=length_penalty)
            same(got, want)


@pytest.mark.parametrize("early_stopping", [False, True])
def test_beams_that_end_are_transformers(model, early_stopping):
    """Every third token ends a text, so that beams finish at many lengths and the search before max_tokens."""
    hf, _ = model
    ends, short = list(range(5, VOCAB, 6)), 0
    for seed in range(8):
        prompt = prompt_of(seed)
        want = reference(hf, prompt, 4, 30, eos_token_id=ends, early_stopping=early_stopping)
        got = search(hf, prompt, 4, 30, ends, early_stopping=early_stopping)
        same(got, want)
        assert {g[2] for g in got} <= {"eos", "length"}
        short += max(len(g[0]) for g in got) < 25
    assert short > 0


def test_diversity_rate_adds_to_the_rank_among_siblings():
    """By hand: two beams, three tokens each."""
    s = testing.BeamSearch(width=2, max_tokens=3, diversity_rate=-1.0)
    assert not s.advance([([4, 5, 6, 7], [-0.1, -0.2, -3.0, -4.0])])
    assert [t for t, _ in s.running] == [[4], [5]]
    # without the rate [4, 8] and [4, 9]; with it the second of a beam loses 1
    assert not s.advance([([8, 9, 1, 2], [-0.1, -0.2, -5.0, -6.0]), ([8, 9, 1, 2], [-0.3, -0.4, -5.0, -6.0])])
    assert [t for t, _ in s.running] == [[4, 8], [5, 8]]
    np.testing.assert_allclose([score for _, score in s.running], [-0.2, -0.5], rtol=1e-6)  # scores stay those of the model
    plain = testing.BeamSearch(width=2, max_tokens=3)
    plain.advance([([4, 5, 6, 7], [-0.1, -0.2, -3.0, -4.0])])
    plain.advance([([8, 9, 1, 2], [-0.1, -0.2, -5.0, -6.0]), ([8, 9, 1, 2], [-0.3, -0.4, -5.0, -6.0])])
    assert [t for t, _ in plain.running] == [[4, 8], [4, 9]]


def test_stop_strings_finish_beams():
    table = [b"a", b"b", b"c", b"ab"]
    s = testing.BeamSearch(width=2, max_tokens=9, token_bytes=table, stops=["bb"])
    s.advance([([1, 2, 0, 3], [-0.5, -1.0, -4.0, -5.0])])
    s.advance([([1, 0, 2, 3], [-0.1, -3.0, -3.5, -6.0]), ([2, 0, 1, 3], [-0.1, -3.0, -3.5, -6.0])])
    assert [(f[0], f[2]) for f in s.finished] == [([1, 1], "stop")] and [t for t, _ in s.running] == [[2, 2], [1, 0]]


# ---- through the engine -------------------------------------------------------------------------------------------------


PAGE_BYTES = 2 * 2 * 32 * 96 * 4  # K and V, layers, tokens, kv_heads * head_dim, float32
TABLE = [bytes([33 + i % 90]) for i in range(VOCAB)]


def load(native, pages=60, device="cpu", **options) -> Engine:
    e = _native.Engine(str(native), TABLE, device=device, dtype="float32", kv_bytes=pages * PAGE_BYTES, threads=2, **options)
    return Engine._of(e, Vocab.none(str(native)))


@pytest.fixture(scope="module")
def engine(model):
    with load(model[1]) as e:
        yield e


@pytest.mark.parametrize("width, ends, options", [
    (2, [], {}), (4, [5], dict(length_penalty=0.0)), (8, list(range(5, VOCAB, 9)), dict(early_stopping=True)), (40, [5, 17], dict(length_penalty=2.0))],
    ids=["2", "4", "8", "40"])
def test_engine_is_transformers(model, engine, width, ends, options):
    hf, _ = model
    if testing.BeamSearch.candidates(width, len(ends)) > 128:
        ends = ends[:128 // width - 1]
    for seed, length in ((1, 1), (2, 30), (3, 64), (4, 100)):
        prompt = prompt_of(seed, length)
        want = reference(hf, prompt, width, 40, eos_token_id=ends or None, **options)
        got = engine.generate_many(prompt, width, max_tokens=40, beam_width=width, eos_ids=ends, **options)
        assert [r.token_ids.tolist() for r in got] == [w[0] for w in want]
        assert all(r.text.encode() == b"".join(TABLE[t] for t in r.token_ids) and r.num_input_tokens == length for r in got)
        assert {r.finish_reason for r in got} <= {"eos", "length"}
        best = engine.generate_many(prompt, 1, max_tokens=40, beam_width=width, eos_ids=ends, logprobs=True, **options)
        assert len(best) == 1 and best[0].token_ids.tolist() == want[0][0] and len(best[0].logprobs) == len(want[0][0])
        assert best[0].cum_logprob == pytest.approx(best[0].logprobs.astype(float).sum(), abs=1e-5)
    stats = engine.stats()
    assert stats["running"] == stats["waiting"] == 0 and stats["free_pages"] == stats["pages"]
    assert stats["prefill_tokens"] < 100 * 40 * width  # beams take over what their parents have computed


def test_min_tokens_and_bias_are_transformers(model, engine):
    from transformers import LogitsProcessorList
    from transformers.generation.logits_process import SequenceBiasLogitsProcessor

    hf, _ = model
    ends = list(range(5, VOCAB, 9))[:8]
    bias = {t: float(b) for t, b in zip(range(3, 120, 4), np.random.default_rng(0).normal(0, 2, 30).astype(np.float32))}
    for seed in range(4):
        prompt = prompt_of(seed)
        want = reference(hf, prompt, 5, 20, eos_token_id=ends, min_new_tokens=11)
        got = engine.generate_many(prompt, 5, max_tokens=20, beam_width=5, eos_ids=ends, min_tokens=11)
        assert [r.token_ids.tolist() for r in got] == [w[0] for w in want] and min(len(w[0]) for w in want) >= 11
        want = reference(hf, prompt, 5, 20, logits_processor=LogitsProcessorList([SequenceBiasLogitsProcessor([[[t], b] for t, b in bias.items()])]))
        got = engine.generate_many(prompt, 5, max_tokens=20, beam_width=5, logit_bias=bias, ignore_eos=True)
        assert [r.token_ids.tolist() for r in got] == [w[0] for w in want]


def with_rules(hf, prompt, width, max_tokens, change):
    """Beams whose candidates are chosen from change(tokens of the text, logits), their scores relative to the model's own log-sum."""
    s = testing.BeamSearch(width=width, max_tokens=max_tokens)
    ended = False
    while not ended:
        running = [tokens for tokens, _ in s.running]
        with torch.no_grad():
            logits = hf(torch.tensor([prompt + tokens for tokens in running])).logits[:, -1].float()
        changed = torch.stack([torch.from_numpy(change(tokens, row.numpy().copy())) for tokens, row in zip(running, logits)])
        values, ids = (changed - logits.logsumexp(-1, keepdim=True)).topk(2 * width)
        ended = s.advance(list(zip(ids.tolist(), values.tolist())))
    return [f[0] for f in s.finished]


def test_penalties_and_bad_words_go_with_each_beam(model, engine):
    hf, _ = model
    words = [b"!", b"()", b"AB"]

    for seed in range(4):
        prompt = prompt_of(seed, 20)

        def penalized(tokens, logits):
            seen = np.zeros(VOCAB, bool)
            seen[prompt + tokens] = True
            logits = np.where(seen, np.where(logits > 0, logits / np.float32(1.4), logits * np.float32(1.4)), logits)
            counts = np.bincount(tokens, minlength=VOCAB).astype(np.float32)
            return logits - (np.float32(0.5) + np.float32(0.75) * counts) * (counts > 0)

        def without(tokens, logits):
            text = b"".join(TABLE[t] for t in prompt + tokens)
            logits[[t for t in range(VOCAB) if any((text + TABLE[t]).endswith(word) for word in words)]] = -np.inf
            return logits

        options = dict(max_tokens=16, beam_width=4, ignore_eos=True)
        got = engine.generate_many(prompt, 4, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.75, **options)
        assert [r.token_ids.tolist() for r in got] == with_rules(hf, prompt, 4, 16, penalized)
        got = engine.generate_many(prompt, 4, bad_words=words, **options)
        assert [r.token_ids.tolist() for r in got] == with_rules(hf, prompt, 4, 16, without)
        assert not any(word in r.text.encode() for r in got for word in words)


@ON
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("setup", [dict(slots=3), dict(slots=16, pages=14), dict(slots=8, prefix_cache="off")], ids=["few slots", "few pages", "no cache"])
def test_same_beams_whatever_the_batch(model, device, setup, depth):
    requests = [(prompt_of(i, 5 + 9 * i), dict(beam_width=2 + i, max_tokens=20, eos_ids=[5, 17])) for i in range(5)]
    plain = [(prompt_of(20 + i, 20), dict(max_tokens=40, temperature=1.0, seed=i, ignore_eos=True)) for i in range(6)]
    with load(model[1], device=device) as e:
        alone = [[r.token_ids.tolist() for r in e.generate_many(p, 2, **o)] for p, o in requests]
        plain_alone = [e.generate(p, **o).token_ids.tolist() for p, o in plain]
    with load(model[1], depth=depth, device=device, **setup) as e:
        box = Outbox()
        firsts = [e.submit(p, outbox=box, beam_count=2, **o) for p, o in requests]
        uids = [e.submit(p, outbox=box, stream=False, **o) for p, o in plain]
        chunks = {}
        while len(chunks) < 2 * len(firsts) + len(uids):
            for c in box.poll(20):
                assert c.uid not in chunks and c.index == 0 and c.finish_reason, "one chunk each"
                chunks[c.uid] = c
        assert [[chunks[first + i].token_ids.tolist() for i in range(2)] for first in firsts] == alone
        assert [chunks[uid].token_ids.tolist() for uid in uids] == plain_alone
        stats = e.stats()
        assert stats["running"] == stats["waiting"] == 0 and stats["free_pages"] == stats["pages"]
        assert stats["finished"]["length"] + stats["finished"]["eos"] == 16


def test_stop_strings_end_beams(engine):
    prompt = prompt_of(1)
    (free,) = engine.generate_many(prompt, 1, max_tokens=12, beam_width=3, ignore_eos=True)
    stop = free.text[5:7]
    got = engine.generate_many(prompt, 3, max_tokens=12, beam_width=3, ignore_eos=True, stop=[stop])
    assert any(r.finish_reason == "stop" and r.stop_reason == stop for r in got)
    assert not any(stop in r.text for r in got)


def test_beams_that_run_out_of_time_are_what_there_is():
    with fake_engine(slots=8, step_us=3000, max_len=256, pages=64) as e:
        texts = e.generate_many([5, 6, 7], 3, max_tokens=200, beam_width=4, ignore_eos=True, max_time_ms=60)
        assert [r.finish_reason for r in texts] == ["time"] * 3
        assert 2 < texts[0].num_output_tokens == texts[1].num_output_tokens < 40 and len({r.text for r in texts}) == 3
        assert e.stats()["finished"]["time"] == 3 and e.stats()["running"] == 0


@pytest.mark.parametrize("which", [0, 1, 2])
def test_cancelling_one_text_cancels_all(model, which):
    with load(model[1], slots=4) as e:
        box = Outbox()
        first = e.submit(prompt_of(1), outbox=box, max_tokens=150, beam_width=4, beam_count=3, ignore_eos=True)
        assert e.cancel(first + which)
        chunks = []
        while len(chunks) < 3:
            chunks += box.poll(10)
        assert sorted(c.uid for c in chunks) == [first, first + 1, first + 2] and {c.finish_reason for c in chunks} == {"cancelled"}
        stats = e.stats()
        assert stats["running"] == stats["waiting"] == 0 and stats["finished"]["cancelled"] == 3
        assert not e.cancel(first)
        assert e.generate(prompt_of(2), max_tokens=3, ignore_eos=True).num_output_tokens == 3


@pytest.mark.parametrize("options, said", [
    (dict(beam_width=65), "beam_width is 65; expected 1..64"), (dict(beam_width=0), "beam_width is 0"),
    (dict(beam_width=64, eos_ids=[1, 2]), "beam_width is 64 with 2 end tokens; expected at most 42"),
    (dict(beam_width=2, beam_count=3), r"beam_count is 3; expected 1..2 \(beam_width\)"),
    (dict(beam_width=2, length_penalty=float("inf")), "length_penalty is inf"),
    (dict(beam_width=2, beam_diversity_rate=float("nan")), "beam_diversity_rate is nan"),
    (dict(beam_width=2, temperature=0.5), "temperature is 0.5; with beam_width above 1 expected 0"),
    (dict(beam_width=2, top_logprobs=1), "top_logprobs is 1; with beam_width"),
], ids=str)
def test_bad_options_are_refused(engine, options, said):
    with pytest.raises(ValueError, match=said):
        engine.generate(prompt_of(1), max_tokens=4, **options)
