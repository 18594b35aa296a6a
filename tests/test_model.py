"""Whole models on the CPU: logits against transformers in float32 for every combination of flags, and what must hold bit for bit."""

import itertools
import shutil

import numpy as np
import pytest

from codefuse_triton._native import testing

torch = pytest.importorskip("torch")
from helpers import make_batch, make_neox, pages_of, prompt_logits, rows_not_sampled_change_nothing, runner  # noqa: E402
from test_ops import same_bits  # noqa: E402
from test_tools import preset  # noqa: E402

TOKENS = np.random.default_rng(0).integers(0, 131, 75)
TOLERANCE = 2e-5  # of logits of size 6


def reference(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)[None]).logits[0].numpy()


def close(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= TOLERANCE


@pytest.fixture(scope="module")
def neox(tmp_path_factory):
    return make_neox(tmp_path_factory.mktemp("neox"), "f16")


# ---- against transformers --------------------------------------------------------------------------------------------------------

FLAGS = list(itertools.product((True, False), ("gelu", "gelu_new"), (0.25, 0.5, 1.0), (False, True), (True, False)))
DTYPES = ("f32", "f16", "bf16")


@pytest.mark.parametrize("parallel,act,pct,tied,bias,dtype", [(*flags, DTYPES[i % 3 if i % 2 else (i + 1) % 3]) for i, flags in enumerate(FLAGS)])
def test_logits_for_every_flag(tmp_path, dtype, parallel, act, pct, tied, bias):
    model, native = make_neox(tmp_path, dtype, use_parallel_residual=parallel, hidden_act=act, rotary_pct=pct,
                              tie_word_embeddings=tied, attention_bias=bias)
    r = runner(native)
    close(prompt_logits(r, TOKENS), reference(model, TOKENS))
    rows_not_sampled_change_nothing(r, TOKENS)


@pytest.mark.parametrize("residual", ["serial", "parallel_one_norm", "parallel_two_norms"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_that_are_not_sampled(tmp_path, residual, gated, ranks):
    native = preset(tmp_path, "f32", residual=residual, gated=gated)
    rows_not_sampled_change_nothing(runner(native, tensor_parallel=ranks), TOKENS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parallel", [True, False])
def test_logits_for_every_format(tmp_path, dtype, parallel):
    model, native = make_neox(tmp_path, dtype, use_parallel_residual=parallel)
    r = runner(native)
    close(prompt_logits(r, TOKENS), reference(model, TOKENS))
    parameters = sum(p.numel() for name, p in model.named_parameters() if "embed_in" not in name)
    assert r.weight_bytes >= parameters * (4 if dtype == "f32" else 2)


@pytest.mark.parametrize("fields", [
    dict(rope_parameters=dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=0.25)), dict(layer_norm_eps=1e-2),
    dict(num_attention_heads=1, hidden_size=64), dict(num_attention_heads=48, rotary_pct=1.0), dict(num_hidden_layers=1, intermediate_size=7),
    dict(vocab_size=1001), dict(hidden_size=40, num_attention_heads=2, rotary_pct=0.2)], ids=lambda f: ",".join(f))
def test_logits_for_other_shapes(tmp_path, fields):
    model, native = make_neox(tmp_path, "f16", **fields)
    close(prompt_logits(runner(native), TOKENS), reference(model, TOKENS))


def test_tolerance_sees_one_wrong_weight(tmp_path, neox):
    model, _ = make_neox(tmp_path, "f16")
    before = reference(model, TOKENS)
    with torch.no_grad():
        model.gpt_neox.layers[1].mlp.dense_h_to_4h.weight[5, 7] *= 1.05
    assert np.abs(reference(model, TOKENS) - before).max() > TOLERANCE


def test_greedy_text_equals_generate(neox):
    model, native = neox
    r = runner(native)
    pages = pages_of(r)
    want = model.generate(torch.tensor(TOKENS[:20])[None], max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 20:]
    tokens, _ = r.step(make_batch(pages, prefill=[(0, TOKENS[:20], 0)]))
    got = [int(tokens[0])]
    while len(got) < 60:
        tokens, _ = r.step(make_batch(pages, decode=[(0, testing.LAST_TOKEN, 19 + len(got))]), ticket=len(got) % 2)
        got.append(int(tokens[0]))
    assert got == want.tolist()


# ---- bit for bit -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 7, 31, 32, 33, 64])
def test_chunked_equals_whole(neox, chunk):
    r = runner(neox[1])
    same_bits(prompt_logits(r, TOKENS, chunk, slot=1, seed=3), prompt_logits(r, TOKENS))


def test_in_a_batch_equals_alone(neox):
    r = runner(neox[1], slots=6, kv_bytes=1 << 22)
    rng = np.random.default_rng(1)
    prompts = {s: rng.integers(0, 131, n) for s, n in enumerate((3, 40, 17, 1, 33))}

    def run(together: bool) -> dict[int, list[np.ndarray]]:
        """Logits of each sequence: its prompt's last token, then 5 given tokens one by one."""
        seen = {s: [] for s in prompts}
        for group in [list(prompts)] if together else [[s] for s in prompts]:
            pages = pages_of(r, seed=len(group))
            steps = [make_batch(pages, prefill=[(s, prompts[s], 0) for s in group])]
            steps += [make_batch(pages, decode=[(s, 7 * s + i, len(prompts[s]) + i) for s in group]) for i in range(5)]
            for step in steps:
                for s, row in zip(group, r.logits(step)):
                    seen[s].append(row)
        return seen

    alone, together = run(False), run(True)
    for s in prompts:
        same_bits(np.array(alone[s]), np.array(together[s]))


def test_prefill_and_decode_mixed_in_one_step(neox):
    r = runner(neox[1])
    pages = pages_of(r)
    r.logits(make_batch(pages, prefill=[(2, TOKENS[:30], 0)]))
    mixed = r.logits(make_batch(pages, decode=[(2, 9, 30)], prefill=[(0, TOKENS[:25], 0), (3, TOKENS[5:50], 0)]))
    pages = pages_of(r, seed=5)
    r.logits(make_batch(pages, prefill=[(2, TOKENS[:30], 0)]))
    same_bits(r.logits(make_batch(pages, decode=[(2, 9, 30)])), mixed[:1])
    same_bits(r.logits(make_batch(pages, prefill=[(0, TOKENS[:25], 0)])), mixed[1:2])
    same_bits(r.logits(make_batch(pages, prefill=[(3, TOKENS[5:50], 0)])), mixed[2:])


@pytest.mark.parametrize("at_once", [2, 3, 40])
def test_resumed_decode_rows_equal_one_by_one(neox, at_once):
    """Preemption: the prompt again as prefill rows, the generated tokens again as several decode rows of one step."""
    r = runner(neox[1], slots=64, kv_bytes=1 << 22)
    prompt, generated = TOKENS[:20], TOKENS[20:60]
    pages = pages_of(r)
    r.logits(make_batch(pages, prefill=[(0, prompt, 0)]))
    one_by_one = np.concatenate([r.logits(make_batch(pages, decode=[(0, t, 20 + i)])) for i, t in enumerate(generated)])
    pages = pages_of(r, seed=9)
    r.logits(make_batch(pages, prefill=[(5, prompt, 0)]))
    rows = [(5, t, 20 + i) for i, t in enumerate(generated)]
    again = np.concatenate([r.logits(make_batch(pages, decode=rows[i:i + at_once])) for i in range(0, 40, at_once)])
    same_bits(again, one_by_one)


def test_sampled_tokens_are_those_of_the_logits(neox):
    r = runner(neox[1])
    params = [dict(temperature=0.9, top_p=0.9, seed=4), dict(temperature=0.0)]
    batch = make_batch(pages_of(r), prefill=[(0, TOKENS[:9], 0), (1, TOKENS[9:20], 0)], sample=params)
    logits = r.logits(batch)
    tokens, logprobs = r.step(batch)
    assert tokens[1] == logits[1].argmax()
    want = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()[[0, 1], tokens]
    np.testing.assert_allclose(logprobs, want, atol=1e-5)
    tokens_again, _ = r.step(batch, 1)
    assert tokens.tolist() == tokens_again.tolist()


# ---- tensor parallelism, limits, options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, dict(use_parallel_residual=False, tie_word_embeddings=True), dict(vocab_size=128, attention_bias=False)])
@pytest.mark.parametrize("world", [2, 4])
def test_tensor_parallel_equals_one_rank(tmp_path, fields, world):
    _, native = make_neox(tmp_path, "f16", **fields)
    tokens = TOKENS % 128
    one, two = runner(native), runner(native, tensor_parallel=world, threads=1)
    close(prompt_logits(two, tokens), prompt_logits(one, tokens))
    batch = make_batch(pages_of(two), prefill=[(0, tokens[:20], 0)], sample=[dict(temperature=1.0, seed=3)])
    assert two.step(batch)[0].tolist() == one.step(batch)[0].tolist()
    for i in range(5):  # every rank kept the same last token
        batch = make_batch(pages_of(two), decode=[(0, testing.LAST_TOKEN, 20 + i)], sample=[dict(temperature=1.0, seed=3)])
        assert two.step(batch)[0].tolist() == one.step(batch)[0].tolist()
    assert two.weight_bytes >= one.weight_bytes
    with pytest.raises(ValueError, match="slot"):
        two.step({**batch, "slot": [99]})


@pytest.mark.parametrize("options,message", [
    (dict(tensor_parallel=3), "tensor_parallel is 3.*heads, 4, is not divisible"),
    (dict(tensor_parallel=0), "tensor_parallel is 0; expected 1 to"),
    (dict(slots=0), "slots is 0; expected 1 to 64"),
    (dict(slots=65), "slots is 65; expected 1 to 64"),
    (dict(prefill_rows=0), "prefill_rows is 0"),
    (dict(max_len=161), "max_len is 161; expected 0 to 160"),
    (dict(kv_bytes=10000), "kv memory is 10000 bytes; one sequence of max_len 160 needs 245760"),
    (dict(kv_bytes=-1), "kv_bytes is -1"),
    (dict(threads=-1), "threads is -1"),
    (dict(device="gpu"), "device is 'gpu'"),
    (dict(dtype="float16"), "dtype is 'float16'"),
    (dict(dtype="int8"), "dtype is 'int8'; expected float32, float16 or bfloat16"),
])
def test_bad_options_are_refused(neox, options, message):
    with pytest.raises(ValueError, match=message):
        runner(neox[1], **options)


def test_limits(neox):
    page = 2 * 2 * 4 * 32 * 24 * 4  # layers, k and v, heads, tokens, head_dim, bytes
    r = runner(neox[1], slots=5, prefill_rows=70, max_len=100, kv_bytes=9 * page + 1)
    assert (r.slots, r.rows, r.max_len, r.pages) == (5, 75, 100, 9)
    assert runner(neox[1], max_len=33).pages == 4 * 2
    assert runner(neox[1]).max_len == 160 and r.vocab == 131 and r.device == "cpu" and r.dtype == "float32"


def test_the_last_position_can_be_used(neox):
    r = runner(neox[1], max_len=64)
    assert prompt_logits(r, TOKENS[:64]).shape == (64, 131)
    with pytest.raises(ValueError, match="position.*64.*0 to 63"):
        r.step({**make_batch(pages_of(r), decode=[(0, 1, 63)]), "position": [64]})


def test_weights_may_be_deleted_while_mapped(tmp_path, neox):
    shutil.copytree(neox[1], tmp_path / "copy")
    r = runner(tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy")
    same_bits(prompt_logits(r, TOKENS), prompt_logits(runner(neox[1]), TOKENS))
