"""Quantized weights on CUDA against the CPU: the layout keeps every value, products of decode and prefill rows, batch invariance, models."""

import contextlib

import numpy as np
import pytest
import test_cuda
from codefuse_triton import _native
from codefuse_triton._native import LoadError, testing
from test_cuda import DTYPES, EPS, Both, close, greedy, rows_batch
from test_quantize import GROUPS, QUIET, SIZES, pack, tool

from helpers import make_batch, make_neox, pages_of, rows_not_sampled_change_nothing, runner

pytestmark = test_cuda.pytestmark

FORMATS = ("q8_row", "q4_g128", "q4_g64")
SHAPES = [("q8_row", 1, 1), ("q8_row", 3, 8), ("q8_row", 111, 111), ("q8_row", 257, 192), ("q8_row", 300, 1000), ("q8_row", 1536, 640),
          ("q8_row", 96, 5120), ("q4_g128", 1, 128), ("q4_g128", 111, 384), ("q4_g128", 300, 640), ("q4_g128", 1536, 1024), ("q4_g128", 96, 5120),
          ("q4_g64", 1, 64), ("q4_g64", 111, 192), ("q4_g64", 300, 576), ("q4_g64", 1536, 1024), ("q4_g64", 96, 5120)]


@pytest.fixture(scope="module", params=DTYPES)
def both(request):
    return Both(request.param)


def matrix(format: str, n: int, k: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Every code and zero, scales of several sizes."""
    rng = np.random.default_rng(seed + n * k)
    size = (2.0 ** rng.integers(-3, 3, (n, 1)) / np.sqrt(k)).astype(np.float32)
    if format == "q8_row":
        return _native.pack(format, rng.integers(-127, 128, (n, k)).astype(np.int8), size[:, 0] / 73)
    groups = k // GROUPS[format]
    scale = (size * rng.uniform(0.5, 1, (n, groups)) / 5).astype(np.float16)
    return _native.pack(format, rng.integers(0, 16, (n, k)).astype(np.uint8), scale, rng.integers(0, 16, (n, groups)).astype(np.uint8))


def size_of(*products) -> np.ndarray:
    """Typical size of sums of products (x [T, K], parts) with random signs, [T, N]: the rows' scales differ by a factor of 32."""
    return np.sqrt(sum((x.astype(np.float64)**2) @ (_native.decode(format, parts).astype(np.float64)**2).T for x, parts, format in products) + 1e-12)


@pytest.mark.parametrize("format,n,k", SHAPES)
def test_repacked_weights_are_the_weights(both, format, n, k):
    parts = matrix(format, n, k)
    want = _native.decode(format, parts)
    np.testing.assert_array_equal(both.cuda.read_matrix(parts, format), want)
    np.testing.assert_array_equal(both.cpu.read_matrix(parts, format), want)


@pytest.mark.parametrize("format,n,k,parts", [("q8_row", 20_000, 1024, []), ("q8_row", 9001, 5120, [1, 3000, 6000]), ("q4_g128", 30_000, 2048, [29_999, 1]),
                                              ("q4_g128", 700, 128, [100, 200, 300, 100]), ("q4_g64", 30_000, 2048, [29_999, 1]),
                                              ("q4_g64", 700, 192, [100, 200, 300, 100])])
def test_large_matrices_and_parts(both, format, n, k, parts):
    """In several pieces, by several threads; pieces that are put together from several parts."""
    weight = matrix(format, n, k)
    np.testing.assert_array_equal(both.cuda.read_matrix(weight, format, parts), _native.decode(format, weight))


def test_large_plain_matrices_and_parts(both):
    bits, values = test_cuda.as_format(both.round(np.random.default_rng(0).integers(-8, 8, (6001, 5120)).astype(np.float32)), "f16")
    for parts in ([], [2000, 1, 4000]):
        np.testing.assert_array_equal(both.cuda.read_matrix(bits, "f16", parts), values)


@pytest.mark.parametrize("format", ["f32", "f16", "bf16"])
def test_plain_weights_too(both, format):
    bits, values = test_cuda.as_format(both.round(np.random.default_rng(0).standard_normal((300, 111))), format)
    if np.array_equal(both.round(values), values):
        np.testing.assert_array_equal(both.cuda.read_matrix(bits, format), values)


@pytest.mark.parametrize("format,n,k", SHAPES)
@pytest.mark.parametrize("decode,prefill", [(1, 0), (7, 0), (64, 0), (0, 1), (0, 130), (9, 33)])
def test_linear(both, format, n, k, decode, prefill):
    rng = np.random.default_rng(n * k + decode)
    parts = matrix(format, n, k)
    x = both.round(rng.standard_normal((decode + prefill, k)))
    y, bias = rng.standard_normal((decode + prefill, n)).astype(np.float32), rng.standard_normal(n).astype(np.float32)
    batch, size = rows_batch(decode, prefill), size_of((x, parts, format))
    both.same("linear", batch, x, parts, format, bias, size=size)
    both.same("linear", batch, x, parts, format, None, activation="gelu", size=size)
    # decode rows multiply by the codes as they are; for prefill rows code times scale is rounded to 16 bits
    eps = 5e-6 if both.dtype == "float32" else EPS[both.dtype] if prefill else 1e-4
    both.same("linear_add", batch, y, x, parts, format, bias, eps=eps, size=size)
    if not prefill:
        both.same("logits", rows_batch(decode, 0, "all"), x, parts, format, bias, eps=eps, size=size)


def test_one_wrong_code_shows(both):
    rng = np.random.default_rng(6)
    x = both.round(rng.standard_normal((3, 384)))
    for format in FORMATS:
        w = (rng.standard_normal((300, 384)) / 18).astype(np.float32)
        wrong = w.copy()
        wrong[299, 383] = -wrong[299, 383] - 0.05
        want = both.cpu.linear(rows_batch(3, 0), x, pack(format, w), format)
        with pytest.raises(AssertionError):
            close(both.cuda.linear(rows_batch(3, 0), x, pack(format, wrong), format), want, EPS[both.dtype])


@pytest.mark.parametrize("format,n,k", [("q8_row", 111, 111), ("q8_row", 2048, 1024), ("q4_g128", 520, 640), ("q4_g128", 512, 4096),
                                        ("q4_g64", 520, 576), ("q4_g64", 512, 4096)])
def test_a_row_is_the_same_alone_and_in_any_batch(both, format, n, k):
    rng = np.random.default_rng(n)
    x, w, bias = both.round(rng.standard_normal((64 + 200, k))), matrix(format, n, k), rng.standard_normal(n).astype(np.float32)
    mixed = both.cuda.linear(rows_batch(64, 200), x, w, format, bias)
    for count in (1, 2, 8, 9, 24, 33, 64):
        np.testing.assert_array_equal(both.cuda.linear(rows_batch(count, 0), x[:count], w, format, bias), mixed[:count])
    np.testing.assert_array_equal(both.cuda.linear(rows_batch(1, 0), x[63:64], w, format, bias), mixed[63:64])
    for first, count in ((0, 1), (0, 200), (3, 130), (199, 1)):
        part = x[64 + first:64 + first + count]
        np.testing.assert_array_equal(both.cuda.linear(rows_batch(0, count), part, w, format, bias), mixed[64 + first:64 + first + count])


@pytest.mark.parametrize("head_dim", [16, 128])
@pytest.mark.parametrize("format,n,k", [("q4_g128", 520, 640), ("q4_g128", 512, 4096), ("q4_g64", 520, 576), ("q4_g64", 512, 4096), ("q8_row", 257, 192)])
def test_little_shared_memory(both, format, n, k, head_dim):
    """99 KB a block, as GPUs of 8.6 and 8.9 have (and on Hopper what the ends of row groups take), hold rings of two stages, attention (of head_dim
    128) has no room beside some: the bits are the same."""
    little = testing.Ops("cuda:0", both.dtype, shared_max=101376 + 2048)
    little.plan(test_cuda.config(head_dim=head_dim, rope_dim=16), test_cuda.SLOTS, test_cuda.ROWS, test_cuda.MAX_LEN, 512)
    rng = np.random.default_rng(n)
    w, w2 = matrix(format, n, k), matrix(format, n, k, 1)
    bias, bias2 = rng.standard_normal((2, n)).astype(np.float32)
    for count in (1, 8, 16, 17, 32, 33, 64):
        batch = rows_batch(count, 0, "all")
        x, x2 = both.round(rng.standard_normal((count, k))), both.round(rng.standard_normal((count, k)))
        y = rng.standard_normal((count, n)).astype(np.float32)
        for name, arguments in [("linear", (x, w, format, bias, "gelu")), ("linear_add", (y, x, w, format, bias, True)), ("logits", (x, w, format, bias)),
                                ("linear_pair", (x, w, x2, w2, format, bias, bias2, "gelu")), ("linear_add_pair", (y, x, w, x2, w2, format, bias, bias2, True))]:
            got, want = (getattr(ops, name)(batch, *arguments) for ops in (little, both.cuda))
            for a, b in zip(got if isinstance(got, tuple) else (got,), want if isinstance(want, tuple) else (want,)):
                np.testing.assert_array_equal(a, b, err_msg=f"{name} of {count} rows")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("fields", [dict(), dict(use_parallel_residual=False)], ids=["parallel", "serial"])
def test_model(tmp_path, format, fields):
    _, native = make_neox(tmp_path, **SIZES, **fields)
    tool.quantize(native, tmp_path / "q", format, dtype="f32", **QUIET)
    tokens = [int(t) for t in np.random.default_rng(1).integers(0, 131, 100)]
    prompts = [tokens[:n] for n in (5, 33, 64, 90)]
    cpu = runner(tmp_path / "q", device="cpu")
    want, expected = cpu.logits(make_batch(pages_of(cpu), prefill=[(0, tokens[:64], 0)], logits="all")), greedy(cpu, prompts, 40, True)
    # Rounding the decoded weights alone, on the CPU, moves the serial model's logits by 0.7 % of their size in float16, 7 % in bfloat16.
    for dtype, eps in (("float32", 1e-5), ("float16", 1e-2), ("bfloat16", 0.11)):
        r = runner(tmp_path / "q", device="cuda", dtype=dtype)
        assert r.weight_bytes == cpu.weight_bytes
        whole = r.logits(make_batch(pages_of(r), prefill=[(0, tokens[:64], 0)], logits="all"))
        close(whole, want, eps)
        pages = pages_of(r, 5)
        parts = [r.logits(make_batch(pages, prefill=[(1, tokens[i:min(i + 7, 64)], i)], logits="all")) for i in range(0, 64, 7)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
        rows_not_sampled_change_nothing(r, tokens)
        together = greedy(r, prompts, 40, True)
        assert together == greedy(r, prompts, 40, False)
        if dtype == "float32":
            assert together == expected


@pytest.mark.parametrize("format", FORMATS)
def test_a_scale_too_large_for_float16_is_refused(format):
    ops = testing.Ops("cuda", "float16")
    ops.plan(test_cuda.config(), 4, 64, 64, 8)
    parts = matrix(format, 2, 128)
    parts["scale"] = np.full_like(parts["scale"], 6e4)
    with pytest.raises(LoadError, match="float16"), contextlib.suppress(DeprecationWarning):
        ops.read_matrix(parts, format)


@pytest.mark.parametrize("format,k", [("q8_row", 640), ("q4_g128", 640), ("q4_g64", 704)])
def test_a_prefill_row_is_the_same_in_tiles_of_any_shape(both, format, k):
    """Tiles of more and fewer rows and outputs, whole and in two pieces on different multiprocessors."""
    if both.dtype == "float32":
        pytest.skip("one kernel for all shapes")
    n, rng, w = 8704, np.random.default_rng(k), matrix(format, 8704, k)
    x, y = both.round(rng.standard_normal((400, k))), rng.standard_normal((400, n)).astype(np.float32)
    whole, added = both.cuda.linear(rows_batch(0, 400), x, w, format), both.cuda.linear_add(rows_batch(0, 400), y, x, w, format)
    close(whole, both.cpu.linear(rows_batch(0, 400), x, w, format), EPS[both.dtype], size_of((x, w, format)))
    for first, count in ((0, 1), (0, 64), (100, 128), (5, 200), (0, 257), (37, 320)):
        part, batch = slice(first, first + count), rows_batch(0, count)
        np.testing.assert_array_equal(both.cuda.linear(batch, x[part], w, format), whole[part])
        np.testing.assert_array_equal(both.cuda.linear_add(batch, y[part], x[part], w, format), added[part])


@pytest.mark.parametrize("format,k,ka", [("q8_row", 192, 320), ("q4_g128", 256, 384), ("q4_g64", 192, 320), ("q4_g64", 640, 192)])
@pytest.mark.parametrize("na,nb", [(257, 300), (5000, 704), (9000, 8000)])
def test_pairs_of_prefill_rows(both, format, k, ka, na, nb):
    """Several tiles and pieces of tiles, the second part of K included; a row is the same in any number of rows."""
    rng, rows = np.random.default_rng(na + k), 390
    xa, xb, xc = (both.round(rng.standard_normal((rows, n))) for n in (k, k, ka))
    wa, wb, wc = matrix(format, na, k), matrix(format, nb, k), matrix(format, na, ka)
    y, eps = rng.standard_normal((rows, na)).astype(np.float32), 5e-6 if both.dtype == "float32" else EPS[both.dtype]
    pair = both.cuda.linear_pair(rows_batch(0, rows), xa, wa, xb, wb, format)
    np.testing.assert_array_equal(pair[0], both.cuda.linear(rows_batch(0, rows), xa, wa, format))
    np.testing.assert_array_equal(pair[1], both.cuda.linear(rows_batch(0, rows), xb, wb, format))
    both.same("linear_add_pair", rows_batch(0, rows), y, xc, wc, xa, wa, format, eps=eps, size=size_of((xc, wc, format), (xa, wa, format)))
    total = both.cuda.linear_add_pair(rows_batch(0, rows), y, xc, wc, xa, wa, format)
    for first, count in ((0, 1), (60, 65), (100, 128), (37, 320)):
        part, batch = slice(first, first + count), rows_batch(0, count)
        for got, want in zip(both.cuda.linear_pair(batch, xa[part], wa, xb[part], wb, format), pair):
            np.testing.assert_array_equal(got, want[part])
        np.testing.assert_array_equal(both.cuda.linear_add_pair(batch, y[part], xc[part], wc, xa[part], wa, format), total[part])


@pytest.mark.parametrize("format,na,ka,nb,kb", [(f, *shape) for shape in [(257, 256, 300, 128), (1536, 640, 2048, 640), (512, 4096, 700, 384)] for f in FORMATS]
                         + [("q4_g64", 257, 192, 300, 64)])
@pytest.mark.parametrize("decode,prefill", [(1, 0), (23, 0), (64, 0), (3, 33)])
def test_linear_pairs(both, format, na, ka, nb, kb, decode, prefill):
    rng = np.random.default_rng(na * ka + decode)
    rows, batch = decode + prefill, rows_batch(decode, prefill)
    xa, xb, y = both.round(rng.standard_normal((rows, ka))), both.round(rng.standard_normal((rows, kb))), rng.standard_normal((rows, na)).astype(np.float32)
    ba, bb, bc = (rng.standard_normal(n).astype(np.float32) for n in (na, nb, na))
    wa, wb, wc = matrix(format, na, ka), matrix(format, nb, kb), matrix(format, na, kb, 1)
    both.same("linear_pair", batch, xa, wa, xb, wb, format, ba, bb, activation="gelu", size=(size_of((xa, wa, format)), size_of((xb, wb, format))))
    eps = 5e-6 if both.dtype == "float32" else EPS[both.dtype] if prefill else 1e-4
    both.same("linear_add_pair", batch, y, xa, wa, xb, wc, format, ba, bc, eps=eps, size=size_of((xa, wa, format), (xb, wc, format)))
    if prefill:  # rows in another order
        batch = rows_batch(0, rows)
        for got, want in zip(both.cuda.linear_pair(batch, xa[::-1], wa, xb[::-1], wb, format), both.cuda.linear_pair(batch, xa, wa, xb, wb, format)):
            np.testing.assert_array_equal(got[::-1], want)
        np.testing.assert_array_equal(both.cuda.linear_add_pair(batch, y[::-1], xa[::-1], wa, xb[::-1], wc, format)[::-1],
                                      both.cuda.linear_add_pair(batch, y, xa, wa, xb, wc, format))
    if not prefill:
        total, pair = both.cuda.linear_add_pair(batch, y, xa, wa, xb, wc, format), both.cuda.linear_pair(batch, xa, wa, xb, wb, format)
        np.testing.assert_array_equal(both.cuda.linear_add_pair(rows_batch(1, 0), y[-1:], xa[-1:], wa, xb[-1:], wc, format), total[-1:])
        for got, want in zip(both.cuda.linear_pair(rows_batch(1, 0), xa[-1:], wa, xb[-1:], wb, format), pair):
            np.testing.assert_array_equal(got, want[-1:])
