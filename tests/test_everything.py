"""Requests with every option at once, cancelled, superseded, too late, preempted, with a device that may fail: each text ends once, nothing
is left behind, and what ended by itself is what it is alone."""

import contextlib
import random
import time

import pytest
from codefuse_triton import DeviceError, Outbox, QueueFull
from fake_model import fake_engine, held

TABLE = [b"", *(bytes([97 + i]) for i in range(26)), *(bytes([97 + i, 97 + j]) for i in range(4) for j in range(4)), b"\xc3", b"\xa9", b" ", b"\n", b"(", b")"]
LONGEST = 128
BY_ITSELF = ("eos", "stop", "length")
FROM_OUTSIDE = ("session", "deadline_ms", "max_time_ms")  # what others and the clock have to do with


def spelled(rng: random.Random, typed: bytes) -> list[int]:
    ids = []
    while typed:
        n = rng.randint(1, min(2, len(typed)))
        ids.append(TABLE.index(typed[:n]))
        typed = typed[n:]
    return ids


def request(rng: random.Random) -> dict:
    """Options of the native submit(), prompt among them; a few do not go together."""
    prompt = [rng.randrange(len(TABLE)) for _ in range(rng.choice([1, 3, 20, 33, 40, 60]))] if rng.random() < 0.6 else [5] * rng.randint(1, 70)
    most = rng.randint(1, 59)
    options = dict(prompt=prompt, max_tokens=most, seed=rng.randrange(5), stream=rng.random() < 0.7)
    typed = bytes(rng.choices(b"abcd", k=rng.randint(1, 7)))
    for chance, more in (
        (0.2, dict(session=rng.choice([b"a", b"b", b"c"]))), (0.2, dict(cache_salt=b"x")), (0.2, dict(deadline_ms=rng.choice([1, 5, 50]))),
        (0.2, dict(max_time_ms=rng.choice([1, 5, 50]))), (0.3, dict(temperature=1.0)), (0.3, dict(eos_ids=[0, 7])),
        (0.3, dict(stop=rng.sample([b"aa", b"b(", b"\xc3\xa9", b"zz"], 2), include_stop=rng.random() < 0.5)),
        (0.2, dict(stop_at=rng.sample(["line", "block", "bracket", "suffix", "repetition"], 2), before=b"x = (a", after=b"b)")),
        (0.2, dict(bad_words=rng.sample([b"ab", b"abc", b"\xc3", b"d"], 2))), (0.2, dict(repetition_penalty=1.3)), (0.2, dict(frequency_penalty=0.5)),
        (0.2, dict(min_tokens=rng.randint(0, most))), (0.2, dict(logit_bias=[(3, 2.0), (9, -float("inf"))])), (0.2, dict(logprobs=True, top_logprobs=rng.randrange(5))),
        (0.2, dict(prefix_bytes=typed, prefix_ids=spelled(rng, typed) if rng.random() < 0.6 else [], include_typed=rng.random() < 0.5)),
        (0.15, dict(beam_width=(width := rng.randint(2, 8)), beam_count=rng.randint(1, width), early_stopping=rng.random() < 0.5)),
    ):
        if rng.random() < chance:
            options |= more
    return options


class Text:
    """What came of one text of a request."""

    def __init__(self, options: dict, number: int):
        self.options, self.number = options, number
        self.ids, self.text, self.chunks, self.last = [], b"", 0, None

    def add(self, chunk) -> None:
        assert self.last is None and chunk.index == self.chunks
        self.ids += chunk.token_ids.tolist()
        self.text += chunk.text
        self.chunks += 1
        if not chunk.finish_reason:
            return
        self.last = chunk
        assert self.options["stream"] or self.chunks == 1
        assert (chunk.finish_reason == "error") == bool(chunk.error)
        assert "prefix_bytes" in self.options or chunk.num_output_tokens == len(self.ids)

    def result(self) -> tuple:
        return self.ids, self.text, self.last.finish_reason, self.last.stop_reason, self.last.num_output_tokens


def read(box: Outbox, texts: dict[int, Text], timeout_s: float) -> None:
    for chunk in box.poll(timeout_s):
        texts[chunk.uid].add(chunk)


def submit(engine, box: Outbox, options: dict, beside: int = 0) -> dict[int, Text]:
    uid = engine._native.submit(outbox=box, beside=beside, **options)
    return {uid + i: Text(options, i) for i in range(options.get("beam_count", 1))}


@pytest.mark.parametrize("seed", range(12))
def test_everything_at_once(seed):
    rng = random.Random(seed)
    model = dict(vocab=len(TABLE), token_bytes=TABLE, never_text=rng.choice([[], [3, 4]]), max_len=LONGEST, rows_alike=seed % 2 == 0)
    fails = {rng.choice(["fail_launch", "fail_collect"]): rng.randint(5, 200)} if seed % 4 == 3 else {}
    engine = fake_engine(**model, **fails, slots=rng.choice([1, 2, 4, 8, 40]), prefill_tokens=rng.choice([1, 3, 16, 64]), queue=rng.choice([3, 16, 60]),
                         pages=rng.choice([4, 5, 8, 20, 60]), depth=1 + seed % 3 % 2, prefix_cache=rng.choice(["on", "off", "generated"]))
    box, texts, failed = Outbox(), {}, False
    until = time.monotonic() + 0.7
    while not failed and time.monotonic() < until:
        with held(engine) if rng.random() < 0.05 else contextlib.nullcontext():
            for _ in range(rng.randrange(1, 20)):
                options, first = request(rng), 0
                try:
                    for _ in range(rng.choice([1, 1, 1, 3])):  # several answers
                        more = submit(engine, box, options, first)
                        first = first or min(more)
                        texts |= more
                except QueueFull:
                    break
                except DeviceError:
                    failed = True
                    break
                except ValueError:
                    pass
            for uid, text in texts.items():
                if text.last is None and rng.random() < 0.05:
                    engine.cancel(uid)
        read(box, texts, rng.choice([0, 0, 0.001, 0.01]))
    engine.close(rng.choice([0, 5]))
    while any(text.last is None for text in texts.values()):
        waiting = sum(text.chunks for text in texts.values())
        read(box, texts, 5)
        assert sum(text.chunks for text in texts.values()) > waiting, "a text has no end"
    stats = engine.stats()
    assert stats["error"] or stats["free_pages"] == stats["pages"] and stats["running"] + stats["waiting"] == 0
    assert bool(stats["error"]) <= bool(fails) and sum(stats["finished"].values()) == len(texts) > 0
    if not model["rows_alike"]:
        return  # what rows of prompts and of generated tokens have in common depends on the company
    ended = [text for text in texts.values() if text.last.finish_reason in BY_ITSELF]
    with fake_engine(**model, slots=1, pages=60, depth=1, prefix_cache="off", prefill_tokens=64) as engine:
        for text in rng.sample(ended, min(len(ended), 30)):
            box = Outbox()
            alone = submit(engine, box, {k: v for k, v in text.options.items() if k not in FROM_OUTSIDE})
            while any(t.last is None for t in alone.values()):
                read(box, alone, 5)
            assert list(alone.values())[text.number].result() == text.result(), text.options
