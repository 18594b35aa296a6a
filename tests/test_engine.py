"""The engine through its Python API: a fake device for the loop's behaviour, tiny random checkpoints for its results."""
import time

import numpy as np
import pytest
from codefuse_triton import Outbox, QueueFull
from codefuse_triton._native import testing
from fake_model import expected, fake_engine, held, letters

PROMPT = [5, 6, 7]


@pytest.fixture
def engine():
    with fake_engine() as e:
        yield e


def drain(box, uids, timeout=20):
    """All chunks of uids, per uid, until each has ended; those of others are dropped."""
    got = {uid: [] for uid in uids}
    while any(not c or not c[-1].finish_reason for c in got.values()):
        chunks = box.poll(timeout)
        assert chunks, "nothing came"
        for c in chunks:
            if c.uid in got:
                got[c.uid].append(c)
    return got


def slow(**options):
    return fake_engine(**{"step_us": 3000, "slots": 4, "max_len": 256, "pages": 32, **options})


# ---- output ---------------------------------------------------------------------------------------------------------


def test_stream_equals_generate(engine):
    whole = engine.generate(PROMPT, max_tokens=60, seed=3, ignore_eos=True, logprobs=True)
    tokens, _ = expected(PROMPT, 60, 3, eos=())
    assert whole.token_ids.tolist() == tokens and whole.finish_reason == "length" and whole.num_output_tokens == 60
    table = letters()
    assert whole.text.encode() == b"".join(table[t] for t in tokens)
    chunks = list(engine.stream(PROMPT, max_tokens=60, seed=3, ignore_eos=True, logprobs=True))
    assert b"".join(c.text for c in chunks) == whole.text.encode()
    assert np.concatenate([c.token_ids for c in chunks]).tolist() == tokens
    assert [c.index for c in chunks] == list(range(len(chunks)))
    assert [c.finish_reason for c in chunks] == [""] * (len(chunks) - 1) + ["length"]
    assert np.concatenate([c.logprobs for c in chunks]).tolist() == whole.logprobs.tolist() == [-0.25 * t for t in tokens]
    assert chunks[-1].cum_logprob == whole.cum_logprob == sum(-0.25 * t for t in tokens)
    assert all(c.text_start == 0 and c.text_bytes == len(c.text) and c.num_input_tokens == 3 for c in chunks)
    assert whole.token_ids.dtype == np.int32 and whole.logprobs.dtype == np.float32


def test_top_logprobs_go_with_their_tokens(engine):
    """Through holding back, merging and cutting: the fake device reports token, token + 1, .. as the most likely."""
    free = engine.generate(PROMPT, max_tokens=60, seed=4, ignore_eos=True)
    for options in (dict(), dict(stop=[free.text[20:24]]), dict(max_tokens=1)):
        options = {**dict(max_tokens=60, seed=4, ignore_eos=True, top_logprobs=3), **options}
        for chunks in ([engine.generate(PROMPT, **options)], list(engine.stream(PROMPT, **options))):
            for c in chunks:
                n = len(c.token_ids)
                assert c.top_token_ids.shape == c.top_logprobs.shape == (n, 3) and c.top_token_ids.dtype == np.int32
                assert (c.top_token_ids == (c.token_ids[:, None] + np.arange(3)) % 64).all()
                assert (c.top_logprobs == -0.25 * (c.token_ids[:, None] + np.arange(3))).all() and c.logprobs.size == 0
    assert free.top_token_ids.size == 0


def test_tokens_come_one_by_one():
    chunks, start = [], time.monotonic()
    with slow(depth=1) as e, held(e):
        stream = e.stream(PROMPT, max_tokens=10, seed=1, ignore_eos=True)
        for _ in range(10):
            testing.allow(e._native, 1)
            chunks.append(next(stream))
        elapsed = time.monotonic() - start
    assert [c.token_ids.tolist() for c in chunks] == [[t] for t in expected(PROMPT, 10, 1, eos=())[0]]
    last = chunks[-1]
    assert last.finish_reason == "length" and last.prefill_s > 0.002 and last.decode_s > 0.02 and last.queue_s + last.prefill_s + last.decode_s < elapsed


def test_chunks_that_wait_are_merged():
    box = Outbox()
    with fake_engine() as e:
        uid = e.submit(PROMPT, outbox=box, max_tokens=20, seed=1, ignore_eos=True)
        e.close(20)
        (c,) = box.poll(1)
        assert c.uid == uid and c.token_ids.tolist() == expected(PROMPT, 20, 1, eos=())[0] and c.finish_reason == "length"
        assert c.text == b"".join(letters()[t] for t in c.token_ids) and c.logprobs.size == 0
        assert box.poll(0) == []


def test_not_streaming_is_one_chunk():
    with slow() as e:
        box = Outbox()
        uid = e.submit(PROMPT, outbox=box, max_tokens=12, stream=False, ignore_eos=True, logprobs=True)
        (chunks,) = drain(box, [uid]).values()
        assert len(chunks) == 1 and chunks[0].index == 0 and len(chunks[0].token_ids) == len(chunks[0].logprobs) == 12


def test_eos_is_neither_delivered_nor_counted(engine):
    ended = 0
    for seed in range(40):
        tokens, finish = expected(PROMPT, 50, seed)
        r = engine.generate(PROMPT, max_tokens=50, seed=seed)
        assert (r.token_ids.tolist(), r.finish_reason, r.num_output_tokens) == (tokens, finish, len(tokens))
        ended += finish == "eos"
    assert 0 < ended < 40


def test_eos_options(engine):
    free = expected(PROMPT, 40, 9, eos=())[0]
    some = free[7]
    assert engine.generate(PROMPT, max_tokens=40, seed=9, eos_ids=[some]).token_ids.tolist() == free[: free.index(some)]
    assert engine.generate(PROMPT, max_tokens=40, seed=9, eos_ids=[some], ignore_eos=True).token_ids.tolist() == free
    for ignore_eos in (False, True):  # ignores the model's end tokens only
        ended = engine.generate(PROMPT, max_tokens=40, seed=9, stop_token_ids=[some], ignore_eos=ignore_eos)
        assert (ended.token_ids.tolist(), ended.finish_reason) == (free[: free.index(some)], "eos")
    late = engine.generate(PROMPT, max_tokens=40, seed=9, eos_ids=[some], min_tokens=free.index(some) + 1)
    want, finish = expected(PROMPT, 40, 9, eos=(some,), min_tokens=free.index(some) + 1)
    assert (late.token_ids.tolist(), late.finish_reason) == (want, finish) and len(want) > free.index(some)


def test_stop_strings(engine):
    free = engine.generate(PROMPT, max_tokens=60, seed=4, ignore_eos=True)
    stop = free.text[20:24]
    at = free.text.index(stop)
    for stream in (False, True):
        cut = engine.generate(PROMPT, max_tokens=60, seed=4, ignore_eos=True, stop=[stop, b"nowhere"])
        if stream:
            chunks = list(engine.stream(PROMPT, max_tokens=60, seed=4, ignore_eos=True, stop=stop))
            assert b"".join(c.text for c in chunks).decode() == cut.text
            assert sum(len(c.token_ids) for c in chunks) == cut.num_output_tokens == chunks[-1].num_output_tokens
        assert cut.text == free.text[:at] and cut.finish_reason == "stop" and cut.stop_reason == stop
        assert cut.token_ids.tolist() == free.token_ids.tolist()[: len(cut.token_ids)]
    kept = engine.generate(PROMPT, max_tokens=60, seed=4, ignore_eos=True, stop=[stop], include_stop=True)
    assert kept.text == free.text[: at + 4]
    assert engine.generate(PROMPT, max_tokens=60, seed=4, ignore_eos=True, stop=[stop], min_tokens=60).text == free.text


def test_several_answers(engine):
    options = dict(max_tokens=20, ignore_eos=True, logprobs=True)
    alone = [engine.generate(PROMPT, seed=(2**64 - 2 + i) % 2**64, **options) for i in range(4)]
    many = engine.generate_many(PROMPT, 4, seed=2**64 - 2, **options)
    assert [r.token_ids.tolist() for r in many] == [r.token_ids.tolist() for r in alone] and len({r.text for r in many}) == 4
    ranked = sorted(alone, key=lambda r: -r.cum_logprob / 20)
    for n in (1, 3):
        assert [r.text for r in engine.generate_many(PROMPT, n, best_of=4, seed=2**64 - 2, **options)] == [r.text for r in ranked[:n]]
    assert engine.generate_many(PROMPT, 2, max_tokens=3)[0].uid != 0  # a seed is drawn
    for n, best_of in ((0, None), (3, 2)):
        with pytest.raises(ValueError, match=f"n is {n} and best_of"):
            engine.generate_many(PROMPT, n, best_of=best_of)


def test_several_answers_all_or_none():
    with slow(slots=1, queue=2) as e:
        with pytest.raises(QueueFull):
            e.generate_many(PROMPT, 4, max_tokens=200, ignore_eos=True)
        deadline = time.monotonic() + 5
        while e.stats()["finished"]["cancelled"] < 3:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert e.stats()["running"] == 0
        assert e.generate(PROMPT, max_tokens=2, ignore_eos=True).num_output_tokens == 2


def test_uids_are_unique_and_positive(engine):
    box = Outbox()
    uids = [engine.submit(PROMPT, outbox=box, max_tokens=1) for _ in range(10)]
    assert len(set(uids)) == 10 and min(uids) > 0
    drain(box, uids)


# ---- input ----------------------------------------------------------------------------------------------------------

BAD = [
    (dict(prompt=[]), "prompt has no tokens"),
    (dict(prompt=[1] * 256), "prompt has 256 tokens; expected at most 255"),
    (dict(prompt=[1, 64]), r"prompt\[1\] is token 64; expected 0..63"),
    (dict(prompt=[1, -1]), "prompt has token -1; expected 0..63"),
    (dict(prompt=[2**40]), f"prompt has token {2**40}; expected 0..63"),
    (dict(prompt=[[1, 2]]), "prompt has shape"),
    (dict(prompt=[1.5]), "expected text or a flat sequence"),
    (dict(prompt="text"), "has no tokenizer"),
    (dict(max_tokens=0), "max_tokens is 0; expected at least 1"),
    (dict(max_tokens=254), "max_tokens is 254; expected at most 253 with a prompt of 3 tokens"),
    (dict(max_tokens=2**40), "max_tokens is 1099511627776"),
    (dict(min_tokens=-1), "min_tokens is -1"),
    (dict(min_tokens=9, max_tokens=8), r"min_tokens is 9; expected 0..8 \(max_tokens\)"),
    (dict(temperature=-0.1), "temperature is -0.1"),
    (dict(temperature=float("nan")), "temperature is nan"),
    (dict(temperature=float("inf")), "temperature is inf"),
    (dict(top_k=-1), "top_k is -1"),
    (dict(top_p=0.0), "top_p is 0; expected more than 0"),
    (dict(top_p=1.5), "top_p is 1.5"),
    (dict(top_p=float("nan")), "top_p is nan"),
    (dict(min_p=-0.5), "min_p is -0.5"),
    (dict(min_p=1.01), "min_p is 1.01"),
    (dict(seed=-1), "seed is -1"),
    (dict(top_logprobs=21), "top_logprobs is 21; expected 0..20"),
    (dict(top_logprobs=-1), "top_logprobs is -1"),
    (dict(seed=2**64), "seed is 18446744073709551616"),
    (dict(stop=["a", ""]), r"stop\[1\] is empty"),
    (dict(stop=["x" * 70000]), "stop has 70000 bytes; expected at most 65536"),
    (dict(eos_ids=[64]), r"eos_ids\[0\] is 64"),
    (dict(stop_token_ids=[3, 64]), r"stop_token_ids\[1\] is 64; expected 0..63"),
    (dict(stop_token_ids=[-1]), r"stop_token_ids\[0\] is -1"),
]


@pytest.mark.parametrize("options, message", BAD, ids=[m for _, m in BAD])
def test_bad_input_is_refused(engine, options, message):
    options = {"prompt": PROMPT, "max_tokens": 8, **options}
    with pytest.raises(ValueError, match=message):
        engine.submit(options.pop("prompt"), outbox=Outbox(), **options)
    assert engine.stats()["submitted"] == 0


def test_what_cannot_fit_the_pool_is_refused():
    with fake_engine(pages=3, max_len=256) as e:
        assert e.generate([1] * 32, max_tokens=65, ignore_eos=True).num_output_tokens == 65  # the last token needs no place
        with pytest.raises(ValueError, match="prompt of 32 tokens and max_tokens 66 need 4 KV pages; the pool has 3"):
            e.generate([1] * 32, max_tokens=66)


def test_prompts_of_many_kinds(engine):
    want = engine.generate(PROMPT, max_tokens=5, seed=1).token_ids.tolist()
    for prompt in (tuple(PROMPT), np.array(PROMPT), np.array(PROMPT, np.uint8), np.arange(5, 11)[:3]):
        assert engine.generate(prompt, max_tokens=5, seed=1).token_ids.tolist() == want


def test_queue_is_bounded():
    with slow(slots=2, queue=3, step_us=20000) as e:
        box = Outbox()
        uids = [e.submit(PROMPT, outbox=box, max_tokens=20, ignore_eos=True) for _ in range(5)]
        with pytest.raises(QueueFull, match="5 requests are alive; expected at most 5"):
            e.submit(PROMPT, outbox=box)
        assert issubclass(QueueFull, RuntimeError) and e.stats()["refused"] == 1
        e.cancel(uids[4])
        drain(box, [uids[4]])
        e.submit(PROMPT, outbox=box, max_tokens=1)


def test_stats(engine):
    engine.generate(PROMPT, max_tokens=10, ignore_eos=True)
    s = engine.stats()
    assert (s["slots"], s["queue"], s["pages"], s["free_pages"], s["page_tokens"]) == (4, 16, 32, 32, 32)
    assert (s["steps"], s["prefill_tokens"], s["decode_tokens"], s["wasted_rows"], s["preemptions"]) == (10, 3, 10, 0, 0)
    assert (s["submitted"], s["refused"], s["running"], s["waiting"], s["error"]) == (1, 0, 0, 0, "")
    assert s["finished"] == {"eos": 0, "stop": 0, "length": 1, "time": 0, "cancelled": 0, "error": 0, "deadline": 0} and s["step_s"] > 0
