"""Random workloads over a fake device that reads its KV pages back, and that neither side waits for the other."""
import contextlib
import random
import time

import pytest
from codefuse_triton import Outbox, QueueFull, _native
from fake_model import expected, fake_engine, held

PAGE = 32

SHAPES = {
    "roomy": dict(slots=8, prefill_tokens=64, max_len=256, pages=64, queue=32),
    "few pages": dict(slots=8, prefill_tokens=16, max_len=128, pages=6, queue=16),
    "one sequence fits": dict(slots=4, prefill_tokens=7, max_len=128, pages=4, queue=8),
    "many slots": dict(slots=64, prefill_tokens=40, max_len=160, pages=8, queue=4),
    "one slot": dict(slots=1, prefill_tokens=1, max_len=64, pages=2, queue=2),
}


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prefix_cache", ["on", "off"])
def test_random_workload(shape, depth, prefix_cache):
    options = SHAPES[shape]
    rng = random.Random(f"{shape} {depth}")
    engine, box = fake_engine(depth=depth, prefix_cache=prefix_cache, **options), Outbox()
    total = 500 if shape == "one slot" else 2000
    most = options["slots"] + options["queue"]
    live, got, cancelled, ended, refused = {}, {}, set(), 0, 0
    submitted = 0
    while ended < total:
        filling = ended == 0 or rng.random() < 0.05
        with held(engine) if filling else contextlib.nullcontext():
            while submitted < total and (filling or rng.random() < 0.9):
                longest = min(options["max_len"], PAGE * options["pages"] + 1)
                prompt = [rng.randrange(64) for _ in range(rng.randint(1, longest - 1))] if rng.random() < 0.3 else [rng.randrange(64)] * rng.randint(1, 20)
                max_tokens = rng.randint(1, longest - len(prompt))
                seed, stream = rng.getrandbits(64), rng.random() < 0.7
                try:
                    uid = engine.submit(prompt, outbox=box, max_tokens=max_tokens, seed=seed, eos_ids=[0], stream=stream, ignore_eos=rng.random() < 0.3)
                except QueueFull:
                    refused += 1
                    assert engine.stats()["submitted"] == submitted
                    break
                submitted += 1
                live[uid] = (prompt, max_tokens, seed)
                got[uid] = []
                stats = engine.stats()
                assert stats["submitted"] - sum(stats["finished"].values()) <= most
        if got and rng.random() < 0.3:
            uid = rng.choice(list(got))
            if engine.cancel(uid):
                cancelled.add(uid)
        for chunk in box.poll(20 if got else 0):
            got[chunk.uid] += chunk.token_ids.tolist()
            assert chunk.num_output_tokens == len(got[chunk.uid])
            if not chunk.finish_reason:
                continue
            ended += 1
            tokens = got.pop(chunk.uid)
            prompt, max_tokens, seed = live[chunk.uid]
            want, _ = expected(prompt, max_tokens, seed, eos=())
            assert tokens == want[: len(tokens)], chunk
            if chunk.finish_reason == "cancelled":
                assert chunk.uid in cancelled
            elif chunk.finish_reason == "eos":
                assert want[len(tokens)] == 0 and 0 not in tokens
            else:
                assert chunk.finish_reason == "length" and len(tokens) == max_tokens
    stats = engine.stats()
    while stats["running"] + stats["waiting"]:
        stats = engine.stats()
    assert (stats["cached_tokens"] > 0) == (stats["cached_pages"] > 0) == (prefix_cache == "on")
    assert stats["free_pages"] == options["pages"] and sum(stats["finished"].values()) == total and stats["error"] == ""
    assert refused > 0
    if shape in ("few pages", "one sequence fits", "many slots"):
        assert stats["preemptions"] > 0
    assert depth == 2 or stats["wasted_rows"] == 0
    engine.close()


def test_cancel_within_one_step():
    engine, box = fake_engine(slots=1, step_us=60_000, queue=4, max_len=256, pages=8), Outbox()
    running = engine.submit([1] * 30, outbox=box, max_tokens=200, ignore_eos=True)
    queued = engine.submit([2], outbox=box, max_tokens=2, ignore_eos=True)
    for uid in (queued, running):
        while engine.stats()["steps"] < 2:
            time.sleep(0.005)
        before = engine.stats()["steps"]
        assert engine.cancel(uid)
        while not any(c.uid == uid and c.finish_reason == "cancelled" for c in box.poll(5)):
            pass
        after = engine.stats()
        assert after["steps"] - before <= 1
    assert after["free_pages"] == 8 and after["running"] == 0
    assert not engine.cancel(running) and not engine.cancel(12345)
    engine.close()


def test_device_never_waits_for_the_host():
    # two steps in flight: the host's work on a step is hidden behind the next one
    engine = fake_engine(slots=4, depth=2, step_us=2000, max_len=256, pages=32)
    start = _native.testing.bubbles(engine._native)
    result = engine.generate([1, 2, 3], max_tokens=200, ignore_eos=True)
    assert result.num_output_tokens == 200
    assert _native.testing.bubbles(engine._native) - start <= 10  # a loaded machine may be late now and then
    assert engine.stats()["wasted_rows"] == 0
    engine.close()


def test_eos_wastes_one_row_at_most():
    engine = fake_engine(depth=2)
    for seed in range(50):
        want, finish = expected([1, 2], 200, seed)
        result = engine.generate([1, 2], max_tokens=200, seed=seed)
        assert result.token_ids.tolist() == want and result.finish_reason == finish
    assert engine.stats()["wasted_rows"] <= 50
    engine.close()
