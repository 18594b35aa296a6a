"""How requests end that do not end by themselves: cancelled, left, with the device or with the engine."""
import gc
import threading
import time

import pytest
from codefuse_triton import DeviceError, Outbox, QueueFull
from codefuse_triton._native import testing
from fake_model import expected, held, wait_taken
from test_engine import PROMPT, drain, slow


def wait_closing(e):
    """Until an engine whose queue is full says that it is closed instead."""
    error = QueueFull()
    while isinstance(error, QueueFull):
        with pytest.raises(RuntimeError) as raised:
            e.submit(PROMPT, outbox=Outbox())
        error = raised.value
    assert "the engine is closed" in str(error)


def test_cancel_in_every_place():
    with slow(slots=1, max_len=256, pages=8, prefill_tokens=4) as e:
        box = Outbox()
        decoding = e.submit(PROMPT, outbox=box, max_tokens=200, ignore_eos=True, seed=2)
        queued = e.submit(PROMPT, outbox=box, max_tokens=10)
        got = []
        while len(got) < 5:
            got += [t for c in box.poll(5) for t in c.token_ids]
        assert e.cancel(queued) and e.cancel(decoding)
        ends = drain(box, [queued, decoding])
        assert ends[queued][-1].finish_reason == "cancelled" and ends[queued][-1].num_output_tokens == 0
        got += [t for c in ends[decoding] for t in c.token_ids]
        assert got == expected(PROMPT, 200, 2, eos=())[0][: len(got)] and ends[decoding][-1].num_output_tokens == len(got)
        before = e.stats()["steps"]
        with held(e):
            prefilling = e.submit([1] * 200, outbox=box, max_tokens=10)
            testing.allow(e._native, 3)
            while e.stats()["steps"] < before + 2:
                time.sleep(0.001)
            assert e.cancel(prefilling)
        (chunk,) = drain(box, [prefilling])[prefilling]
        assert chunk.finish_reason == "cancelled" and chunk.num_output_tokens == 0
        assert not e.cancel(prefilling) and not e.cancel(0)
        stats = e.stats()
        assert stats["free_pages"] == 8 and stats["running"] == 0 and stats["finished"]["cancelled"] == 3


@pytest.mark.parametrize("how", ["close", "with", "del", "break"])
def test_leaving_a_stream_cancels(how):
    with slow() as e:
        stream = e.stream(PROMPT, max_tokens=200, ignore_eos=True)
        if how == "with":
            with stream:
                next(stream)
        elif how == "break":
            for _ in stream:
                break
        else:
            next(stream)
        if how == "close":
            stream.close()
            assert list(stream) == []
        del stream
        gc.collect()
        deadline = time.monotonic() + 2
        while e.stats()["finished"]["cancelled"] == 0 and time.monotonic() < deadline:
            time.sleep(0.002)
        assert e.stats()["finished"]["cancelled"] == 1


@pytest.mark.parametrize("how", ["fail_launch", "fail_collect"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_failing_device_answers_everyone(how, depth):
    with slow(slots=2, queue=4, depth=depth, **{how: 5}) as e:
        box = Outbox()
        uids = [e.submit([i], outbox=box, max_tokens=50, ignore_eos=True) for i in range(1, 6)]
        for chunks in drain(box, uids).values():
            assert chunks[-1].finish_reason == "error" and "fake: " + how[5:] in chunks[-1].error
        with pytest.raises(DeviceError, match="the engine has failed: fake"):
            e.submit(PROMPT, outbox=box)
        assert "fake" in e.stats()["error"] and e.stats()["finished"]["error"] == 5
        assert not e.cancel(uids[0])
        with pytest.raises(DeviceError):
            e.generate(PROMPT)


def test_generate_raises_when_the_device_fails():
    with slow(fail_collect=3) as e, pytest.raises(DeviceError, match="fake: collect failed"):
        e.generate(PROMPT, max_tokens=50, ignore_eos=True)


def test_close_cancels():
    e, box = slow(slots=1), Outbox()
    uids = [e.submit(PROMPT, outbox=box, max_tokens=200, ignore_eos=True) for _ in range(3)]
    e.close()
    assert all(c[-1].finish_reason == "cancelled" for c in drain(box, uids).values())
    with pytest.raises(RuntimeError, match="the engine is closed"):
        e.submit(PROMPT, outbox=box)
    e.close()
    assert not e.cancel(uids[0]) and e.stats()["running"] == 0


def test_close_drains():
    e, box = slow(slots=1, queue=2), Outbox()
    uids = [e.submit(PROMPT, outbox=box, max_tokens=10, ignore_eos=True) for _ in range(3)]
    closer = threading.Thread(target=e.close, args=(20,))
    with held(e):
        closer.start()
        wait_closing(e)
    assert all(c[-1].finish_reason == "length" for c in drain(box, uids).values())
    closer.join(5)
    assert not closer.is_alive()


def test_close_drains_for_so_long():
    e, box = slow(), Outbox()
    uid = e.submit(PROMPT, outbox=box, max_tokens=250, ignore_eos=True)
    start = time.monotonic()
    e.close(0.1)
    assert 0.1 <= time.monotonic() - start < 0.6
    assert drain(box, [uid])[uid][-1].finish_reason == "cancelled"


def test_a_second_close_need_not_wait_for_the_first():
    e, box = slow(step_us=50_000, slots=1, queue=0), Outbox()
    uid = e.submit(PROMPT, outbox=box, max_tokens=250, ignore_eos=True)
    with held(e):
        first = threading.Thread(target=e.close, args=(60,))
        first.start()
        wait_closing(e)
        second = threading.Thread(target=e.close, args=(0.1,))
        second.start()
    second.join(5)
    first.join(5)
    assert not second.is_alive() and not first.is_alive()
    assert drain(box, [uid])[uid][-1].finish_reason == "cancelled"


@pytest.mark.parametrize("how", ["close", "failure"])
def test_requests_that_the_engine_has_not_seen_are_answered(how):
    """Each text of a beam search too."""
    e, box = slow(slots=4, queue=1, fail_launch=0 if how == "failure" else -1), Outbox()
    with held(e):
        uids = [e.submit(PROMPT, outbox=box, max_tokens=9)]
        wait_taken(e)
        uids.append(e.submit(PROMPT, outbox=box, max_tokens=9))
        first = e._native.submit(PROMPT, box, max_tokens=9, beam_width=4, beam_count=3)
        uids += range(first, first + 3)
        closer = threading.Thread(target=e.close)
        if how == "close":
            closer.start()
            wait_closing(e)
    ends = drain(box, uids)
    want = "cancelled" if how == "close" else "error"
    assert [ends[uid][-1].finish_reason for uid in uids] == [want] * 5
    assert e.stats()["finished"][want] == 5
    if how == "close":
        closer.join(5)
    e.close()
