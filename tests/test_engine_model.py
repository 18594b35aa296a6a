"""The engine with real weights on the CPU: transformers' tokens, whatever else runs and however the pages are short."""
import json
import random

import numpy as np
import pytest
from codefuse_triton import Engine, LoadError, Vocab, _native
from fake_model import held

torch = pytest.importorskip("torch")
from helpers import make_neox  # noqa: E402

MAX_LEN, PAGE_BYTES = 160, 2 * 2 * 32 * 96 * 4  # K and V, layers, tokens, kv_heads * head_dim, float32


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    model, native = make_neox(path)
    return model, native


CUDA = any(name.startswith("cuda") for name in _native.devices()[0])
ON = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason=f"no CUDA device: {_native.devices()[1]}")])], scope="module")


def load(directory, device="cpu", pages=20, dtype="float32", **options) -> Engine:
    token_bytes = [bytes([33 + i % 90]) for i in range(131)]
    native = _native.testing.held_engine(str(directory), token_bytes, device=device, dtype=dtype, kv_bytes=pages * PAGE_BYTES // (1 if dtype == "float32" else 2), threads=2, **options)
    return Engine._of(native, Vocab.none(str(directory)))


def prompts(n, longest=100):
    rng = random.Random(11)
    return [[rng.randrange(3, 131) for _ in range(rng.choice([1, 2, 31, 32, 33, rng.randint(3, longest)]))] for _ in range(n)]


def reference(model, prompt, n):
    with torch.no_grad():
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, len(prompt):].tolist()


def run_together(engine, requests, beside=None):
    """Results of requests submitted at once, in order, with what beside() submits."""
    import threading

    out = [None] * len(requests)

    def one(i):
        prompt, options = requests[i]
        out[i] = engine.generate(prompt, ignore_eos=True, logprobs=True, **options)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(requests))]
    with held(engine, len(requests) + (beside is not None)):
        if beside:
            beside()
        for t in threads:
            t.start()
    for t in threads:
        t.join()
    return out


@ON
def test_greedy_equals_transformers(tiny, device):
    model, directory = tiny
    with load(directory, device, slots=4) as engine:
        for prompt, result in zip(prompts(8), run_together(engine, [(p, {"max_tokens": 40}) for p in prompts(8)])):
            assert result.token_ids.tolist() == reference(model, prompt, 40)


@pytest.fixture(scope="module")
def alone(tiny, device):
    """Requests and their results, each run by itself: greedy and sampled."""
    requests = []
    for i, p in enumerate(prompts(12)):
        options = {"max_tokens": min(50 + 3 * i, MAX_LEN - len(p)), "seed": i}
        requests.append((p, options if i % 2 else {**options, "temperature": 0.9, "top_k": 40, "top_p": 0.95}))
    with load(tiny[1], device) as engine:
        return requests, [engine.generate(p, ignore_eos=True, logprobs=True, **o) for p, o in requests]


VARIANTS = {
    "together": dict(slots=16, pages=80),
    "two steps in flight": dict(slots=16, pages=80, depth=2),
    "prompts in chunks of 5": dict(slots=4, prefill_tokens=5),
    "preempted": dict(slots=8, pages=7),
    "preempted, two steps in flight": dict(slots=8, pages=7, depth=2, prefill_tokens=17),
    "two ranks": dict(slots=8, pages=40, tensor_parallel=2),
}


@ON
@pytest.mark.parametrize("variant", VARIANTS)
def test_results_do_not_depend_on_company(tiny, alone, variant, device):
    if device == "cuda" and "ranks" in variant and "cuda:1" not in _native.devices()[0]:
        pytest.skip("one GPU")
    requests, want = alone
    with load(tiny[1], device, **VARIANTS[variant]) as engine:
        got = run_together(engine, requests)
        if "preempted" in variant:
            assert engine.stats()["preemptions"] > 0
        assert engine.stats()["free_pages"] == engine.stats()["pages"]
    for w, g in zip(want, got):
        assert g.token_ids.tolist() == w.token_ids.tolist()
        if "ranks" in variant:  # sums over heads are split
            np.testing.assert_allclose(g.logprobs, w.logprobs, atol=1e-4)
        else:
            assert g.logprobs.tobytes() == w.logprobs.tobytes()


def editing(seed: int):
    """Prompts as an editor sends them: typed on, taken back, and with the text of an earlier answer (its number) taken in."""
    rng, text = random.Random(seed), [5] * 3
    for i in range(14):
        answer = rng.randrange(i) if i and rng.random() < 0.4 else None
        typed = [rng.randrange(3, 131) for _ in range(rng.choice([1, 1, 2, 30, 40]))]
        if rng.random() < 0.3:
            text = text[: rng.randint(1, len(text))]
        text = (text + typed)[:100]
        yield list(text), answer


EDITED = {
    "one after the other": dict(slots=2, pages=60),
    "two steps in flight": dict(slots=2, pages=60, depth=2),
    "chunks of 7": dict(slots=3, pages=60, prefill_tokens=7),
    "preempted": dict(slots=8, pages=8, prefill_tokens=17),
    "preempted, two steps in flight": dict(slots=8, pages=8, depth=2),
}


@ON
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.gpu), pytest.param("bfloat16", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("variant", EDITED)
def test_warm_equals_cold(tiny, variant, device, dtype):
    """Bit for bit, log-probabilities too: what the prefix cache gives is what would have been computed."""
    if device == "cpu" and dtype != "float32":
        pytest.skip("the CPU computes in float32")
    options = EDITED[variant]
    with load(tiny[1], device, dtype=dtype, slots=1, prefix_cache="off") as cold, load(tiny[1], device, dtype=dtype, **options) as warm:
        answers, reused = [], 0
        for round, (text, taken) in enumerate(editing(3)):
            prompt = (text + answers[taken])[:120] if taken is not None else text
            asked = {"max_tokens": 30, "seed": round, "temperature": 0.8 * (round % 2)}
            want, = run_together(cold, [(prompt, asked)])
            # with others of the same beginning beside it, one of them cancelled half way
            leaving = []
            rest = run_together(warm, [(prompt, asked)] * 3, lambda: leaving.append(warm.stream(prompt[: len(prompt) // 2 + 1], max_tokens=90, ignore_eos=True)))
            leaving[0].close()
            for got in rest + run_together(warm, [(prompt, asked)]):
                assert got.token_ids.tolist() == want.token_ids.tolist()
                assert got.logprobs.tobytes() == want.logprobs.tobytes()
                reused += got.num_cached_tokens
            assert got.num_cached_tokens == len(prompt) - 1 or "preempted" in variant
            answers.append(want.token_ids.tolist())
        stats = warm.stats()
        while stats["running"] + stats["waiting"]:
            stats = warm.stats()
        assert reused > 0 and cold.stats()["cached_tokens"] == 0
        assert stats["free_pages"] == stats["pages"]
        if "preempted" in variant:
            assert stats["preemptions"] > 0 and stats["evictions"] > 0


@ON
def test_generated_text_is_taken_over(tiny, device):
    for mode in ("on", "generated"):
        with load(tiny[1], device, prefix_cache=mode) as engine:
            prompt = prompts(1)[0] + [7] * 20
            text = engine.generate(prompt, max_tokens=30, ignore_eos=True).token_ids.tolist()
            again = engine.generate(prompt + text + [9], max_tokens=3, ignore_eos=True)
            alike = device == "cpu" or mode == "generated"
            assert len(prompt) + 28 * alike <= again.num_cached_tokens <= len(prompt) + 29 * alike


@ON
def test_logprobs_are_the_model_s(tiny, device):
    model, directory = tiny
    prompt = prompts(3)[2]
    with load(directory, device) as engine:
        r = engine.generate(prompt, max_tokens=20, ignore_eos=True, logprobs=True, temperature=0.7, seed=1)
    ids = torch.tensor([prompt + r.token_ids.tolist()])
    with torch.no_grad():
        logp = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1].float(), -1)
    want = logp[torch.arange(20), torch.tensor(r.token_ids.tolist())].numpy()
    np.testing.assert_allclose(r.logprobs, want, atol=2e-4)
    assert r.cum_logprob == pytest.approx(float(want.sum()), abs=2e-3)


def test_engine_with_a_tokenizer(tiny, tmp_path):
    import shutil

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    directory = tmp_path / "weights"
    shutil.copytree(tiny[1], directory)
    assert Engine(directory, device="cpu").generate([5], max_tokens=2, ignore_eos=True).text == ""  # no tokenizer: ids only
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:125]
    t.train_from_iterator(["def f(x): return x"] * 9, trainers.BpeTrainer(vocab_size=131, initial_alphabet=alphabet, special_tokens=["<a>", "<b>", "<eos>"], show_progress=False))
    t.save(str(directory / "tokenizer.json"))
    with Engine(directory, max_len=100, slots=2, device="cpu") as engine:
        assert engine.device == "cpu" and engine.dtype == "float32" and engine.max_len == 100
        assert engine.config == json.loads((directory / "config.json").read_text()) and engine.vocab.eos_ids == [2]
        result = engine.generate("def f", max_tokens=30, ignore_eos=True)
        assert result.text == engine.vocab.decode(result.token_ids).decode("utf-8", "replace")
        assert "".join(c.text.decode("utf-8", "replace") for c in engine.stream(b"def f", max_tokens=30, ignore_eos=True)) == result.text
        with pytest.raises(ValueError, match="max_tokens is 100; expected at most 9[0-9]"):
            engine.generate("def f", max_tokens=100)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "vocab": 100}))
    with pytest.raises(LoadError, match="the tokenizer has token 130, but the model's vocab is 100"):
        Engine(directory)


@pytest.mark.parametrize("options, message", [
    (dict(slots=0), "slots is 0"), (dict(slots=65), "slots is 65"), (dict(queue=-1), "queue is -1"), (dict(max_len=161), "max_len is 161"),
    (dict(dtype="float8"), "float8"), (dict(dtype="float16"), "float16"), (dict(device="tpu"), "tpu"), (dict(prefill_tokens=0), "prefill_tokens is 0"),
    (dict(tensor_parallel=0), "tensor_parallel is 0"), (dict(kv_memory_mb=-1), "kv_memory_mb is -1"), (dict(threads=-1), "threads is -1"),
])
def test_bad_options_are_refused(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        Engine(tiny[1], **{"device": "cpu", **options})


def test_what_cannot_be_loaded(tiny, tmp_path):
    with pytest.raises(LoadError, match="no such directory"):
        Engine(tmp_path / "nowhere")
    with pytest.raises(LoadError, match="config.json"):
        Engine(tmp_path)
