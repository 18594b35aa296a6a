"""Continuous batching: the scheduler step by step."""

import pytest
from codefuse_triton import Outbox, _native
from fake_model import fake_engine, held

PAGE = 32


def make(slots=2, rows=20, prefill_rows=16, max_len=256, pages=8, reuse="none", short_prompt=0):
    return _native.testing.Scheduler(slots=slots, rows=rows, prefill_rows=prefill_rows, max_len=max_len, pages=pages, reuse=reuse,
                                     short_prompt=short_prompt)


def run(scheduler, steps, token=5):
    """Steps whose results are known before the next one."""
    out = []
    for _ in range(steps):
        step = scheduler.schedule()
        out.append(step)
        for uid in step["sampled"] if step else []:
            scheduler.accept(uid, token)
    return out


def test_pages_are_counted():
    pages = _native.testing.KvPages(2)
    a, b = pages.take(), pages.take()
    assert {a, b} == {0, 1} and pages.take() == -1
    pages.share(a)
    pages.release(a)
    assert pages.free == 0 and pages.references(a) == 1
    pages.release(a)
    assert pages.free == 1 and pages.take() == a
    pages.release(b)
    with pytest.raises(RuntimeError):
        pages.release(b)
    with pytest.raises(RuntimeError):
        pages.share(b)


def test_kept_pages_wait_for_their_next_use():
    pages = _native.testing.KvPages(2)
    a, b = pages.take(), pages.take()
    pages.keep(a)
    pages.release(a)
    assert (pages.free, pages.idle, pages.references(a)) == (0, 1, 0)
    pages.share(a)
    assert (pages.free, pages.idle, pages.references(a)) == (0, 0, 1)
    pages.drop(a)  # in use: free when it is released
    assert pages.free == 0
    pages.release(a)
    assert (pages.free, pages.idle) == (1, 0)
    pages.keep(b)
    pages.release(b)
    pages.drop(b)
    assert (pages.free, pages.idle) == (2, 0)
    for wrong in (pages.keep, pages.drop):
        with pytest.raises(RuntimeError):
            wrong(b)


def test_prompt_in_chunks_then_decode():
    s = make()
    s.add(1, list(range(40)), 3)
    a, b, c, d, e = run(s, 5)
    assert [x["chunks"] for x in (a, b, c)] == [[(0, 16, 0, 0)], [(0, 16, 0, 16)], [(0, 8, 0, 32)]]
    assert a["token"] == list(range(16)) and c["position"] == list(range(32, 40))
    assert a["admitted"] == [(1, 0)] and b["admitted"] == []
    assert [x["sampled"] for x in (a, b, c)] == [[], [], [1]] and c["logit_row"] == [7]
    assert d["decode_rows"] == 1 and d["token"] == [5] and d["position"] == [40] and d["chunks"] == []
    assert e["position"] == [41] and s.schedule() is None
    assert s.running == 0 and s.free_pages == 8


def test_short_prompt_runs_as_decode_rows():
    s = make(rows=40, short_prompt=8)
    s.add(1, list(range(8)), 3)
    s.add(2, list(range(9)), 3)
    a, b = run(s, 2)
    assert a["decode_rows"] == 8 and a["token"][:8] == list(range(8)) and a["position"][:8] == list(range(8))
    assert a["chunks"] == [(8, 9, 1, 0)] and a["sampled"] == [1, 2] and a["logit_row"] == [7, 16]
    assert b["decode_rows"] == 2 and b["position"] == [8, 9] and b["chunks"] == []


def test_short_prompt_waits_for_rows():
    s = make(slots=4, rows=8, prefill_rows=4, short_prompt=6)
    s.add(1, list(range(6)), 2)
    s.add(2, list(range(6)), 2)
    a, b = run(s, 2)
    assert a["decode_rows"] == 6 and a["sampled"] == [1]  # the backlog of one step is full
    assert b["decode_rows"] == 7 and b["position"] == [6, *range(6)] and b["sampled"] == [1, 2]


def test_short_prompts_share_pages_with_each_other():
    s = make(rows=80, prefill_rows=70, reuse="same rows", short_prompt=40)
    for uid, n in ((1, 40), (2, 40), (3, 50)):  # the third runs as prefill rows: none of the others' rows are its
        s.add(uid, list(range(n)), 1)
        (step,) = run(s, 1)
        assert step["admitted"] == [(uid, 39 if uid == 2 else 0)]
        assert step["decode_rows"] == (40, 1, 0)[uid - 1]


def test_prefill_and_decode_share_a_step():
    s = make()
    s.add(1, [1, 2, 3], 10)
    run(s, 1)
    s.add(2, list(range(30)), 10)
    step = s.schedule()
    assert step["decode_rows"] == 1 and step["chunks"] == [(1, 16, 1, 0)]
    assert step["slot"] == [0] + [1] * 16 and sorted(step["table_slot"]) == [0, 1]
    assert step["sampled"] == [1]


def test_row_budget_is_shared_by_prompts_in_order():
    s = make(slots=3, rows=19)
    for uid in (1, 2, 3):
        s.add(uid, list(range(10)), 5)
    step = s.schedule()
    assert step["chunks"] == [(0, 10, 0, 0), (10, 6, 1, 0)]
    assert s.running == 2 and s.waiting == 1  # the third would get no row
    step = s.schedule()
    assert step["decode_rows"] == 1 and [c[1:] for c in step["chunks"]] == [(4, 1, 6), (10, 2, 0)]


def test_last_token_stays_on_the_device():
    s = make()
    s.add(1, [7], 4)
    first, second = s.schedule(), s.schedule()
    assert second["token"] == [-1] and second["position"] == [1]
    assert s.accept(1, 9)
    third = s.schedule()
    assert third["token"] == [-1] and third["position"] == [2]
    assert s.accept(1, 8)
    fourth = s.schedule()
    assert fourth["position"] == [3] and first["sampled"] == fourth["sampled"] == [1]
    assert s.schedule() is None  # max_tokens is known in advance: no row is wasted
    assert s.free_pages == 8


def test_youngest_is_preempted_and_resumes_first():
    s = make(slots=3, rows=30, pages=4)
    s.add(1, list(range(30)), 60)
    s.add(2, list(range(30)), 60)
    s.add(3, [1], 2)
    run(s, 8)  # both prompts, then a page each for what follows
    assert (s.running, s.waiting, s.preemptions) == (2, 1, 0) and s.free_pages == 0
    run(s, 28)
    before = s.preemptions
    run(s, 4)
    assert s.preemptions == before + 1 and s.running == 1 and s.waiting == 2
    steps = run(s, 60)
    resumed = [x for x in steps if x and any(c[3] == 0 and c[1] > 1 for c in x["chunks"])]
    assert len(resumed) == 1 and resumed[0]["admitted"] == []
    again = steps[steps.index(resumed[0]) + 2]
    assert again["decode_rows"] > 1 and again["position"][0] == 30  # generated tokens come back as decode rows, many at once


def test_resumed_sequence_equals_the_first_run():
    s = make(slots=2, rows=34, prefill_rows=32, pages=3)
    s.add(1, list(range(20)), 70)
    s.add(2, list(range(100, 120)), 20)
    token, kinds = {1: 1000, 2: 2000}, {1: {}, 2: {}}
    for _ in range(200):
        step = s.schedule()
        if step is None:
            break
        for row, (t, p) in enumerate(zip(step["token"], step["position"])):
            uid = 1 if t < 100 or 1000 <= t < 2000 else 2
            kind = row < step["decode_rows"]
            assert kinds[uid].setdefault(p, (t, kind)) == (t, kind)
        for uid in step["sampled"]:
            s.accept(uid, token[uid])
            token[uid] += 1
    assert s.preemptions > 0 and token == {1: 1070, 2: 2020} and s.free_pages == 3


@pytest.mark.parametrize("when", ["queue", "prefill", "decode", "in flight", "preempted"])
def test_remove_frees_at_once(when):
    s = make(slots=2, pages=3)
    s.add(1, list(range(20)), 76)
    s.add(2, list(range(20)), 20)
    s.add(3, list(range(20)), 20)
    if when == "queue":
        run(s, 1)
        s.remove(3)
        assert s.waiting == 1
    elif when == "prefill":
        run(s, 2)
        assert s.running == 2
    elif when == "decode":
        run(s, 6)
    elif when == "in flight":
        s.schedule(), s.schedule(), s.schedule()
        s.remove(2)
        assert s.accept(2, 1) is False
    else:
        run(s, 18)
        assert s.preemptions == 1
    for uid in (1, 2, 3):
        s.remove(uid)
    assert (s.running, s.waiting, s.free_pages) == (0, 0, 3)
    assert s.schedule() is None


def test_a_sequence_that_waits_runs_one_step_at_a_time():
    s = make(slots=3, pages=12)
    s.add(1, [7], 9, waiting=3)
    s.add(2, [8], 9)
    s.add(3, [9], 9, waiting=0)
    first = s.schedule()
    assert first["sampled"] == [1, 2, 3]
    # edits (token number, tokens known), the mask of what is known only while it waits
    assert first["edit_begin"] == [0, 1, 1, 2] and first["edits"] == [(0, 0.0, 1.0), (0, 0.0, 1.0)]
    assert first["mask_of"] == [0, -1, -1] and first["masks"] == [1, 0]
    second = s.schedule()
    assert second["sampled"] == [2, 3] and second["token"] == [-1, -1]
    assert second["edit_begin"] == [0, 0, 1] and second["edits"] == [(1, 0.0, 1.0)] and second["mask_of"] == second["masks"] == []
    for uid in (1, 2, 3):
        assert s.accept(uid, 20 + uid)
    third = s.schedule()
    assert third["sampled"] == [1, 2, 3] and third["token"] == [21, -1, -1]
    assert third["edits"] == [(1, 1.0, 1.0), (2, 1.0, 1.0)] and third["mask_of"] == [0, -1, -1] and third["masks"] == [2, 0]
    for uid in (2, 3, 1, 2, 3):
        s.accept(uid, 30 + uid)
    assert s.schedule()["sampled"] == [1, 2, 3]
    assert s.schedule()["sampled"] == [2, 3]
    s.accept(1, 41)  # three are known: it waits no longer
    assert s.schedule()["sampled"] == [1, 2, 3]
    last = s.schedule()
    assert last["sampled"] == [1, 2, 3] and last["token"][0] == -1 and last["edits"][0] == (4, 3.0, 1.0)


@pytest.mark.parametrize("others", [0, 1, 7, 8])
def test_a_step_is_not_worth_it_when_one_in_eight_waits(others):
    s = make(slots=10, rows=30, pages=40)
    for uid in range(others + 1):
        s.add(uid, [7], 9, waiting=5 if uid == 0 else -1)
    assert not s.needs_results  # nothing decodes
    s.schedule()
    assert s.needs_results == (others < 8)
    for uid in range(others + 1):
        s.accept(uid, 1)
    assert not s.needs_results


@pytest.mark.parametrize("others", [1, 12])
def test_waiting_sequences_run_at_full_speed_unless_they_are_few(others):
    """The one that waits ends after as many steps as it has tokens, or is half way there when the others have ended."""
    with fake_engine(slots=16, depth=2, max_len=256, pages=128, queue=32) as engine:
        box = Outbox()
        with held(engine):
            left = {engine.submit([1, i], outbox=box, max_tokens=100, ignore_eos=True, stream=False, presence_penalty=1.0 if i == 0 else 0.0)
                    for i in range(others + 1)}
        while left:
            left -= {c.uid for c in box.poll(10)}
        steps = 100 if others == 1 else 150
        assert abs(engine.stats()["steps"] - steps) <= 3


def test_only_waiting_sequences_wait_for_results():
    s = make(pages=12)
    s.add(1, [7], 3, waiting=9)
    assert s.schedule()["sampled"] == [1] and s.schedule() is None
    s.accept(1, 5)
    assert s.schedule()["sampled"] == [1] and s.schedule() is None


def test_slots_and_rows_are_checked():
    with pytest.raises(ValueError, match="slots is 65; expected 1..64"):
        make(slots=65, rows=100)
    with pytest.raises(ValueError, match="prefill rows are 16 of 2 rows"):
        make(slots=2, rows=2)
