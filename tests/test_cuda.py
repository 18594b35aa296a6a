"""Every CUDA op against the CPU op of the same name, and what must hold bit for bit: a row's result whatever shares its step,
a prompt in chunks or whole. Guard bytes around every output are checked by the testing module."""

import json

import numpy as np
import pytest

from codefuse_triton import DeviceError, devices
from codefuse_triton._native import LoadError, testing

CUDA = any(name.startswith("cuda") for name in devices()[0])
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason=f"no CUDA device: {devices()[1]}")]

torch = pytest.importorskip("torch")
from helpers import Pages, as_format, make_batch, make_neox, pages_of, rows_not_sampled_change_nothing, runner  # noqa: E402

DTYPES = ("float32", "float16", "bfloat16")
FORMAT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
EPS = {"float32": 5e-6, "float16": 2**-10, "bfloat16": 2**-7}  # one rounding of a result, with room for sums in another order


def config(**fields) -> str:
    base = dict(format_version=1, architecture="test", vocab=997, hidden=64, layers=1, heads=4, kv_heads=2, head_dim=16, intermediate=64,
                max_positions=2048, norm="layer", norm_eps=1e-5, residual="serial", activation="gelu", gated=False, position="rope",
                rope_dim=8, rope_theta=10000.0, rope_scaling={"type": "none"}, tied=False, window=0, bos_id=-1, eos_ids=[0])
    return json.dumps({**base, **fields})


ROWS, SLOTS, MAX_LEN = 400, 64, 1024


class Both:
    """The same call on the CPU in float32 and on CUDA in dtype, from inputs that dtype can hold."""

    def __init__(self, dtype: str, pages: int = 512, max_len: int = MAX_LEN, **fields):
        self.dtype = dtype
        self.cpu, self.cuda = testing.Ops("cpu", threads=2), testing.Ops("cuda", dtype)
        for ops in (self.cpu, self.cuda):
            ops.plan(config(**fields), SLOTS, ROWS, max_len, pages)

    def round(self, a: np.ndarray) -> np.ndarray:
        return as_format(a, FORMAT[self.dtype])[1]

    def call(self, op: str, *args, **kw):
        return getattr(self.cpu, op)(*args, **kw), getattr(self.cuda, op)(*args, **kw)

    def same(self, op: str, *args, eps: float | None = None, size=None, **kw) -> None:
        want, got = self.call(op, *args, **kw)
        want, got, size = (v if isinstance(want, tuple) else (v,) for v in (want, got, size))
        for w, g, s in zip(want, got, size or [None] * len(want)):
            close(g, w, EPS[self.dtype] if eps is None else eps, s)


def close(got: np.ndarray, want: np.ndarray, eps: float, size: np.ndarray | None = None) -> None:
    """Within eps of each element or of its sum's size, which is what rounding grows with: `size` [like want], or the typical one."""
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    if size is None:
        size = np.sqrt(np.mean(want.astype(np.float64)**2)) if want.size else 0.0
    worst = np.max(np.abs(got - want) - 2 * eps * np.maximum(np.abs(want), size), initial=-1.0)
    assert worst <= 0, f"off by {np.max(np.abs(got - want))} where the typical size is {np.mean(size)}"


@pytest.fixture(scope="module", params=DTYPES)
def both(request):
    return Both(request.param)


def rows_batch(decode: int, prefill: int, logits="none", sample=None) -> dict:
    """Rows of no particular content: decode rows of their own slots, then one chunk."""
    pages = Pages(SLOTS, MAX_LEN, 512)
    return make_batch(pages, decode=[(s, 1, 0) for s in range(decode)], prefill=[(decode % SLOTS, [1] * prefill, 0)] if prefill else [],
                      logits=logits, sample=sample)


SHAPES = [(1, 1), (3, 8), (16, 64), (111, 111), (257, 192), (300, 1000), (1536, 640), (96, 5120)]


@pytest.mark.parametrize("n,k", SHAPES)
@pytest.mark.parametrize("decode,prefill", [(1, 0), (7, 0), (64, 0), (0, 1), (0, 130), (9, 33)])
def test_linear(both, n, k, decode, prefill):
    rng = np.random.default_rng(n * k + decode)
    x = both.round(rng.standard_normal((decode + prefill, k)))
    for format in ("f32", "f16", "bf16"):
        raw = rng.standard_normal((n, k)) / np.sqrt(k)
        bits, values = as_format(raw, format)
        if both.dtype != "float32" and format != FORMAT[both.dtype]:
            bits, values = as_format(both.round(values), format) if format == "f32" else as_format(raw.round(2) * 0.5, format)
            if not np.array_equal(both.round(values), values):
                continue  # the CPU would not round this weight
        bias = rng.standard_normal(n).astype(np.float32)
        batch = rows_batch(decode, prefill)
        both.same("linear", batch, x, bits, format, bias)
    both.same("linear", batch, x, bits, format, None, activation="gelu")
    y = rng.standard_normal((decode + prefill, n)).astype(np.float32)
    eps = 5e-6 if both.dtype == "float32" else 1e-4  # tensor cores truncate where they add
    both.same("linear_add", batch, y, x, bits, format, bias, eps=eps)
    both.same("linear_add", batch, y, x, bits, format, bias, add_bias=False, eps=eps)


PREFILL_SHAPES = [(1, 16, 64), (63, 111, 64), (64, 256, 1000), (65, 300, 1000), (128, 1536, 64), (129, 300, 5120), (255, 111, 1000), (300, 1536, 1000), (300, 256, 5120), (300, 9001, 640)]


@pytest.mark.parametrize("rows,n,k", PREFILL_SHAPES)
def test_linear_of_prefill_rows(both, rows, n, k):
    rng, format = np.random.default_rng(rows * n + k), FORMAT[both.dtype]
    x = both.round(rng.standard_normal((rows, k)))
    w, bias = as_format(rng.standard_normal((n, k)) / np.sqrt(k), format)[0], rng.standard_normal(n).astype(np.float32)
    batch, eps = rows_batch(0, rows), 5e-6 if both.dtype == "float32" else 1e-4
    both.same("linear", batch, x, w, format, bias)
    both.same("linear", batch, x, w, format, bias, activation="gelu")
    y = rng.standard_normal((rows, n)).astype(np.float32)
    both.same("linear_add", batch, y, x, w, format, bias, eps=eps)
    both.same("linear_add", batch, y, x, w, format, bias, add_bias=False, eps=eps)


@pytest.mark.parametrize("n", [5120, 8704, 16900])
def test_a_prefill_row_is_the_same_in_tiles_of_any_shape(both, n):
    """Tiles of more and fewer rows, whole and in two pieces on different multiprocessors."""
    if both.dtype == "float32":
        pytest.skip("one kernel for all shapes")
    k, rng, format = 704, np.random.default_rng(n), FORMAT[both.dtype]
    x, w = both.round(rng.standard_normal((400, k))), as_format(rng.standard_normal((n, k)) / np.sqrt(k), format)[0]
    y = rng.standard_normal((400, n)).astype(np.float32)
    whole, added = both.cuda.linear(rows_batch(0, 400), x, w, format), both.cuda.linear_add(rows_batch(0, 400), y, x, w, format)
    close(whole, both.cpu.linear(rows_batch(0, 400), x, w, format), EPS[both.dtype])
    for first, count in ((0, 1), (0, 64), (60, 65), (100, 128), (5, 200), (0, 257), (37, 320)):
        part, batch = slice(first, first + count), rows_batch(0, count)
        np.testing.assert_array_equal(both.cuda.linear(batch, x[part], w, format), whole[part])
        np.testing.assert_array_equal(both.cuda.linear_add(batch, y[part], x[part], w, format), added[part])


@pytest.mark.parametrize("na,ka,nb,kb", [(1, 1, 3, 8), (257, 192, 300, 64), (64, 704, 1100, 704), (1536, 640, 2048, 640), (256, 128, 256, 5120), (512, 4096, 700, 64)])
@pytest.mark.parametrize("decode,prefill", [(1, 0), (9, 0), (23, 0), (64, 0), (3, 33)])
def test_linear_pairs(both, na, ka, nb, kb, decode, prefill):
    rng = np.random.default_rng(na * ka + decode)
    format, rows, batch = FORMAT[both.dtype], decode + prefill, rows_batch(decode, prefill)
    xa, xb = both.round(rng.standard_normal((rows, ka))), both.round(rng.standard_normal((rows, kb)))
    wa, wb = (as_format(rng.standard_normal((n, k)) / np.sqrt(k), format)[0] for n, k in ((na, ka), (nb, kb)))
    ba, bb = rng.standard_normal(na).astype(np.float32), rng.standard_normal(nb).astype(np.float32)
    both.same("linear_pair", batch, xa, wa, xb, wb, format, ba, bb, activation="gelu")
    both.same("linear_pair", batch, xa, wa, xb, wb, format)
    wb = as_format(rng.standard_normal((na, kb)) / np.sqrt(kb), format)[0]
    y, bb = rng.standard_normal((rows, na)).astype(np.float32), rng.standard_normal(na).astype(np.float32)
    eps = 5e-6 if both.dtype == "float32" else 1e-4
    both.same("linear_add_pair", batch, y, xa, wa, xb, wb, format, ba, bb, eps=eps)
    both.same("linear_add_pair", batch, y, xa, wa, xb, wb, format, ba, bb, add_bias=False, eps=eps)
    if not prefill:  # each row alone; and again, from the scratch that the first left
        total = both.cuda.linear_add_pair(batch, y, xa, wa, xb, wb, format)
        np.testing.assert_array_equal(both.cuda.linear_add_pair(batch, y, xa, wa, xb, wb, format), total)
        pair = both.cuda.linear_pair(batch, xa, wa, xb, wb, format)
        for got, want in zip(both.cuda.linear_pair(rows_batch(1, 0), xa[-1:], wa, xb[-1:], wb, format), pair):
            np.testing.assert_array_equal(got, want[-1:])
        np.testing.assert_array_equal(both.cuda.linear_add_pair(rows_batch(1, 0), y[-1:], xa[-1:], wa, xb[-1:], wb, format), total[-1:])


@pytest.mark.parametrize("na,nb,k,ka", [(257, 300, 192, 64), (1536, 2048, 640, 320), (5000, 700, 256, 2048), (9000, 8000, 192, 320)])
def test_pairs_of_prefill_rows(both, na, nb, k, ka):
    """Several tiles and pieces of tiles; a row is the same in any number of rows. y += x_a W_a^T + x_b W_b^T: K from two matrices."""
    rng = np.random.default_rng(na)
    format, rows = FORMAT[both.dtype], 390
    xa, xb, xc = (both.round(rng.standard_normal((rows, n))) for n in (k, k, ka))
    wa, wb, wc = (as_format(rng.standard_normal((n, m)) / np.sqrt(m), format)[0] for n, m in ((na, k), (nb, k), (na, ka)))
    ba, bb, bc = (rng.standard_normal(n).astype(np.float32) for n in (na, nb, na))
    y = rng.standard_normal((rows, na)).astype(np.float32)
    for decode, some in ((0, 390), (3, 387)):
        both.same("linear_pair", rows_batch(decode, some), xa, wa, xb, wb, format, ba, bb, activation="gelu")
        both.same("linear_add_pair", rows_batch(decode, some), y, xc, wc, xa, wa, format, bc, ba, eps=5e-6 if both.dtype == "float32" else 1e-4)
    pair, total = both.cuda.linear_pair(rows_batch(0, rows), xa, wa, xb, wb, format, ba, bb), both.cuda.linear_add_pair(rows_batch(0, rows), y, xc, wc, xa, wa, format, bc, ba)
    for first, count in ((0, 1), (60, 65), (100, 128), (37, 320)):
        part, batch = slice(first, first + count), rows_batch(0, count)
        for got, want in zip(both.cuda.linear_pair(batch, xa[part], wa, xb[part], wb, format, ba, bb), pair):
            np.testing.assert_array_equal(got, want[part])
        np.testing.assert_array_equal(both.cuda.linear_add_pair(batch, y[part], xc[part], wc, xa[part], wa, format, bc, ba), total[part])


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_activations(both, activation):
    rng = np.random.default_rng(5)
    x, w = both.round(rng.standard_normal((70, 64)) * 3), both.round(rng.standard_normal((40, 64)) / 8)
    format, bits = FORMAT[both.dtype], as_format(w, FORMAT[both.dtype])[0]
    both.same("linear", rows_batch(3, 67), x, bits, format, None, activation=activation)
    both.same("linear", rows_batch(3, 67), x * 64, bits, format, None, activation=activation)  # up to some 700
    x[[1, 9]] = np.nan
    got = both.cuda.linear(rows_batch(3, 67), x, bits, format, None, activation)
    assert activation == "relu" or np.isnan(got[[1, 9]]).all()
    assert np.isfinite(np.delete(got, [1, 9], 0)).all()
    g, u = both.round(rng.standard_normal((70, 111)) * 3), both.round(rng.standard_normal((70, 111)))
    both.same("gate", rows_batch(3, 67), g, u, activation)
    both.same("gate", rows_batch(3, 67), g, u, activation, in_place=True)


def test_one_wrong_weight_shows(both):
    rng = np.random.default_rng(6)
    x, w = both.round(rng.standard_normal((3, 320))), both.round(rng.standard_normal((300, 320)) / 18)
    wrong = w.copy()
    wrong[299, 319] = -wrong[299, 319]
    format = FORMAT[both.dtype]
    want = both.cpu.linear(rows_batch(3, 0), x, as_format(w, format)[0], format)
    got = both.cuda.linear(rows_batch(3, 0), x, as_format(wrong, format)[0], format)
    with pytest.raises(AssertionError):
        close(got, want, EPS[both.dtype])


@pytest.mark.parametrize("n,k", [(111, 111), (520, 704), (2048, 1024), (512, 4096)])
def test_a_row_is_the_same_alone_and_in_any_batch(both, n, k):
    rng = np.random.default_rng(n)
    x, format = both.round(rng.standard_normal((64 + 200, k))), FORMAT[both.dtype]
    w = as_format(rng.standard_normal((n, k)) / np.sqrt(k), format)[0]
    bias = rng.standard_normal(n).astype(np.float32)
    mixed = both.cuda.linear(rows_batch(64, 200), x, w, format, bias)
    for count in (1, 2, 8, 9, 24, 33, 64):
        np.testing.assert_array_equal(both.cuda.linear(rows_batch(count, 0), x[:count], w, format, bias), mixed[:count])
    np.testing.assert_array_equal(both.cuda.linear(rows_batch(1, 0), x[63:64], w, format, bias), mixed[63:64])
    for first, count in ((0, 1), (0, 200), (3, 130), (199, 1)):
        part = x[64 + first:64 + first + count]
        np.testing.assert_array_equal(both.cuda.linear(rows_batch(0, count), part, w, format, bias), mixed[64 + first:64 + first + count])
    logits = both.cuda.logits(rows_batch(64, 0, "all"), x[:64], w, format, bias)
    np.testing.assert_array_equal(both.cuda.logits(rows_batch(1, 0, "all"), x[5:6], w, format, bias), logits[5:6])


@pytest.mark.parametrize("v,h", [(1, 1), (111, 111), (300, 640), (997, 64)])
def test_repacked_weights_are_the_weights(both, v, h):
    """embed() reads single elements out of the tiles that linear() streams."""
    rng = np.random.default_rng(v)
    format = FORMAT[both.dtype]
    bits, values = as_format(rng.standard_normal((v, h)), format)
    for start in range(0, v, 64):
        tokens = list(range(start, min(v, start + 64)))
        batch = make_batch(Pages(SLOTS, MAX_LEN, 512), decode=[(i, t, i) for i, t in enumerate(tokens)], logits="none")
        np.testing.assert_array_equal(both.cuda.embed(batch, bits, format), values[tokens])
        if v >= MAX_LEN or start == 0 and v >= 64:
            x = rng.standard_normal((len(tokens), h)).astype(np.float32)
            both.same("add_position", batch, x, bits, format, eps=1e-6)


@pytest.mark.parametrize("hidden", [1, 7, 111, 640, 1000, 5120, 12289])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm(both, hidden, kind):
    rng = np.random.default_rng(hidden)
    x = (rng.standard_normal((12, hidden)) * 3 + 1).astype(np.float32)
    w, b = rng.standard_normal(hidden).astype(np.float32), rng.standard_normal(hidden).astype(np.float32)
    both.same("norm", rows_batch(5, 7), x, w, b, kind, 1e-5, eps=max(EPS[both.dtype], 1e-5))
    both.same("norm", rows_batch(5, 7), x, w, None, kind, 1e-5, eps=max(EPS[both.dtype], 1e-5))
    both.same("norm", rows_batch(5, 7, "last"), x[:6], w, b, kind, 1e-5, logit_rows=True, eps=max(EPS[both.dtype], 1e-5))
    whole = both.cuda.norm(rows_batch(5, 7), x, w, b, kind, 1e-5)
    np.testing.assert_array_equal(both.cuda.norm(rows_batch(0, 1), x[9:10], w, b, kind, 1e-5), whole[9:10])


@pytest.mark.parametrize("hidden", [111, 640, 1000, 5120, 12289])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_pairs(both, hidden, kind):
    """From 384 rows on a block makes both outputs of several."""
    rng = np.random.default_rng(hidden)
    x, eps, batch = (rng.standard_normal((387, hidden)) * 3 + 1).astype(np.float32), max(EPS[both.dtype], 1e-5), rows_batch(0, 387)
    wa, ba, wb, bb = (rng.standard_normal(hidden).astype(np.float32) for _ in range(4))
    both.same("norm_pair", batch, x, wa, ba, wb, bb, kind, 1e-5, eps=eps)
    both.same("norm_pair", batch, x, wa, None, wb, bb, kind, 1e-5, eps=eps)
    whole = both.cuda.norm_pair(batch, x, wa, ba, wb, bb, kind, 1e-5)
    for got, want in zip(both.cuda.norm_pair(rows_batch(5, 7), x[375:], wa, ba, wb, bb, kind, 1e-5), whole):
        np.testing.assert_array_equal(got, want[375:])
    np.testing.assert_array_equal(both.cuda.norm(batch, x, wb, bb, kind, 1e-5), whole[1])


@pytest.mark.parametrize("n", [1, 111, 4096])
def test_gathering(both, n):
    rng = np.random.default_rng(n)
    x = rng.standard_normal((70, n)).astype(np.float32)
    both.same("gather_logit_rows", rows_batch(3, 67, [0, 69, 5, 5]), x, eps=0)
    both.same("take_columns", rows_batch(3, 67), both.round(x), rng.permutation(n).astype(np.int32), eps=0)


def test_some_rows_of_a_step(both):
    """Products of decode rows or of prefill rows alone; what is left of a step's rows when only sampled ones go on."""
    rng, format = np.random.default_rng(2), FORMAT[both.dtype]
    x = both.round(rng.standard_normal((70, 192)))
    w = as_format(rng.standard_normal((300, 192)) / 14, format)[0]
    batch = rows_batch(3, 67)
    whole, pair = both.cuda.linear(batch, x, w, format), both.cuda.linear_pair(batch, x, w, x, w, format)
    first, second = both.cuda.linear_pair(batch, x, w, x, w, format, decode_b=True)
    np.testing.assert_array_equal(first, pair[0])
    for got, want, part in ((both.cuda.linear(batch, x, w, format, rows="decode"), whole, slice(0, 3)), (second, pair[1], slice(0, 3)),
                            (both.cuda.linear(batch, x, w, format, rows="prefill"), whole, slice(3, 70))):
        np.testing.assert_array_equal(got[part], want[part])
        assert np.isnan(np.delete(got, part, 0)).all()  # not written
    for columns in (1, 111, 192):
        x = both.round(rng.standard_normal((70, columns)))
        for some in ([0, 69, 5, 5], [2], [69], [], list(range(60)), list(range(6, 70))):
            fewer, rows, wide, narrow, sampled = both.cuda.keep_sampled(rows_batch(3, 67, some), x)
            kept = [0, 1, 2] + [r for r in some if r >= 3]
            assert fewer == (len(kept) < 70) and rows == min(len(kept), 70)
            np.testing.assert_array_equal(sampled, x[some])
            if fewer:
                np.testing.assert_array_equal(wide, x[kept])
                np.testing.assert_array_equal(narrow, x[kept])
            for got, want in zip(both.cuda.keep_sampled(rows_batch(3, 67, some), x), both.cpu.keep_sampled(rows_batch(3, 67, some), x)):
                np.testing.assert_array_equal(got, want)
    assert both.cuda.keep_sampled(rows_batch(0, 67), x[:67])[:2] == (True, 0)
    assert both.cuda.keep_sampled(rows_batch(5, 0, [1]), x[:5])[:2] == (False, 5)


def greedy(r, prompts, steps: int, together: bool, chunk: int = 10**9) -> list[list[int]]:
    """Tokens of greedy decoding, all prompts in every step or one after the other."""
    if not together:
        return [greedy(r, [p], steps, True, chunk)[0] for p in prompts]
    pages, out = pages_of(r), [[] for _ in prompts]
    for slot, prompt in enumerate(prompts):
        for start in range(0, len(prompt), chunk):
            part = prompt[start:start + chunk]
            ended = start + len(part) == len(prompt)
            token, _ = r.step(make_batch(pages, prefill=[(slot, part, start)], logits="last" if ended else "none", sample=[{}] if ended else None))
        out[slot].append(int(token[0]))
    for i in range(steps - 1):
        rows = [(slot, testing.LAST_TOKEN, len(p) + i) for slot, p in enumerate(prompts)]
        token, _ = r.step(make_batch(pages, decode=rows, sample=[{}] * len(rows)), i % 2)
        for slot, t in enumerate(token):
            out[slot].append(int(t))
    return out


MODELS = [dict(), dict(use_parallel_residual=False, hidden_act="gelu_new", rotary_pct=1.0), dict(hidden_size=128, num_attention_heads=2, intermediate_size=512)]


@pytest.mark.parametrize("fields", MODELS, ids=["parallel", "serial", "wide"])
def test_model(tmp_path, fields):
    hf, native = make_neox(tmp_path, **fields)
    rng = np.random.default_rng(1)
    tokens = [int(t) for t in rng.integers(0, 131, 100)]
    with torch.no_grad():
        want = hf(torch.tensor([tokens])).logits[0].numpy()
    prompts = [tokens[:n] for n in (5, 33, 64, 90)]
    expected = greedy(runner(native, device="cpu"), prompts, 40, True)
    for dtype, eps in (("float32", 1e-5), ("float16", 4e-3), ("bfloat16", 3e-2)):
        r = runner(native, device="cuda", dtype=dtype)
        assert (r.device, r.dtype) == ("cuda:0", dtype)
        whole = r.logits(make_batch(pages_of(r), prefill=[(0, tokens[:64], 0)], logits="all"))
        close(whole, want[:64], eps)
        for chunk in (1, 7, 32):
            pages = pages_of(r, 5)
            parts = [r.logits(make_batch(pages, prefill=[(1, tokens[i:min(i + chunk, 64)], i)], logits="all")) for i in range(0, 64, chunk)]
            np.testing.assert_array_equal(np.concatenate(parts), whole)
        pages = pages_of(r, 5)  # the first 50 tokens from another sequence: a page of its own and 18 tokens copied
        r.logits(make_batch(pages, prefill=[(1, tokens[:64], 0)]))
        table, new = pages.table(1, 64), pages.table(2, 64)
        batch = make_batch(pages, prefill=[(2, tokens[50:64], 50)], logits="all", copies=[(table[1], new[1], 18)])
        batch["table"] = table[:1] + new[1:]
        np.testing.assert_array_equal(r.logits(batch), whole[50:])
        rows_not_sampled_change_nothing(r, tokens)
        together = greedy(r, prompts, 40, True)  # 4 rows: recorded and replayed
        assert together == greedy(r, prompts, 40, False)
        assert together == greedy(r, prompts, 40, True, chunk=16)
        if dtype == "float32":
            assert together == expected


def test_damage_is_seen_on_the_way_to_the_device(tmp_path):
    """Matrices of several pieces, which are hashed as they are uploaded, and vectors between them, which are not."""
    hf, native = make_neox(tmp_path, vocab_size=10_000, hidden_size=512, intermediate_size=2048)
    path, = native.glob("*.safetensors")
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + size])
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, 10_000, 20)]
    r = runner(native, device="cuda", dtype="float32")
    with torch.no_grad():
        close(r.logits(make_batch(pages_of(r), prefill=[(0, tokens, 0)], logits="all")), hf(torch.tensor([tokens])).logits[0].numpy(), 1e-5)
    for tensor in ("embed.weight", "layers.0.qkv.weight", "layers.1.norm2.bias", "lm_head.weight"):
        begin, end = header[tensor]["data_offsets"]
        for at in (begin, (begin + end) // 2, end - 1):
            damaged = bytearray(raw)
            damaged[8 + size + at] ^= 4
            path.write_bytes(damaged)
            with pytest.raises(LoadError, match=f"{path.name}: tensor {tensor} is damaged"):
                runner(native, device="cuda", dtype="bfloat16")
    path.write_bytes(raw)
    runner(native, device="cuda", dtype="bfloat16")


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match="head_dim"):
        testing.Ops("cuda", "float16").plan(config(head_dim=12, rope_dim=4), 4, 64, 64, 8)
    with pytest.raises(ValueError, match="cuda"):
        testing.Ops("cuda:99")
    _, native = make_neox(tmp_path)
    with pytest.raises(DeviceError, match="out of memory"):
        runner(native, device="cuda", kv_bytes=10**15)
    ops = testing.Ops("cuda", "float16")
    ops.plan(config(), 4, 64, 64, 8)
    with pytest.raises(LoadError, match="float16"):
        ops.linear(rows_batch(1, 0) | dict(table=[0, 0]), np.ones((1, 64)), np.full((2, 64), 1e6, np.float32))
