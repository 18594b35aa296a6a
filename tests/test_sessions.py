"""Requests that a newer one of their session makes stale, and deadlines."""
import random
import time

import pytest
from codefuse_triton import Outbox, QueueFull, _native
from fake_model import expected, fake_engine, held, wait_taken


def drain(box, uids, timeout_s=20):
    """uid -> (tokens, last chunk) of requests that are all to end; what comes of others is dropped."""
    tokens, last = {uid: [] for uid in uids}, {}
    until = time.monotonic() + timeout_s
    while len(last) < len(uids):
        assert time.monotonic() < until, "requests did not end"
        for chunk in box.poll(1):
            if chunk.uid not in tokens:
                continue
            tokens[chunk.uid] += chunk.token_ids.tolist()
            if chunk.finish_reason:
                last[chunk.uid] = chunk
    return {uid: (tokens[uid], last[uid]) for uid in uids}


def steps(engine):
    return engine.stats()["steps"]


def wait_steps(engine, count):
    while steps(engine) < count:
        time.sleep(0.002)


@pytest.mark.parametrize("where", ["queue", "prefill", "decode"])
def test_a_newer_one_cancels_within_a_step(where):
    engine, box = fake_engine(slots=1, step_us=20_000, prefill_tokens=16, max_len=256, pages=16), Outbox()
    blocker = engine.submit([9] * 5, outbox=box, max_tokens=200, ignore_eos=True) if where == "queue" else None
    prompt = [3] * (100 if where == "prefill" else 10)
    old = engine.submit(prompt, outbox=box, max_tokens=100, ignore_eos=True, session="s")
    other = engine.submit([4], outbox=box, max_tokens=1, session="t")
    wait_steps(engine, {"queue": 1, "prefill": 3, "decode": 5}[where])
    before = steps(engine)
    new = engine.submit(prompt + [5], outbox=box, max_tokens=3, ignore_eos=True, session="s", seed=1)
    while not any(c.uid == old and c.finish_reason == "cancelled" for c in box.poll(5)):
        pass
    assert steps(engine) - before <= 1
    if blocker:
        engine.cancel(blocker)
    ended = drain(box, [new, other] + [blocker] * (blocker is not None))
    assert ended[new][0] == expected(prompt + [5], 3, 1, eos=())[0] and ended[new][1].finish_reason == "length"
    assert ended[other][1].finish_reason in ("length", "eos")
    cached = ended[new][1].num_cached_tokens
    assert cached == {"queue": 0, "decode": 10}.get(where, cached)
    if where == "prefill":
        assert 32 <= cached < 100  # what had been launched by then
    engine.close()


def test_only_the_last_of_many_survives():
    engine, box = fake_engine(slots=2, step_us=3000, queue=4), Outbox()
    uids = [engine.submit([1, 2] + [3] * i, outbox=box, max_tokens=50, ignore_eos=True, session="s", seed=7) for i in range(40)]  # more than the queue holds
    ended = drain(box, uids)
    assert all(ended[uid][1].finish_reason == "cancelled" for uid in uids[:-1])
    assert ended[uids[-1]][1].finish_reason == "length" and ended[uids[-1]][0] == expected([1, 2] + [3] * 39, 50, 7, eos=())[0]
    assert engine.stats()["finished"]["cancelled"] == 39 and engine.stats()["free_pages"] == engine.stats()["pages"]
    engine.close()


def test_what_the_engine_has_not_seen_is_cancelled_at_once():
    """While a step takes its time requests of a session do not pile up; the last one has the place of the first."""
    with fake_engine(slots=1, queue=3) as engine:
        box, calls = Outbox(), Outbox()
        with held(engine):
            blocker = engine.submit([9], outbox=box, max_tokens=5, ignore_eos=True)
            wait_taken(engine)
            stale = [engine.submit([3], outbox=calls, max_tokens=1, session="s")]
            other = engine.submit([4], outbox=box, max_tokens=1, ignore_eos=True, session="t")
            stale += [engine.submit([3, i % 50], outbox=calls, max_tokens=1, session="s") for i in range(300)]
            last = engine.submit([5], outbox=box, max_tokens=1, ignore_eos=True, session="s")
            ended = drain(calls, stale, 5)
            assert all((tokens, chunk.finish_reason, chunk.index) == ([], "cancelled", 0) for tokens, chunk in ended.values())
            stats = engine.stats()
            assert stats["waiting"] == 2 and stats["finished"]["cancelled"] == 301
            assert not engine.cancel(stale[-1])
        order = []
        while len(order) < 3:
            order += [c.uid for c in box.poll(5) if c.finish_reason]
        assert order == [blocker, last, other]


def test_salts_sessions_and_ended_requests_are_apart():
    engine, box = fake_engine(slots=4, step_us=2000), Outbox()
    done = engine.submit([1], outbox=box, max_tokens=1, session="s")
    drain(box, [done])
    uids = [engine.submit([1], outbox=box, max_tokens=20, ignore_eos=True, session=s, cache_salt=salt)
            for s, salt in (("s", ""), ("s", "a"), ("", ""), ("sa", ""), ("", ""), ("t", ""))]
    assert all(chunk.finish_reason == "length" for _, chunk in drain(box, uids).values())
    engine.close()


def test_a_session_does_not_help_others_past_a_full_queue():
    engine, box = fake_engine(slots=1, step_us=20_000, queue=1, max_len=256, pages=16), Outbox()
    a = engine.submit([1], outbox=box, max_tokens=200, ignore_eos=True, session="a")
    b = engine.submit([2], outbox=box, max_tokens=2, ignore_eos=True, session="b")
    for session in ("c", ""):
        with pytest.raises(QueueFull, match="2 requests are alive; expected at most 2"):
            engine.submit([3], outbox=box, max_tokens=2, session=session)
    c = engine.submit([3], outbox=box, max_tokens=2, ignore_eos=True, session="b")
    with pytest.raises(QueueFull):
        engine.submit([3], outbox=box, max_tokens=2, session="c")
    engine.cancel(a)
    ended = drain(box, [a, b, c])
    assert [ended[uid][1].finish_reason for uid in (a, b, c)] == ["cancelled", "cancelled", "length"]
    engine.close()


def test_answers_of_one_request_stay_together():
    engine, box = fake_engine(slots=4, step_us=3000, queue=4), Outbox()
    old = engine.submit_many([1, 2], 3, outbox=box, max_tokens=60, ignore_eos=True, seed=1, session="s")
    wait_steps(engine, 3)
    new = engine.submit_many([1, 2, 3], 4, outbox=box, max_tokens=10, ignore_eos=True, seed=5, session="s")
    late = engine.submit([1], outbox=box, max_tokens=9, session="s", beside=old[0])  # its request was cancelled meanwhile
    ended = drain(box, old + new + [late])
    assert [ended[uid][1].finish_reason for uid in old + new + [late]] == ["cancelled"] * 3 + ["length"] * 4 + ["cancelled"]
    assert [ended[uid][0] for uid in new] == [expected([1, 2, 3], 10, 5 + i, eos=())[0] for i in range(4)]
    # the first has ended before the second comes
    first = engine.submit([1], outbox=box, max_tokens=1, ignore_eos=True, session="s")
    drain(box, [first])
    second = engine.submit([1], outbox=box, max_tokens=9, ignore_eos=True, session="s", beside=first)
    third = engine.submit([1], outbox=box, max_tokens=9, ignore_eos=True, session="s", beside=first)
    assert [c.finish_reason for _, c in drain(box, [second, third]).values()] == ["length"] * 2
    engine.close()


def test_place_in_the_queue_is_kept():
    s = _native.testing.Scheduler(slots=1, rows=17, prefill_rows=16, max_len=64, pages=8, reuse="none")
    for uid in (1, 2, 3):
        s.add(uid, [uid], 3)
    s.schedule()
    s.add(4, [4], 1, ahead_of=2)
    s.add(5, [5], 1, ahead_of=4)  # 4 was made stale before it was seen
    s.add(6, [6], 1, ahead_of=1)  # 1 has run: 6 is last
    s.add(7, [7], 1, ahead_of=99)
    for stale in (1, 2, 4):
        s.remove(stale)
    order = []
    while (step := s.schedule()) is not None:
        order += [uid for uid, _ in step["admitted"]]
        for uid in step["sampled"]:
            s.accept(uid, 1)
    assert order == [5, 3, 6, 7]


def test_deadline():
    engine, box = fake_engine(slots=1, step_us=10_000, prefill_tokens=4, max_len=256, pages=16), Outbox()
    running = engine.submit([1] * 4, outbox=box, max_tokens=100, ignore_eos=True, deadline_ms=400)  # its first token is in time
    late = engine.submit([2], outbox=box, max_tokens=5, deadline_ms=100)
    started = time.monotonic()
    ended = drain(box, [late])
    assert 0.09 < time.monotonic() - started < 0.5
    assert ended[late][0] == [] and ended[late][1].finish_reason == "deadline" and ended[late][1].queue_s > 0.09
    assert drain(box, [running])[running][1].finish_reason == "length"
    # a prompt that is half computed
    half = engine.submit([3] * 200, outbox=box, max_tokens=5, deadline_ms=100)
    chunk = drain(box, [half])[half][1]
    assert chunk.finish_reason == "deadline" and chunk.queue_s < 0.09 < chunk.prefill_s
    again = engine.generate([3] * 200, max_tokens=1)
    assert again.num_cached_tokens > 0
    assert engine.stats()["finished"]["deadline"] == 2 and engine.stats()["free_pages"] == 16
    engine.close()


def test_bad_values_are_refused():
    engine, box = fake_engine(), Outbox()
    for options, message in ((dict(session="x" * 257), "session has 257 bytes; expected at most 256"), (dict(deadline_ms=-1), "deadline_ms is -1; expected 0"),
                             (dict(deadline_ms=2**31), f"deadline_ms is {2**31}; expected less than"), (dict(session="\ud800"), "session has a lone surrogate")):
        with pytest.raises(ValueError, match=message):
            engine.submit([1], outbox=box, **options)
    assert engine.stats()["refused"] == 2  # the other two never reached it
    engine.close()


@pytest.mark.parametrize("depth", [1, 2])
def test_random_sessions(depth):
    """Every request ends once, survivors with their own text, no page and no session is left."""
    rng = random.Random(depth)
    engine, box = fake_engine(depth=depth, slots=4, prefill_tokens=16, pages=12, max_len=160, queue=6, step_us=500), Outbox()
    typed = {s: [rng.randrange(64)] for s in range(6)}
    live, ended, got = {}, {}, {}
    for _ in range(600):
        s = rng.randrange(6)
        typed[s] = (typed[s] + [rng.randrange(64)])[-100:] if rng.random() < 0.8 else typed[s][: max(1, len(typed[s]) - 3)]
        deadline = rng.choice([0, 0, 0, 1])
        try:
            uid = engine.submit(typed[s], outbox=box, max_tokens=20, seed=s, session=str(s), deadline_ms=deadline)
        except QueueFull:
            raise AssertionError("six sessions fit four slots and a queue of six") from None
        live[uid], got[uid] = (list(typed[s]), s, deadline), []
        if rng.random() < 0.1:
            engine.cancel(rng.choice(list(live)))
        for chunk in box.poll(rng.choice([0, 0.001, 0.01])):
            got[chunk.uid] += chunk.token_ids.tolist()
            if chunk.finish_reason:
                assert chunk.uid not in ended
                ended[chunk.uid] = chunk
    for uid, (tokens, chunk) in drain(box, [u for u in live if u not in ended]).items():
        got[uid] += tokens
        ended[uid] = chunk
    reasons = set()
    for uid, (prompt, s, deadline) in live.items():
        want, finish = expected(prompt, 20, s)
        reason = ended[uid].finish_reason
        reasons.add(reason)
        assert reason in (finish, "cancelled", "deadline") and (reason != "deadline" or deadline and got[uid] == [])
        assert got[uid] == want if reason == finish else got[uid] == want[: len(got[uid])]
    assert {"cancelled", "deadline"} < reasons
    stats = engine.stats()
    assert stats["running"] == stats["waiting"] == 0 and stats["free_pages"] == 12 and sum(stats["finished"].values()) == 600
    engine.close()
