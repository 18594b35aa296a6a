"""Completions that begin with typed bytes: through the engine with a fake device, then with the demo model."""
import contextlib
import random
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from codefuse_triton import Engine, Outbox, devices
from codefuse_triton.prompt import Prompt
from fake_model import fake_engine, held

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "tools" / "demo" / "checkpoint"
sys.path.insert(0, str(ROOT / "tools"))
import convert  # noqa: E402

PROMPT = [5, 6, 7]
ABCD = [bytes([c]) for c in b"abcd"]
TABLE = [b"", *(bytes([97 + i]) for i in range(26)), *(a + b for a in ABCD for b in ABCD), *(a + b + c for a in ABCD for b in ABCD for c in ABCD[:2])]


def engine(**options) -> Engine:
    return fake_engine(**{"vocab": len(TABLE), "token_bytes": TABLE, **options})


def texts(tokens) -> bytes:
    return b"".join(TABLE[t] for t in tokens)


@pytest.mark.parametrize("depth", [1, 2])
def test_output_continues_the_typed_bytes(depth):
    rng = random.Random(3)
    with engine(depth=depth) as e:
        for seed in range(60):
            typed = bytes(rng.choices(b"abcd", k=rng.randint(1, 7)))
            whole = e.generate(PROMPT, prefix_bytes=typed, max_tokens=12, seed=seed, ignore_eos=True, include_typed=True, logprobs=True)
            assert whole.text.encode().startswith(typed) and whole.finish_reason == "length"
            new = e.generate(PROMPT, prefix_bytes=typed, max_tokens=12, seed=seed, ignore_eos=True, logprobs=True)
            assert new.text.encode() == whole.text.encode()[len(typed):]
            # the same tokens, less those that lie wholly in the typed bytes, which do not count
            tokens = whole.token_ids.tolist()
            ends = np.cumsum([len(TABLE[t]) for t in tokens])
            early = int((ends <= len(typed)).sum())
            assert new.token_ids.tolist() == tokens[early:] and len(tokens) == 12 + early
            assert new.num_output_tokens == whole.num_output_tokens == 12 == len(new.logprobs)
            assert new.logprobs.tolist() == whole.logprobs.tolist()[early:]
            assert new.cum_logprob == pytest.approx(new.logprobs.sum())
            assert new.num_input_tokens == len(PROMPT)
            chunks = list(e.stream(PROMPT, prefix_bytes=typed, max_tokens=12, seed=seed, ignore_eos=True))
            assert b"".join(c.text for c in chunks) == new.text.encode()
            for c in chunks:
                assert texts(c.token_ids)[c.text_start:c.text_start + c.text_bytes] == c.text
            assert [c.text_start for c in chunks[1:]] == [0] * (len(chunks) - 1)
            assert chunks[-1].num_output_tokens == 12
        assert e.stats()["free_pages"] == e.stats()["pages"]


def test_first_tokens_are_not_waited_for():
    """A typed piece costs steps only for tokens that lie wholly in it."""
    with engine(depth=2) as e:
        for seed in range(20):
            before = e.stats()["steps"]
            r = e.generate(PROMPT, prefix_bytes=b"abca", max_tokens=10, seed=seed, ignore_eos=True, include_typed=True)
            early = len(r.token_ids) - 10
            assert e.stats()["steps"] - before == 10 + early  # no wasted step at the end either
            assert e.stats()["wasted_rows"] == 0


def guessed(seed):
    """A prompt that gives back tokens: the guess is right to the end, in part, or wrong at once. Without it, what comes."""
    rng = random.Random(seed)
    with engine(rows_alike=True) as e:
        typed = bytes(rng.choices(b"abcd", k=rng.randint(1, 6)))
        plain = Prompt(rng.choices(range(1, 60), k=rng.randint(1, 60)), typed)
        options = dict(max_tokens=rng.randint(1, 20), seed=seed, ignore_eos=seed % 3 > 0, min_tokens=seed % 2, logprobs=True)
        want = e.generate(plain, include_typed=True, **options)
    early = [int(t) for t, end in zip(want.token_ids, np.cumsum([len(TABLE[t]) for t in want.token_ids])) if end <= len(typed)]
    right = early[: rng.randint(0, len(early))]
    rest = typed[len(texts(right)):]
    return Prompt(plain.ids, typed, [*right, *(TABLE.index(bytes([b])) for b in rest)]), options, want


@pytest.mark.parametrize("options", [dict(depth=1), dict(depth=2), dict(depth=2, prefill_tokens=7), dict(slots=60), dict(prefill_tokens=2)], ids=str)
def test_guesses_change_nothing_but_the_steps(options):
    saved = 0
    for seed in range(60):
        prompt, sampling, want = guessed(seed)
        with engine(rows_alike=True, **options) as e:
            got = e.generate(prompt, include_typed=True, **sampling)
            stats = e.stats()
        assert (got.token_ids.tolist(), got.text, got.finish_reason) == (want.token_ids.tolist(), want.text, want.finish_reason), prompt
        assert got.logprobs.tolist() == want.logprobs.tolist() and got.num_output_tokens == want.num_output_tokens
        assert got.num_input_tokens == len(prompt.ids) + len(prompt.typed_ids)
        assert stats["free_pages"] == stats["pages"]
        if options == dict(depth=1) and got.finish_reason == "length":
            right = next((i for i, (a, b) in enumerate(zip(prompt.typed_ids, got.token_ids)) if a != b), len(prompt.typed_ids))
            rows = len(prompt.ids) + len(prompt.typed_ids)
            assert stats["steps"] <= -(-rows // 16) + (rows > 16) + len(got.token_ids) - 1 - right  # one more where what is sampled did not fit
            saved += right
    assert saved > 20 or options != dict(depth=1)


def test_guesses_in_company():
    """With others, preempted, cancelled, from the prefix cache: every text is what it is alone."""
    many = [guessed(seed) for seed in range(80)]
    for options in (dict(slots=8), dict(slots=8, depth=2, pages=5, max_len=128), dict(slots=50, pages=64, prefill_tokens=64), dict(slots=3, depth=2, rows_alike=False)):
        with engine(**{"rows_alike": True, "queue": 200, **options}) as e:
            box = Outbox()
            with held(e):
                uids = [e.submit(p, outbox=box, include_typed=True, **o) for p, o, _ in many for _ in range(2)]
            for uid in uids[5::9]:
                e.cancel(uid)
            got = {u: [[], None] for u in uids}
            while any(last is None for _, last in got.values()):
                for c in box.poll(20):
                    got[c.uid][0] += c.token_ids.tolist()
                    got[c.uid][1] = c if c.finish_reason else None
            twins = {}
            for i, uid in enumerate(uids):
                tokens, last = got[uid]
                want = many[i // 2][2].token_ids.tolist()
                if not options.get("rows_alike", True):  # rows of prompts and of generated tokens differ: only the two copies are alike
                    want = tokens if last.finish_reason == "cancelled" else twins.setdefault(i // 2, tokens)
                assert tokens == (want[: len(tokens)] if last.finish_reason == "cancelled" else want)
            assert e.stats()["free_pages"] == e.stats()["pages"]
            assert options.get("pages") != 5 or e.stats()["preemptions"] > 0


def test_guesses_are_left_out_where_rules_need_every_token():
    guess = Prompt(PROMPT, b"ab", [TABLE.index(b"a"), TABLE.index(b"b")])
    for sampling in (dict(repetition_penalty=1.5), dict(bad_words=["zzz"])):
        with engine() as e:
            without = e.generate(Prompt(PROMPT, b"ab"), max_tokens=9, seed=1, ignore_eos=True, **sampling)
            assert e.generate(guess, max_tokens=9, seed=1, ignore_eos=True, **sampling).text == without.text
            assert e.stats()["wasted_rows"] == 0


def test_typed_bytes_never_end_the_text():
    with engine() as e:
        for seed in range(30):
            r = e.generate(PROMPT, prefix_bytes=b"abab", stop=[b"ab"], max_tokens=8, seed=seed, include_typed=True, eos_ids=[0, 1, 2])
            assert r.text.startswith("abab") and "ab" not in r.text[4:]


def test_stops_at_the_typed_bytes_end():
    with engine() as e:
        free = e.generate(PROMPT, prefix_bytes=b"ab", max_tokens=30, seed=2, ignore_eos=True)
        stop = free.text[3:5]
        cut = e.generate(PROMPT, prefix_bytes=b"ab", max_tokens=30, seed=2, ignore_eos=True, stop=[stop])
        assert (cut.text, cut.stop_reason) == (free.text[:free.text.index(stop)], stop)


def test_what_cannot_be_spelled_is_refused():
    with engine() as e:
        with pytest.raises(ValueError, match="prefix_bytes has 2 bytes; expected what tokens of this model spell"):
            e.generate(PROMPT, prefix_bytes=b"A!")
        with pytest.raises(ValueError, match="prefix_bytes has 2000 bytes; expected at most 1024"):
            e.generate(PROMPT, prefix_bytes=b"a" * 2000)
        with pytest.raises(ValueError, match="prefix_ids are 2 tokens of other bytes than prefix_bytes"):
            e.generate(Prompt(PROMPT, b"ab", [1, 1]))
        for ids in ([-5, 1], [10**6, 1], [0, 1]):  # the last one stands for nothing
            with pytest.raises(ValueError, match=rf"prefix_ids\[0\] is {ids[0]}; expected a token"):
                e.generate(Prompt(PROMPT, b"ab", ids))
        with pytest.raises(ValueError, match="prefix_bytes is 2 bytes; with beam_width above 1 expected none"):
            e.generate(PROMPT, prefix_bytes=b"ab", beam_width=2)
        with pytest.raises(ValueError, match="prefix_bytes is given beside a prompt that is text"):
            e.generate("text", prefix_bytes=b"a")
        assert e.stats()["submitted"] == 0
    with fake_engine(token_bytes=[]) as e, pytest.raises(ValueError, match="prefix_bytes has 1 bytes"):
        e.generate(PROMPT, prefix_bytes=b"a")


def test_tokens_that_are_no_text_are_not_taken():
    marks = [i for i, t in enumerate(TABLE) if len(t) == 3]
    with engine(never_text=marks) as e:
        for seed in range(20):
            r = e.generate(PROMPT, prefix_bytes=b"abc", max_tokens=4, seed=seed, ignore_eos=True, include_typed=True)
            early = r.token_ids[: len(r.token_ids) - 4].tolist()
            assert r.text.startswith("abc") and not set(early) & set(marks)


def test_room_for_the_text_is_the_prompts():
    """With typed bytes a request is admitted when the plain prompt would be; long spellings end it at the sequence's limit."""
    with engine(max_len=64, pages=2) as e:
        for seed in range(10):
            r = e.generate(PROMPT, prefix_bytes=b"abcabcabc", max_tokens=61, seed=seed, ignore_eos=True, include_typed=True)
            assert r.finish_reason == "length" and 3 + len(r.token_ids) <= 64 and r.text.startswith("abcabcabc")
        with pytest.raises(ValueError, match="max_tokens is 62; expected at most 61"):
            e.generate(PROMPT, prefix_bytes=b"abc", max_tokens=62)


def test_mixed_with_others_in_every_way():
    """The same text alone and in a crowd of constrained and plain requests, preempted and not, at both depths."""
    rng = random.Random(8)
    requests = []
    for i in range(40):
        typed = bytes(rng.choices(b"abcd", k=rng.randint(1, 6))) if i % 3 else b""
        requests.append((rng.choices(range(1, 60), k=rng.randint(1, 40)),
                         dict(prefix_bytes=typed, max_tokens=rng.randint(1, 70), seed=i, ignore_eos=i % 2 == 1, temperature=float(i % 2), stop=[b"zz"] if i % 4 == 0 else [],
                              include_typed=i % 5 == 0, logprobs=i % 2 == 0)))
    with engine(slots=1, max_len=128) as e:
        alone = [e.generate(p, **o) for p, o in requests]
    for options in (dict(depth=1), dict(depth=2), dict(depth=2, pages=5)):
        with engine(slots=8, queue=64, max_len=128, **options) as e:
            box = Outbox()
            with held(e):
                uids = [e.submit(p, outbox=box, **o) for p, o in requests]
            got = {u: [b"", [], None] for u in uids}
            while any(g[2] is None for g in got.values()):
                for c in box.poll(20):
                    got[c.uid][0] += c.text
                    got[c.uid][1] += c.token_ids.tolist()
                    got[c.uid][2] = c if c.finish_reason else None
            for uid, want in zip(uids, alone):
                text, tokens, last = got[uid]
                assert (text.decode(), tokens, last.finish_reason, last.num_output_tokens) == (
                    want.text, want.token_ids.tolist(), want.finish_reason, want.num_output_tokens)
            assert "pages" not in options or e.stats()["preemptions"] > 0


def test_time_limit():
    with engine(step_us=3000, max_len=256) as e:
        r = e.generate(PROMPT, max_tokens=250, ignore_eos=True, max_time_ms=60)
        assert r.finish_reason == "time" and 5 <= r.num_output_tokens < 60
        assert e.generate(PROMPT, max_tokens=5, ignore_eos=True, max_time_ms=60_000).finish_reason == "length"
        assert e.stats()["finished"]["time"] == 1
    with engine(step_us=3000, max_len=256, slots=1) as e:  # in the queue too
        box = Outbox()
        e.submit(PROMPT, outbox=Outbox(), max_tokens=250, ignore_eos=True)
        late = e.submit(PROMPT, outbox=box, max_tokens=5, max_time_ms=50)
        (chunk,) = box.poll(5)
        assert chunk.uid == late and chunk.finish_reason == "time" and chunk.num_output_tokens == 0


def test_places_to_stop_at():
    with engine() as e:
        with pytest.raises(ValueError, match="stop_at is 'word'; expected any of line, block, bracket, suffix, repetition"):
            e.generate(PROMPT, stop_at=["word"])


# ---- the demo model ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "weights"
    convert.convert(CHECKPOINT, path, progress=contextlib.nullcontext(lambda n: None))
    return path


@pytest.fixture(scope="module")
def demo(weights):
    with Engine(weights, device="cpu", slots=16, threads=2) as e:
        yield e


CODE = '''import os


class Stack:
    """A stack of things - naïve, 積む 🐢."""

    def __init__(self, items=None):
        self.items = list(items or [])

    def push(self, item):
        self.items.append(item)
        return self
'''


def test_every_cut_of_a_text(demo):
    """Whatever the cut: the text begins with the typed bytes, greedy and sampled, and healing is where the boundary was moved."""
    box, cuts = Outbox(), range(1, len(CODE), 2)
    healed, want = 0, {}
    for at in cuts:
        prompt = CODE[:at]
        start = demo.vocab.encode_open(prompt)
        healed += bool(start.typed)
        options = dict(max_tokens=6, include_typed=True, stream=False, ignore_eos=True)
        options |= dict(temperature=0.8, seed=at) if at % 3 == 0 else {}
        while demo.stats()["waiting"] > 100:
            pass
        want[demo.submit(prompt, outbox=box, **options)] = (start, prompt)
    ended = 0
    while ended < len(want):
        for c in box.poll(60):
            ended += 1
            start, prompt = want[c.uid]
            assert c.text.startswith(start.typed), prompt
            assert demo.vocab.decode(start.ids) + start.typed == prompt.encode() or prompt.encode() == start.typed
            assert c.num_input_tokens == len(start.ids) + len(start.typed_ids) and c.num_output_tokens == 6
    assert healed > len(want) // 2


@pytest.mark.parametrize("prompt, begin", [
    ("import numpy as n", "p\n"), ("class Stack:\n    def __ini", "t__(self"),
    ("def f(self, item):\n    retur", "n "), ("if __name__ == '__mai", "n__'"), ("import os\nimport sy", "s\n")])
def test_words_are_finished(demo, prompt, begin):
    assert demo.generate(prompt, max_tokens=8).text.startswith(begin)


def test_healing_is_off_where_it_is_not_wanted(demo):
    prompt = "import numpy as n"
    plain = demo.generate(prompt, max_tokens=4, token_healing=False)
    assert plain.token_ids.tolist() == demo.generate(demo.vocab.encode(prompt), max_tokens=4).token_ids.tolist()
    assert plain.text != demo.generate(prompt, max_tokens=4).text


def test_seeds_and_company(demo):
    """A sampled healed completion is the same alone and beside fifteen others."""
    prompts = [CODE[:at] for at in (20, 33, 57, 95, 130, 155, 171, 190, 211, 230, 245, 250, 260, 270, 280, 290)]
    alone = [demo.generate(p, max_tokens=10, temperature=0.9, top_p=0.95, seed=i, logprobs=True) for i, p in enumerate(prompts)]
    together = [None] * len(prompts)

    def one(i):
        together[i] = demo.generate(prompts[i], max_tokens=10, temperature=0.9, top_p=0.95, seed=i, logprobs=True)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(prompts))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for a, b in zip(alone, together):
        assert a.text == b.text and a.logprobs.tolist() == b.logprobs.tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not any(d.startswith("cuda") for d in devices()[0]), reason=f"no CUDA device: {devices()[1]}")
def test_on_a_gpu(weights, demo):
    """Masks on the device, several samples of one prompt in one step: the CPU's texts, alone and together."""
    prompts = [CODE[:at] for at in range(20, len(CODE), 3)]
    want = [demo.generate(p, max_tokens=8, include_typed=True).text for p in prompts]
    with Engine(weights, device="cuda", dtype="float32", slots=16) as e:
        assert [e.generate(p, max_tokens=8, include_typed=True).text for p in prompts] == want
        box = Outbox()
        uids = {e.submit(p, outbox=box, max_tokens=8, include_typed=True, stream=False): i for i, p in enumerate(prompts)}
        got = [""] * len(prompts)
        while "" in got:
            for c in box.poll(20):
                got[uids[c.uid]] = c.text.decode(errors="replace")
        assert got == want
