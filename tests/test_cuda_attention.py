"""Attention on CUDA against the CPU's: rows and tiles, with rope and without, near and far; copies of KV pages."""

import numpy as np
import pytest
import test_cuda
from helpers import PAGE, Pages, make_batch
from test_cuda import DTYPES, MAX_LEN, SLOTS, Both

pytestmark = test_cuda.pytestmark


ATTENTION = [dict(heads=4, kv_heads=4, head_dim=64, rope_dim=64), dict(heads=4, kv_heads=1, head_dim=128, rope_dim=32),
             dict(heads=6, kv_heads=2, head_dim=80, rope_dim=20), dict(heads=2, kv_heads=2, head_dim=8, rope_dim=2),
             dict(heads=2, kv_heads=1, head_dim=256, rope_dim=256), dict(heads=4, kv_heads=2, head_dim=64, rope_dim=16, window=70),
             dict(heads=3, kv_heads=3, head_dim=128, rope_dim=0, window=1), dict(heads=24, kv_heads=2, head_dim=128, rope_dim=64),
             dict(heads=4, kv_heads=2, head_dim=128, rope_dim=128), dict(heads=3, kv_heads=1, head_dim=128, rope_dim=48)]


def case(dtype: str, shape: dict[str, int], seed: int, pages: int = 128, max_len: int = MAX_LEN):
    """Random numbers, the ops of both devices, K and V of all pages, the page tables, qkv(batch, scale) of a batch's rows."""
    rng, both = np.random.default_rng(seed), Both(dtype, pages, max_len, **shape)
    heads, kv_heads, d = shape["heads"], shape["kv_heads"], shape["head_dim"]
    k, v = [both.round(x) for x in [rng.standard_normal((pages, kv_heads, PAGE, d)) for _ in range(2)]]
    return rng, both, k, v, Pages(SLOTS, max_len, pages), lambda batch, scale=1.0: both.round(
        rng.standard_normal((len(batch["token"]), (heads + 2 * kv_heads) * d)) * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ATTENTION, ids=lambda s: f"d{s['head_dim']}x{s['heads']}/{s['kv_heads']}w{s.get('window', 0)}")
def test_attention(dtype, shape):
    _, both, k, v, table, qkv_of = case(dtype, shape, 3)
    heads, kv_heads = shape["heads"], shape["kv_heads"]
    decode = [(0, 1, 0), (1, 1, 31), (2, 1, 127), (3, 1, 128), (4, 1, 700), (5, 1, 255), (6, 1, 1), (7, 1, 33)]
    batch = make_batch(table, decode=decode, prefill=[(8, [1] * 150, 0), (9, [1] * 65, 300), (10, [1], 64), (11, [1] * 3, 62)], logits="none")
    qkv = qkv_of(batch)
    both.same("rope_store", batch, qkv, k, v, heads, kv_heads)
    # what the rows of this step stored is in the cache before they attend
    _, k, v = map(both.round, both.cpu.rope_store(batch, qkv, k, v, heads, kv_heads))
    eps = {"float32": 4e-6, "float16": 3e-3, "bfloat16": 2e-2}[dtype]
    both.same("attention", batch, qkv, k, v, heads, kv_heads, eps=eps)

    whole = both.cuda.attention(batch, qkv, k, v, heads, kv_heads)
    for row, one in ((4, decode[4]), (2, decode[2])):
        alone = both.cuda.attention(make_batch(table, decode=[one], logits="none"), qkv[row:row + 1], k, v, heads, kv_heads)
        np.testing.assert_array_equal(alone, whole[row:row + 1])
    start = len(decode)
    for first, count in ((0, 1), (0, 64), (64, 86), (7, 100), (149, 1)):
        part = make_batch(table, prefill=[(8, [1] * count, first)], logits="none")
        got = both.cuda.attention(part, qkv[start + first:start + first + count], k, v, heads, kv_heads)
        np.testing.assert_array_equal(got, whole[start + first:start + first + count])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ATTENTION + [dict(heads=2, kv_heads=1, head_dim=128, rope_dim=0, window=128)],
                         ids=lambda s: f"d{s['head_dim']}x{s['heads']}/{s['kv_heads']}w{s.get('window', 0)}")
def test_attention_of_prefill_rows_sees_its_own_positions(dtype, shape):
    """What lies behind the sequences' ends and in other pages, NaN even, changes no bit; chunks of any size equal the whole."""
    rng, both, k, v, table, qkv_of = case(dtype, shape, 5)
    heads, kv_heads, chunks = shape["heads"], shape["kv_heads"], [(8, 150, 0), (9, 65, 300), (10, 1, 64), (11, 3, 62), (12, 129, 255)]
    batch = make_batch(table, prefill=[(slot, [1] * count, first) for slot, count, first in chunks], logits="none")
    qkv = qkv_of(batch)
    eps = {"float32": 4e-6, "float16": 3e-3, "bfloat16": 2e-2}[dtype]
    both.same("attention", batch, qkv, k, v, heads, kv_heads, eps=eps)
    whole = both.cuda.attention(batch, qkv, k, v, heads, kv_heads)

    own = np.zeros((len(k), PAGE), bool)
    for slot, count, first in chunks:
        for position in range(first + count):
            own[table.table(slot, first + count)[position // PAGE], position % PAGE] = True
    spoiled = [np.where(own[:, None, :, None], x, np.nan) for x in (k, v)]
    np.testing.assert_array_equal(both.cuda.attention(batch, qkv, *spoiled, heads, kv_heads), whole)
    start = 0
    for slot, count, first in chunks:
        for _ in range(3):
            at = int(rng.integers(count))
            n = int(rng.integers(1, count - at + 1))
            part, rows = make_batch(table, prefill=[(slot, [1] * n, first + at)], logits="none"), slice(start + at, start + at + n)
            np.testing.assert_array_equal(both.cuda.attention(part, qkv[rows], *spoiled, heads, kv_heads), whole[rows])
        start += count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ATTENTION, ids=lambda s: f"d{s['head_dim']}x{s['heads']}/{s['kv_heads']}w{s.get('window', 0)}")
def test_rope_attention(dtype, shape):
    """Equals rope_store, then attention, bit for bit: decode rows alone, beside chunks, two of one sequence; chunks alone."""
    _, both, k, v, table, qkv_of = case(dtype, shape, 4)
    heads, kv_heads = shape["heads"], shape["kv_heads"]
    alone = [(0, 1, 0), (1, 1, 31), (2, 1, 127), (3, 1, 128), (4, 1, 700), (5, 1, 255), (6, 1, 1), (7, 1, 33)]
    for decode, prefill in ((alone, []), (alone[4:5], []), (alone, [(8, [1] * 70, 0), (9, [1] * 3, 300)]), (alone + [(4, 1, 701), (7, 1, 34)], []),
                            ([], [(8, [1] * 300, 0), (9, [1] * 3, 300)]), (alone + [(4, 1, 701)], [(8, [1] * 70, 0)])):
        batch = make_batch(table, decode=decode, prefill=prefill, logits="none")
        qkv = qkv_of(batch)
        turned, keys, values = both.cuda.rope_store(batch, qkv, k, v, heads, kv_heads)
        want = both.cuda.attention(batch, turned, keys, values, heads, kv_heads)
        for got, expected in zip(both.cuda.rope_attention(batch, qkv, k, v, heads, kv_heads), (want, keys, values)):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers,kv_heads,head_dim", [(1, 1, 8), (3, 5, 128), (2, 40, 128), (4, 3, 80), (1, 2, 256), (130, 1, 16)])
def test_copy_pages(dtype, layers, kv_heads, head_dim):
    rng, pages = np.random.default_rng(3), 24
    both = Both(dtype, pages, heads=kv_heads, kv_heads=kv_heads, head_dim=head_dim)
    k, v = (both.round(rng.standard_normal((layers, pages, kv_heads, PAGE, head_dim)).astype(np.float32)) for _ in range(2))
    batch = make_batch(Pages(SLOTS, MAX_LEN, pages), prefill=[(0, [1], 0)], logits="none")
    others = [p for p in range(pages) if p != batch["table"][0]]
    batch["copies"] = [(others[0], others[i], t) for i, t in enumerate((1, 7, 16, 30, 31), 1)] + [(others[7], others[8], 31)]
    for want, got, old in zip(*both.call("copy_pages", batch, k, v, kv_heads), (k, v)):
        np.testing.assert_array_equal(got, want)
        assert not np.array_equal(got, old)


FAR = [dict(heads=4, kv_heads=4, head_dim=128, rope_dim=32), dict(heads=8, kv_heads=1, head_dim=64, rope_dim=64),
       dict(heads=6, kv_heads=2, head_dim=128, rope_dim=128, window=1500), dict(heads=3, kv_heads=1, head_dim=96, rope_dim=0),
       dict(heads=1, kv_heads=1, head_dim=256, rope_dim=64), dict(heads=20, kv_heads=1, head_dim=64, rope_dim=16)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", FAR, ids=lambda s: f"d{s['head_dim']}x{s['heads']}/{s['kv_heads']}w{s.get('window', 0)}")
def test_attention_far(dtype, shape):
    """Contexts of many splits; 64 rows share a step with them or not; several rows of one sequence in a step."""
    _, both, k, v, table, qkv_of = case(dtype, shape, 4, pages=640, max_len=5000)
    heads, kv_heads = shape["heads"], shape["kv_heads"]
    decode = [(0, 1, 4498), (0, 1, 4499), (0, 1, 4500), (1, 1, 2047), (2, 1, 2048), (3, 1, 1151)] + [(s, 1, s) for s in range(4, 62)]
    batch = make_batch(table, decode=decode, prefill=[(62, [1] * 200, 4150)], logits="none")
    qkv = qkv_of(batch, 1.5)
    eps = {"float32": 8e-6, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
    both.same("attention", batch, qkv, k, v, heads, kv_heads, eps=eps)
    whole = both.cuda.attention(batch, qkv, k, v, heads, kv_heads)
    for rows in ([2], [0, 1, 2], [3], [4, 5], [5], list(range(8))):
        part = both.cuda.attention(make_batch(table, decode=[decode[r] for r in rows], logits="none"), qkv[rows], k, v, heads, kv_heads)
        np.testing.assert_array_equal(part, whole[rows])
    for first, count in ((0, 1), (0, 128), (128, 72), (57, 143), (199, 1)):
        part = make_batch(table, prefill=[(62, [1] * count, 4150 + first)], logits="none")
        rows = slice(len(decode) + first, len(decode) + first + count)
        np.testing.assert_array_equal(both.cuda.attention(part, qkv[rows], k, v, heads, kv_heads), whole[rows])
