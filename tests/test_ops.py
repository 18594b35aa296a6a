"""Every CPU op against torch, on every instruction set this processor runs. A tolerance is a few roundings of the sum at hand, and is
shown to fail when one weight is wrong. The testing module checks guard bytes around every output."""

import json

import numpy as np
import pytest

from codefuse_triton._native import testing

torch = pytest.importorskip("torch")
from helpers import PAGE, Pages, as_format, make_batch  # noqa: E402

SLOTS, ROWS, MAX_LEN, PAGES = 8, 160, 200, 64
SIZES = (1, 2, 3, 6, 7, 13, 111)


def config(**fields) -> str:
    base = dict(format_version=1, architecture="test", vocab=97, hidden=64, layers=1, heads=4, kv_heads=2, head_dim=16, intermediate=64,
                max_positions=MAX_LEN, norm="layer", norm_eps=1e-5, residual="serial", activation="gelu", gated=False, position="rope",
                rope_dim=8, rope_theta=10000.0, rope_scaling={"type": "none"}, tied=False, window=0, bos_id=-1, eos_ids=[])
    return json.dumps({**base, **fields})


@pytest.fixture(scope="module", params=testing.cpu_kernels())
def ops(request):
    ops = testing.Ops("cpu", threads=2, kernels=request.param)
    ops.plan(config(), SLOTS, ROWS, MAX_LEN, PAGES)
    return ops


def planned(ops_like=None, **fields):
    ops = testing.Ops("cpu", threads=2)
    ops.plan(config(**fields), SLOTS, ROWS, MAX_LEN, PAGES)
    return ops


def rows_batch(n: int, logits="none") -> dict:
    return make_batch(Pages(SLOTS, MAX_LEN, PAGES), prefill=[(0, [1] * n, 0)], logits=logits)


def normal(*shape, seed=0, scale=1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def same_bits(a: np.ndarray, b: np.ndarray) -> None:
    assert a.shape == b.shape and a.tobytes() == b.tobytes()


# ---- linear ------------------------------------------------------------------------------------------------------------------


def linear_reference(x, w, b=None):
    """Product in float64 and how far float32 sums may be from it."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    y = x @ w.T + (0 if b is None else b.astype(np.float64))
    return y, 1e-7 * (4 + np.sqrt(w.shape[1])) * (np.abs(x) @ np.abs(w).T / np.sqrt(w.shape[1]) + 1)


@pytest.mark.parametrize("format", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("n,k", [(1, 1), (7, 5), (33, 111), (64, 64), (111, 7), (97, 256)])
def test_linear(ops, format, n, k):
    bits, w = as_format(normal(n, k, seed=1), format)
    b = normal(n, seed=2)
    for t in SIZES:
        x = normal(t, k, seed=100 + t)
        want, tolerance = linear_reference(x, w, b)
        got = ops.linear(rows_batch(t), x, bits, format, b)
        assert (np.abs(got - want) <= tolerance).all()
        y = normal(t, n, seed=3)
        assert (np.abs(ops.linear_add(rows_batch(t), y, x, bits, format, b) - (want + y)) <= 2 * tolerance).all()
        without, _ = linear_reference(x, w)
        assert (np.abs(ops.linear_add(rows_batch(t), y, x, bits, format, b, add_bias=False) - (without + y)) <= 2 * tolerance).all()
        assert (np.abs(ops.linear(rows_batch(t), x, bits, format) - without) <= tolerance).all()
        if t <= testing.DECODE_ROWS:
            same_bits(ops.logits(rows_batch(t, "all"), x, bits, format, b), got)


def test_linear_tolerance_sees_one_wrong_weight(ops):
    n, k = 33, 111
    bits, w = as_format(normal(n, k, seed=1), "f32")
    x = normal(7, k, seed=5)
    want, tolerance = linear_reference(x, w)
    wrong = bits.copy()
    wrong[20, 60] *= 1.001
    off = np.abs(ops.linear(rows_batch(7), x, wrong) - want) > tolerance
    assert off[:, 20].any() and not np.delete(off, 20, axis=1).any()


def test_linear_of_some_rows(ops):
    bits, _ = as_format(normal(50, 70, seed=1), "f16")
    x = normal(12, 70, seed=2)
    batch = make_batch(Pages(SLOTS, MAX_LEN, PAGES), decode=[(1, 1, 7), (2, 1, 7)], prefill=[(0, [1] * 10, 5)], logits="none")
    whole = ops.linear(batch, x, bits, "f16")
    for got, part in ((ops.linear(batch, x, bits, "f16", rows="decode"), slice(0, 2)), (ops.linear(batch, x, bits, "f16", rows="prefill"), slice(2, 12)),
                      (ops.linear_pair(batch, x, bits, x, bits, "f16", decode_b=True)[1], slice(0, 2))):
        same_bits(got[part], whole[part])
        assert np.isnan(np.delete(got, part, 0)).all()  # not written


@pytest.mark.parametrize("format", ["f32", "f16", "bf16"])
def test_linear_row_does_not_depend_on_the_batch(ops, format):
    bits, _ = as_format(normal(50, 70, seed=1), format)
    x, b = normal(111, 70, seed=2), normal(50, seed=3)
    whole = ops.linear(rows_batch(111), x, bits, format, b, "gelu")
    for t in range(1, 30):
        same_bits(ops.linear(rows_batch(t), x[:t], bits, format, b, "gelu"), whole[:t])
    same_bits(ops.linear(rows_batch(1), x[110:], bits, format, b, "gelu"), whole[110:])


def test_threads_do_not_matter():
    bits, _ = as_format(normal(700, 70, seed=1), "f16")
    x = normal(20, 70, seed=2)
    results = []
    for threads in (1, 2, 5):
        ops = testing.Ops("cpu", threads=threads)
        ops.plan(config(), SLOTS, ROWS, MAX_LEN, PAGES)
        results.append(ops.linear(rows_batch(20), x, bits, "f16"))
    same_bits(results[0], results[1])
    same_bits(results[0], results[2])


def test_half_formats_are_decoded_exactly(ops):
    """Every 16-bit pattern, subnormals, infinities and NaN among them, times one."""
    patterns = np.arange(65536, dtype=np.uint16).reshape(-1, 1)
    for format, values in (("f16", patterns.view(np.float16).astype(np.float32)),
                           ("bf16", (patterns.astype(np.uint32) << 16).view(np.float32))):
        got = ops.linear(rows_batch(1), np.ones((1, 1), np.float32), patterns, format)[0]
        np.testing.assert_array_equal(got, values[:, 0])
        table = ops.embed({**rows_batch(1), "token": [5]}, patterns.reshape(-1, 64)[:97].copy(), format)
        np.testing.assert_array_equal(table[0], values.reshape(-1, 64)[5])


TORCH_ACTIVATIONS = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
}


@pytest.mark.parametrize("act", TORCH_ACTIVATIONS)
def test_activations(ops, act):
    x = np.concatenate([np.linspace(-12, 12, 20011), [0.0, -0.0, 1e-30, -1e-30, 50.0, -50.0, 1e4, -1e4]]).astype(np.float32)[None]
    up = normal(1, x.shape[1], seed=4)
    want = TORCH_ACTIVATIONS[act](torch.from_numpy(x).double()).numpy()
    eye = np.eye(1, dtype=np.float32)
    got = ops.linear(rows_batch(1), eye, x.T.copy(), "f32", None, act)
    assert (np.abs(got - want) <= 4e-7 * (np.abs(want) + np.abs(x).clip(max=4) + 1)).all()
    for in_place in (False, True):
        got = ops.gate(rows_batch(1), x, up, act, in_place)
        assert (np.abs(got - want * up) <= 5e-7 * (np.abs(want) + np.abs(x).clip(max=4) + 1) * (np.abs(up) + 1)).all()


# ---- norms, embedding, sums ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("hidden", [1, 7, 64, 111, 384])
def test_norm(ops, kind, hidden):
    for t in (1, 3, 111):
        x, w = normal(t, hidden, seed=100 + t) * 3 + 0.5, normal(hidden, seed=1)
        for bias, eps in ((None, 1e-5), (normal(hidden, seed=2), 1e-2)):
            d = torch.from_numpy(x).double()
            if kind == "layer":
                want = torch.nn.functional.layer_norm(d, (hidden,), torch.from_numpy(w).double(), None, eps)
            else:
                want = d / torch.sqrt(d.pow(2).mean(-1, keepdim=True) + eps) * torch.from_numpy(w).double()
            want = want.numpy() + (0 if bias is None else bias)
            got = ops.norm(rows_batch(t), x, w, bias, kind, eps)
            np.testing.assert_allclose(got, want, rtol=2e-6, atol=4e-6)
            if t <= testing.DECODE_ROWS:
                same_bits(ops.norm(rows_batch(t, "all"), x, w, bias, kind, eps, logit_rows=True), got)
            same_bits(ops.norm(rows_batch(1), x[-1:], w, bias, kind, eps), got[-1:])


def test_embed_positions_and_gathering(ops):
    bits, table = as_format(normal(97, 33, seed=1), "bf16")
    tokens = np.random.default_rng(0).integers(0, 97, 40)
    b = make_batch(Pages(SLOTS, MAX_LEN, PAGES), decode=[(1, 96, 7)], prefill=[(0, tokens, 5)], logits=[3, 0, 40])
    x = ops.embed(b, bits, "bf16")
    same_bits(x, table[[96, *tokens]])
    positions, values = as_format(normal(200, 33, seed=2), "f16")
    same_bits(ops.add_position(b, x, positions, "f16"), x + values[[7, *range(5, 45)]])
    same_bits(ops.gather_logit_rows(b, x), x[[3, 0, 40]])
    order = np.random.default_rng(3).permutation(33).astype(np.int32)
    same_bits(ops.take_columns(b, x, order), x[:, order])


# ---- rope and attention ------------------------------------------------------------------------------------------------------------


def rope_reference(x, positions, dim, theta, factor):
    """x [T, heads, D] float64"""
    half = dim // 2
    angle = positions[:, None] * (theta ** (-2.0 * np.arange(half) / max(dim, 1)) / factor)[None]
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    out = x.copy()
    out[..., :half] = x[..., :half] * cos - x[..., half:dim] * sin
    out[..., half:dim] = x[..., half:dim] * cos + x[..., :half] * sin
    return out


@pytest.mark.parametrize("heads,kv_heads,d,rope_dim,theta,factor", [
    (4, 2, 16, 8, 1e4, 1), (3, 3, 10, 10, 1e6, 4), (4, 1, 7, 0, 1e4, 1), (2, 1, 64, 2, 500.0, 2.5), (1, 1, 1, 0, 1e4, 1)])
@pytest.mark.parametrize("window", [0, 5])
def test_rope_store_and_attention(heads, kv_heads, d, rope_dim, theta, factor, window):
    scaling = {"type": "linear", "factor": factor} if factor != 1 else {"type": "none"}
    fields = dict(heads=heads, kv_heads=kv_heads, head_dim=d, rope_dim=rope_dim, rope_theta=theta, rope_scaling=scaling, window=window)
    rng = np.random.default_rng(3)
    # three sequences: 70 tokens stored before and two decode rows; 100 stored and a chunk of 37; a fresh chunk of 3
    stored, new = {0: 70, 1: 100, 2: 0}, {0: 2, 1: 37, 2: 3}
    size = (heads + 2 * kv_heads) * d
    history = {s: rng.standard_normal((stored[s] + new[s], size)).astype(np.float32) for s in stored}
    for kernels in testing.cpu_kernels():
        ops = testing.Ops("cpu", threads=2, kernels=kernels)
        ops.plan(config(**fields), SLOTS, ROWS, MAX_LEN, PAGES)
        pages = Pages(SLOTS, MAX_LEN, PAGES)
        k = v = rng.standard_normal((PAGES, kv_heads, PAGE, d)).astype(np.float32)  # what other sequences left
        for s, n in stored.items():
            if n:
                b = make_batch(pages, prefill=[(s, [0] * n, 0)], logits="none")
                _, k, v = ops.rope_store(b, history[s][:n], k, v, heads, kv_heads)
        b = make_batch(pages, decode=[(0, 0, 70), (0, 0, 71)], prefill=[(1, [0] * 37, 100), (2, [0] * 3, 0)], logits="none")
        x = np.concatenate([history[s][stored[s]:] for s in (0, 1, 2)])
        before = k.copy()
        rotated, k, v = ops.rope_store(b, x, k, v, heads, kv_heads)
        got = ops.attention(b, rotated, k, v, heads, kv_heads).reshape(-1, heads, d)

        row = 0
        for s in (0, 1, 2):
            h = history[s].astype(np.float64)
            n = len(h)
            q, hk, hv = np.split(h.reshape(n, -1, d), [heads, heads + kv_heads], axis=1)
            q, hk = (rope_reference(a, np.arange(n), rope_dim, theta, factor) for a in (q, hk))
            np.testing.assert_allclose(rotated[row:row + new[s]].reshape(new[s], -1, d)[:, :heads], q[stored[s]:], atol=3e-5)
            for p in range(n):  # every key and value is where the page table says
                page = pages.table(s, n)[p // PAGE]
                np.testing.assert_allclose(k[page, :, p % PAGE], hk[p], atol=3e-5)
                np.testing.assert_array_equal(v[page, :, p % PAGE], history[s][p].reshape(-1, d)[heads + kv_heads:])
            hk, hv = (np.repeat(a, heads // kv_heads, axis=1) for a in (hk, hv))
            for p in range(stored[s], n):
                first = max(0, p - window + 1) if window else 0
                score = np.einsum("hd,phd->hp", q[p], hk[first:p + 1]) / np.sqrt(d)
                weight = np.exp(score - score.max(1, keepdims=True))
                want = np.einsum("hp,phd->hd", weight / weight.sum(1, keepdims=True), hv[first:p + 1])
                np.testing.assert_allclose(got[row], want, atol=3e-5, rtol=1e-5)
                row += 1
        used = {page for s in (0, 1, 2) for page in pages.table(s, stored[s] + new[s])[:-(-(stored[s] + new[s]) // PAGE)]}
        for page in set(range(PAGES)) - used:
            np.testing.assert_array_equal(k[page], before[page])


def test_attention_sees_one_wrong_value():
    ops = planned(heads=2, kv_heads=1, head_dim=16)
    pages = Pages(SLOTS, MAX_LEN, PAGES)
    b = make_batch(pages, prefill=[(0, [0] * 111, 0)], logits="none")
    zeros = np.zeros((PAGES, 1, PAGE, 16), np.float32)
    qkv, k, v = ops.rope_store(b, normal(111, 64, seed=1), zeros, zeros, 2, 1)
    right = ops.attention(b, qkv, k, v, 2, 1)
    page = pages.table(0, 111)[1]
    v[page, 0, 3, 9] *= 1.05
    wrong = ops.attention(b, qkv, k, v, 2, 1)
    assert (np.abs(wrong - right) > 3e-5 + 1e-5 * np.abs(right))[:, [9, 25]].any()
    same_bits(wrong[:PAGE + 3], right[:PAGE + 3])  # rows before it do not see it


def test_copy_pages():
    """The first places of a page in every layer and head, and nothing else."""
    ops = planned(heads=6, kv_heads=3, head_dim=16)
    k, v = normal(2, PAGES, 3, PAGE, 16, seed=1), normal(2, PAGES, 3, PAGE, 16, seed=2)
    b = make_batch(Pages(SLOTS, MAX_LEN, PAGES), prefill=[(0, [1], 70)], logits="none")
    to = b["table"][2]
    others = [p for p in range(PAGES) if p not in b["table"][:3]]
    b["copies"] = [(others[0], to, 6), (others[0], others[1], 31), (others[2], others[3], 1)]
    got_k, got_v = ops.copy_pages(b, k, v, 3)
    for got, want in ((got_k, k.copy()), (got_v, v.copy())):
        for source, target, tokens in b["copies"]:
            want[:, target, :, :tokens] = want[:, source, :, :tokens]
        same_bits(got, want)


# ---- refused batches and devices -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change,message", [
    (dict(token=[97, 1, 1]), "token.*97.*0 to 96"),
    (dict(slot=[0, 0, 8]), "slot.*8.*0 to 7"),
    (dict(position=[0, 1, 200]), "position.*200.*0 to 199"),
    (dict(position=[0, 2, 3]), "chunk"),
    (dict(logit_row=[3]), "logit_row.*3.*0 to 2"),
    (dict(table_slot=[1]), "slot 0 .* no page table"),
    (dict(table=[64] + [0] * 6), "table.*64.*0 to 63"),
    (dict(position=[95, 96, 97], chunks=[(0, 3, 0, 95)], table=[0] * 3 + [64] + [0] * 3), r"table\[3\] is 64; expected 0 to 63"),
    (dict(table=[0]), "table has 1 elements; expected 7"),
    (dict(chunks=[(0, 2, 0, 0)]), "chunks end at row 2 of 3"),
    (dict(decode_rows=1), "chunk 0"),
    (dict(copies=[(64, 1, 3)]), "copies.from.*64.*0 to 63"),
    (dict(copies=[(1, -1, 3)]), "copies.to.*-1.*0 to 63"),
    (dict(copies=[(1, 2, 0)]), "copies.tokens.*0; expected 1 to 31"),
    (dict(copies=[(1, 2, 32)]), "copies.tokens.*32; expected 1 to 31"),
    (dict(copies=[(1, 2, 3), (3, 2, 3)]), "copy 0 writes page 2, which copy 1 uses"),
    (dict(copies=[(1, 2, 3), (2, 3, 3)]), "copy 0 writes page 2, which copy 1 uses"),
    (dict(copies=[(1, 1, 3)]), "copy 0 writes page 1, which copy 0 uses"),
    (dict(copies=[(1, 3, 3)], table=[3] + [0] * 6), "copy 0 writes 3 tokens of page 3; slot 0 goes on at position 0"),
])
def test_bad_batches_are_refused(change, message):
    ops = planned()
    with pytest.raises(ValueError, match=message):
        ops.take_columns({**rows_batch(3), **change}, np.zeros((3, 4), np.float32), np.arange(4, dtype=np.int32))


def test_unknown_devices_are_refused():
    with pytest.raises(ValueError, match="device is 'tpu'; expected cpu, cuda"):
        testing.Ops("tpu")
    with pytest.raises(ValueError, match="device is 'cuda:77'.*only cpu"):
        testing.Ops("cuda:77")
    with pytest.raises(ValueError, match="dtype is 'float16'; expected float32 or auto on the CPU"):
        testing.Ops("cpu", "float16")
