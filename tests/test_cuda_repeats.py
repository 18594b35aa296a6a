"""The same step again has the same bits: kernels of a step start while others still run, and must not see what is not there yet."""
from __future__ import annotations

import numpy as np
import pytest
import test_cuda
from codefuse_triton._native import testing
from helpers import make_batch, pages_of
from test_tools import preset

pytestmark = test_cuda.pytestmark

# large enough that a launch takes as long as attention
SHAPE = dict(hidden=2048, heads=16, kv_heads=16, head_dim=128, rope_dim=128, intermediate=8192, layers=8, vocab=4096, max_positions=1024)


@pytest.mark.parametrize("format", ["f16", "q8_row", "q4_g128"])
def test_a_step_repeats_itself(tmp_path, format):
    r = testing.Runner(str(preset(tmp_path / format, format, **SHAPE)), device="cuda", dtype="float16")
    tokens = np.random.default_rng(0).integers(1, 4096, 601).tolist()
    for length in (20, 100, 300, 600):
        pages = pages_of(r)
        for start in range(0, length, 256):
            part = tokens[start:min(length, start + 256)]
            first = r.logits(make_batch(pages, prefill=[(0, part, start)], logits="last"))
        for _ in range(20):
            np.testing.assert_array_equal(r.logits(make_batch(pages, prefill=[(0, part, start)], logits="last")), first)
        steps = [r.logits(make_batch(pages, decode=[(0, tokens[length], length)], logits="last")).tobytes() for _ in range(200)]
        assert len(set(steps)) == 1, f"{len(set(steps))} results of one decode step at position {length}"


def test_rows_with_long_page_tables(tmp_path):
    """What 64 sequences of 65536 tokens send before a step is more than a kernel reads from the host, what 8 send is not: a row says the same."""
    r = testing.Runner(str(preset(tmp_path / "long", max_positions=65536)), device="cuda", dtype="float16", slots=64, kv_bytes=128 << 20)
    pages = pages_of(r)

    def says(slots: range, position: int) -> np.ndarray:
        """As it runs, recorded and replayed."""
        batch = make_batch(pages, decode=[(s, 1 + 64 * position + s, position) for s in slots], logits="last")
        runs = [r.logits(batch) for _ in range(3)]
        np.testing.assert_array_equal(runs[1], runs[0])
        np.testing.assert_array_equal(runs[2], runs[0])
        return runs[0]

    for position in range(3):
        np.testing.assert_array_equal(says(range(64), position), np.concatenate([says(range(s, s + 8), position) for s in range(0, 64, 8)]))
