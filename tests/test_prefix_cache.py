"""The prefix cache: its tree of pages, what the scheduler takes over from it, and engines whose answers it must not change."""
import contextlib
import random
import threading

import numpy as np
import pytest
from codefuse_triton import Outbox, QueueFull, _native
from fake_model import expected, fake_engine, held
from helpers import PAGE, Pages, make_batch

KINDS = pytest.mark.parametrize("reuse", ["same rows", "any rows"])


# ---- the tree ----------------------------------------------------------------------------------------------------------------


def tree(pages=64):
    return _native.testing.PrefixCache(pages=pages)


def find(t, keys, salt=""):
    """(tokens, full pages, page to copy from), nothing held afterwards."""
    tokens, full, partial = t.find(keys, salt)
    for page in full + [partial] * (partial >= 0):
        t.release(page)
    return tokens, full, partial


def test_match_is_to_the_token():
    t = tree()
    a = list(range(100))
    pages = t.put(a)
    assert find(t, a) == (100, pages[:3], pages[3])
    assert find(t, a + [7]) == (100, pages[:3], pages[3])
    assert find(t, a[:70] + [7] * 30) == (70, pages[:2], pages[2])
    assert find(t, a[:64]) == (64, pages[:2], -1)
    assert find(t, a[:63]) == (63, pages[:1], pages[1])
    assert find(t, [1] + a[1:]) == (0, [], -1) and find(t, []) == (0, [], -1)
    assert find(t, a, "salt") == (0, [], -1)


def test_the_longest_of_siblings_is_found():
    t = tree()
    base = list(range(32))
    for tail in ([1, 2, 3], [1, 2, 4, 5], [1, 3], [0, 9, 9, 9], [7] * 31):
        t.put(base + tail)
    for tail, length in (([1, 2, 4], 3), ([1, 2, 5], 2), ([1, 9], 1), ([0, 9, 9], 3), ([7] * 40, 31), ([2], 0), ([1, 2, 3, 3], 3), ([1, 3], 2)):
        assert find(t, base + tail)[0] == 32 + length, tail


def test_what_a_longer_page_covers_is_not_kept():
    t = tree()
    t.put([1, 2])
    t.put([1, 2, 3])
    t.put([1, 2])  # the longer one has it
    assert (t.nodes, t.idle, t.free) == (1, 1, 63)
    t.put([1, 3])
    assert (t.nodes, t.free) == (2, 62)
    t.put([1, 3] + [4] * 40)
    assert t.nodes == 3 and find(t, [1, 2, 3])[0] == 3 and find(t, [1, 3] + [4] * 40)[0] == 42


def test_the_same_content_is_kept_once():
    t = tree()
    a = t.put(list(range(70)))
    t.put(list(range(70)))
    t.put(list(range(64)) + [9] * 3)
    assert t.nodes == 4 and t.free == 60
    assert find(t, list(range(64)) + [9, 9])[1] == a[:2]


def test_longest_unused_goes_first_and_leaves_before_their_parents():
    t = tree()
    a, b = list(range(64)), list(range(100, 164))
    t.put(a), t.put(b), t.put(a)  # used again: b is older now
    left = []
    for _ in range(4):
        assert t.evict()
        left.append((find(t, a)[0], find(t, b)[0]))
    assert left == [(64, 32), (64, 0), (32, 0), (0, 0)]
    assert not t.evict() and t.nodes == 0 and t.free == 64


def test_held_pages_are_not_evicted():
    t = tree()
    a = list(range(64))
    pages = t.put(a)
    assert t.find(a) == (64, pages, -1)
    t.put([5] * 40)
    assert t.evict() and t.evict() and not t.evict()
    t.release(pages[1])
    assert t.evict() and not t.evict()
    t.release(pages[0])
    assert t.evict() and t.free == 64


def test_random_trees():
    """Against all keys that were put: the match is the longest one, as long as nothing had to go."""
    rng = random.Random(5)
    for pages, alphabet in ((4096, 2), (4096, 3), (40, 2)):
        t, put = tree(pages), []
        for _ in range(300):
            salt = rng.choice(["", "x"])
            base = rng.choice(put)[1][: rng.randint(0, 100)] if put and rng.random() < 0.7 else []
            keys = base + [rng.randrange(alphabet) for _ in range(rng.randint(1, 60))]
            longest = max((next((i for i, (p, q) in enumerate(zip(other, keys)) if p != q), min(len(other), len(keys))) for s, other in put if s == salt), default=0)
            tokens, full, partial = find(t, keys, salt)
            assert tokens == longest if pages == 4096 else tokens <= longest
            assert len(full) == tokens // PAGE and (partial >= 0) == (tokens % PAGE > 0)
            t.put(keys, salt)
            put.append((salt, keys))
            assert find(t, keys, salt)[0] == len(keys) and t.nodes == t.idle == pages - t.free
        while t.evict():
            pass
        assert t.free == pages and t.nodes == 0


# ---- the scheduler -----------------------------------------------------------------------------------------------------------


def make(slots=4, rows=68, prefill_rows=64, max_len=256, pages=32, reuse="same rows"):
    return _native.testing.Scheduler(slots=slots, rows=rows, prefill_rows=prefill_rows, max_len=max_len, pages=pages, reuse=reuse)


def run(s, uid=None, token=5):
    """Steps until nothing can run, results known before the next one; ends what is sampled max_tokens times."""
    steps = []
    while (step := s.schedule()) is not None:
        steps.append(step)
        for sampled in step["sampled"]:
            s.accept(sampled, token)
    return steps


@KINDS
def test_only_what_is_new_is_computed(reuse):
    s = make(reuse=reuse)
    prompt = list(range(50))
    s.add(1, prompt, 1)
    run(s)
    s.remove(1)
    assert (s.free_pages, s.cached_pages) == (32, 2)
    s.add(2, prompt + [99], 1)
    step, = run(s)
    assert step["admitted"] == [(2, 50)] and step["chunks"] == [(0, 1, 0, 50)] and step["token"] == [99]
    (source, target, tokens), = step["copies"]
    assert tokens == 18 and step["table"][1] == target != source
    s.add(3, prompt, 1)  # its last token is computed: there is no other way to the next one
    step, = run(s)
    assert step["admitted"] == [(3, 49)] and step["position"] == [49]


def test_generated_tokens_are_taken_over_where_rows_are_alike():
    for reuse, cached in (("any rows", 53), ("same rows", 50)):
        s = make(reuse=reuse)
        s.add(1, list(range(50)), 4)
        run(s)
        s.remove(1)
        s.add(2, list(range(50)) + [5] * 4 + [9], 1)
        assert run(s)[0]["admitted"] == [(2, cached)]  # the last one sampled was never fed


@KINDS
def test_salts_share_nothing(reuse):
    s = make(reuse=reuse)
    for uid, salt, cached in ((1, "a", 0), (2, "b", 0), (3, "", 0), (4, "a", 49), (5, "", 49)):
        s.add(uid, list(range(50)), 2, salt)
        assert run(s)[0]["admitted"] == [(uid, cached)]
        s.remove(uid)


def test_running_sequences_share_too():
    s = make()
    s.add(1, list(range(70)), 100)
    s.schedule(), s.schedule()
    s.add(2, list(range(66)) + [9], 100)
    step = s.schedule()
    assert step["admitted"] == [(2, 66)] and [c[2] for c in step["copies"]] == [2] and step["chunks"] == [(1, 1, 1, 66)]
    rows = {slot: step["table"][i * 8:i * 8 + 3] for i, slot in enumerate(step["table_slot"])}
    assert rows[0][:2] == rows[1][:2] and rows[0][2] == step["copies"][0][0] != rows[1][2] == step["copies"][0][1]
    s.remove(1)
    assert s.free_pages == 32 - 3
    s.remove(2)
    assert s.free_pages == 32


def test_a_common_prompt_is_computed_once():
    s = make(slots=4, rows=68)
    prompt = list(range(100))
    for uid in (1, 2, 3):
        s.add(uid, prompt + [200 + uid], 5)
    first, second, third = s.schedule(), s.schedule(), s.schedule()
    assert [x["chunks"] for x in (first, second)] == [[(0, 64, 0, 0)], [(0, 37, 0, 64)]] and first["admitted"] == [(1, 0)]
    assert third["admitted"] == [(2, 100), (3, 100)] and [c[1] for c in third["chunks"]] == [1, 1]
    assert len(third["copies"]) == 2 and len({to for _, to, _ in third["copies"]}) == 2


def test_one_that_is_cancelled_does_not_hold_up_who_waits_for_it():
    s = make(slots=4, rows=68)
    s.add(1, list(range(200)), 5)
    s.add(2, list(range(200)), 5)
    s.schedule()
    assert s.waiting == 1
    s.remove(1)
    step = s.schedule()
    assert step["admitted"] == [(2, 64)] and step["chunks"][0][1:] == (64, 0, 64)


def test_the_cache_is_given_up_before_anyone_is_preempted():
    s = make(slots=4, pages=8)
    for uid in (1, 2, 3):
        s.add(uid, [uid] * 64, 1)
        run(s)
        s.remove(uid)
    assert (s.free_pages, s.cached_pages, s.evictions) == (8, 6, 0)
    s.add(4, [4] * 96, 65)
    run(s)
    assert (s.preemptions, s.evictions) == (0, 3)
    s.remove(4)
    s.add(5, [3] * 64, 1)  # the one used last is still there
    assert run(s)[0]["admitted"] == [(5, 63)]


def test_a_small_pool_does_without_the_copy():
    s = make(slots=1, rows=65, max_len=128, pages=2)
    s.add(1, list(range(40)), 1)
    run(s)
    s.remove(1)
    s.add(2, list(range(64)), 1)  # two pages, and one to copy from would be a third
    step, = run(s)
    assert step["admitted"] == [(2, 32)] and step["copies"] == [] and s.evictions == 1


def test_a_preempted_sequence_takes_its_own_rows_over():
    s = make(slots=2, pages=7, prefill_rows=64, rows=66)
    s.add(1, [1] * 40, 100)
    s.add(2, [2] * 40, 60)
    steps, n = [], {1: 0, 2: 0}
    while (step := s.schedule()) is not None:
        steps.append(step)
        for uid in step["sampled"]:
            n[uid] += 1
            s.accept(uid, 1000 * uid + n[uid])
            if n[uid] == (100 if uid == 1 else 60):
                s.remove(uid)
    assert s.preemptions == 1 and n == {1: 100, 2: 60} and s.free_pages == 7
    rows = sum(len(x["token"]) for x in steps)
    assert 2 * 40 + 99 + 59 < rows <= 2 * 40 + 99 + 59 + PAGE  # the one page that had to go
    seen = {}
    for x in steps:
        for row, (t, p) in enumerate(zip(x["token"], x["position"])):
            kind = row < x["decode_rows"]
            assert seen.setdefault((t // 1000 if t >= 1000 else t, p), (t, kind)) == (t, kind)


# ---- engines -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alike", [False, True])
def test_counts(alike):
    engine = fake_engine(rows_alike=alike, depth=1, max_len=256, pages=32)
    prompt = list(range(1, 41))
    cold = engine.generate(prompt, max_tokens=20, ignore_eos=True, seed=3)
    warm = engine.generate(prompt, max_tokens=20, ignore_eos=True, seed=3)
    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, 39) and warm.token_ids.tolist() == cold.token_ids.tolist()
    longer = engine.generate(prompt + cold.token_ids.tolist() + [1], max_tokens=2, ignore_eos=True)
    assert longer.num_cached_tokens == (40 + 19 if alike else 40)
    stats = engine.stats()
    assert stats["cached_tokens"] == 39 + longer.num_cached_tokens
    assert stats["prefill_tokens"] == 40 + 1 + 61 - longer.num_cached_tokens
    assert stats["cached_pages"] > 0 and stats["free_pages"] == 32
    off = fake_engine(rows_alike=alike, prefix_cache="off", max_len=256, pages=32)
    assert [off.generate(prompt, max_tokens=20, ignore_eos=True, seed=3).token_ids.tolist() for _ in range(2)] == [cold.token_ids.tolist()] * 2
    assert off.stats()["cached_tokens"] == off.stats()["cached_pages"] == 0


def test_options_are_checked():
    with pytest.raises(ValueError, match="prefix_cache is 'maybe'; expected on, off or generated"):
        fake_engine(prefix_cache="maybe")
    engine = fake_engine()
    with pytest.raises(ValueError, match="cache_salt has 257 bytes; expected at most 256"):
        engine.generate([1], cache_salt="x" * 257)
    with pytest.raises(ValueError, match="cache_salt has a lone surrogate"):
        engine.generate([1], cache_salt="\ud800")


SHAPES = {
    "roomy": dict(slots=8, prefill_tokens=64, max_len=256, pages=256, queue=24),
    "few pages": dict(slots=8, prefill_tokens=16, max_len=160, pages=9, queue=16),
    "one sequence fits": dict(slots=4, prefill_tokens=7, max_len=128, pages=4, queue=8),
    "many slots": dict(slots=64, prefill_tokens=40, max_len=160, pages=12, queue=4),
}


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_random_editing(shape, depth):
    """Typists whose prompts grow, shrink and take generated text in, some with a salt, some cancelled. The fake device finds every
    key where it reads it: what is taken over from the wrong place, too early or after it was written over changes the tokens."""
    options = SHAPES[shape]
    rng = random.Random(f"{shape} {depth}")
    engine, box = fake_engine(depth=depth, **options), Outbox()
    longest = min(options["max_len"], PAGE * options["pages"] + 1)
    texts = [[rng.randrange(64) for _ in range(rng.randint(1, longest // 2))] for _ in range(6)]
    live, got, cached, total, ended = {}, {}, 0, 1500, 0
    submitted = 0
    while ended < total:
        filling = ended == 0 or rng.random() < 0.05
        with held(engine) if filling else contextlib.nullcontext():
            while submitted < total and (filling or rng.random() < 0.8):
                i = rng.randrange(len(texts))
                if rng.random() < 0.15:
                    texts[i] = texts[rng.randrange(len(texts))][: rng.randint(1, longest // 2)]
                texts[i] = (texts[i] + [rng.randrange(64) for _ in range(rng.randint(0, 12))])[: longest - 10]
                prompt, salt = texts[i], rng.choice(["", "", "salt"])
                max_tokens = rng.randint(1, min(60, longest - len(prompt)))
                seed = rng.getrandbits(64)
                try:
                    uid = engine.submit(prompt, outbox=box, max_tokens=max_tokens, seed=seed, stream=rng.random() < 0.5, cache_salt=salt)
                except QueueFull:
                    break
                submitted += 1
                live[uid], got[uid] = (prompt, max_tokens, seed, i), []
        if got and rng.random() < 0.3:
            engine.cancel(rng.choice(list(got)))
        for chunk in box.poll(20 if got else 0):
            got[chunk.uid] += chunk.token_ids.tolist()
            if not chunk.finish_reason:
                continue
            ended += 1
            tokens = got.pop(chunk.uid)
            prompt, max_tokens, seed, i = live.pop(chunk.uid)
            want, finish = expected(prompt, max_tokens, seed)
            assert tokens == (want if chunk.finish_reason != "cancelled" else want[: len(tokens)]), chunk
            assert chunk.finish_reason in (finish, "cancelled")
            assert 0 <= chunk.num_cached_tokens < len(prompt)
            cached += chunk.num_cached_tokens
            if rng.random() < 0.3:
                texts[i] = (prompt + tokens)[: longest - 10]
    stats = engine.stats()
    while stats["running"] + stats["waiting"]:
        stats = engine.stats()
    assert stats["free_pages"] == options["pages"] and stats["error"] == ""
    assert stats["cached_tokens"] == cached > 0
    if shape != "roomy":
        assert stats["preemptions"] > 0 and stats["evictions"] > 0
    engine.close()
