"""Models on two GPUs: what one GPU says, the same every time, whoever else is there."""

import contextlib
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from codefuse_triton import Engine, devices
from codefuse_triton._native import testing

torch = pytest.importorskip("torch")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import convert  # noqa: E402
import test_cuda_engines  # noqa: E402
from helpers import make_batch, make_neox, pages_of, prompt_logits, runner  # noqa: E402
from test_tools import preset  # noqa: E402

GPUS = sum(name.startswith("cuda") for name in devices()[0])
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason=f"{GPUS} GPUs {devices()[1]}")]

SHAPE = test_cuda_engines.SHAPE
TOKENS = np.random.default_rng(5).integers(3, 131, 100).tolist()


@pytest.mark.parametrize("fields", [{}, dict(use_parallel_residual=False), dict(vocab_size=133, attention_bias=False), dict(hidden_size=128)])
def test_float32_equals_one_gpu(tmp_path, fields):
    """Shares that are no multiple of what kernels take at once, too: 2 heads of 24, 76 of 152 MLP columns."""
    _, native = make_neox(tmp_path, "f32", **fields)
    one, two = (runner(native, device="cuda", dtype="float32", tensor_parallel=n) for n in (1, 2))
    want, got = prompt_logits(one, TOKENS, chunk=33), prompt_logits(two, TOKENS, chunk=33)
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()
    for decode in (1, 3, 4):  # rows of one sequence after the other; recorded, replayed, padded
        batch = make_batch(pages_of(two), prefill=[(s, TOKENS[:10 + s], 0) for s in range(decode)], sample=[dict(temperature=1.0, seed=s) for s in range(decode)])
        assert two.step(batch)[0].tolist() == one.step(batch)[0].tolist()
        pages = pages_of(two)
        for i in range(8):
            batch = make_batch(pages, decode=[(s, testing.LAST_TOKEN, 10 + s + i) for s in range(decode)], sample=[dict(temperature=1.0, seed=9)] * decode)
            assert two.step(batch, i % 2)[0].tolist() == one.step(batch, i % 2)[0].tolist(), (decode, i)


def test_shares_that_need_padding(tmp_path):
    """76 of 152 MLP columns and 2 heads of 24, in 16 bits: the memory for it is allocated by the first step."""
    _, native = make_neox(tmp_path, "f16")
    want, got = (prompt_logits(runner(native, device="cuda", tensor_parallel=n), TOKENS, chunk=33) for n in (1, 2))
    assert np.abs(got - want).max() <= 0.02 * np.abs(want).max()


@pytest.mark.parametrize("changes", [{}, dict(kv_heads=4), dict(residual="serial"), dict(residual="parallel_one_norm"),
                                     dict(norm="rms", gated=True, activation="silu", residual="serial", kv_heads=8)])
@pytest.mark.parametrize("format", ["f16", "q8_row", "q4_g128"])
def test_float16_is_close_to_one_gpu_and_repeats_itself(tmp_path, format, changes):
    path = str(preset(tmp_path / "w", format, **{**SHAPE, "layers": 4, **changes}))
    tokens = np.random.default_rng(0).integers(1, 4096, 601).tolist()
    results = []
    for world in (1, 2):
        r = testing.Runner(path, device="cuda", dtype="float16", tensor_parallel=world, kv_bytes=256 << 20)
        pages, out = pages_of(r), []
        for start in range(0, 600, 200):
            first = r.logits(make_batch(pages, prefill=[(0, tokens[start:start + 200], start)]))
            for _ in range(10):
                np.testing.assert_array_equal(r.logits(make_batch(pages, prefill=[(0, tokens[start:start + 200], start)])), first)
            out.append(first)
        decode = make_batch(pages, decode=[(0, tokens[600], 600)])
        steps = [r.logits(decode) for _ in range(200)]
        assert len({s.tobytes() for s in steps}) == 1
        results.append(np.concatenate([*out, steps[0]]))
    want, got = results
    assert np.isfinite(got).all()
    assert np.abs(got - want).max() <= 0.02 * np.abs(want).max()


def test_greedy_text_of_the_demo_model(tmp_path):
    convert.convert(ROOT / "tools" / "demo" / "checkpoint", tmp_path / "w", progress=contextlib.nullcontext(lambda n: None))
    prompts = ["def fibonacci(n):\n", "import os\nimport sys\n\n\ndef main():\n", "x", "class Stack:\n    def __init__(self):\n        self.items = []\n"]
    said = []
    for world in (1, 2):
        with Engine(tmp_path / "w", device="cuda", dtype="float32", tensor_parallel=world, kv_memory_mb=256) as engine:
            said.append([engine.generate(p, max_tokens=100, ignore_eos=True).text for p in prompts])
    assert said[0] == said[1]


def ask(engine: Engine, out: list, n: int) -> None:
    out[n] = test_cuda_engines.texts(engine, n)


def work(paths: list[str]) -> None:
    """An engine on two GPUs: each stream says what it says alone; then two of them while engines on either GPU come and go."""
    options = {**test_cuda_engines.OPTIONS, "tensor_parallel": 2}
    streams = 12
    pairs = [Engine(path, **options) for path in paths[:2]]
    alone = [[test_cuda_engines.texts(e, n) for n in range(streams)] for e in pairs]
    together: list[list] = [[None] * streams for _ in pairs]
    ended, single = threading.Event(), {0: [], 1: []}

    def come_and_go(gpu: int) -> None:
        while not ended.is_set() or not single[gpu]:
            with Engine(paths[2], **{**test_cuda_engines.OPTIONS, "device": f"cuda:{gpu}"}) as third:
                single[gpu].append(test_cuda_engines.texts(third, 0))

    threads = [threading.Thread(target=ask, args=(pairs[e], together[e], n), daemon=True) for n in range(streams) for e in range(2)]
    others = [threading.Thread(target=come_and_go, args=(gpu,), daemon=True) for gpu in range(2)]
    for t in threads + others:
        t.start()
    for t in threads:
        t.join()
    ended.set()
    for t in others:
        t.join()
    for e in range(2):
        assert pairs[e].stats()["error"] == ""
        assert together[e] == alone[e], f"engine {e}"
    assert all(said == single[0][0] for gpu in range(2) for said in single[gpu])
    print("all the same")


def test_engines_beside_each_other(tmp_path):
    """In a process of its own, which can be ended when GPUs wait for each other forever."""
    paths = [str(preset(tmp_path / format, format, seed=i, **SHAPE)) for i, format in enumerate(("f16", "q4_g128", "q8_row"))]
    code = f"from test_cuda_ranks import work; work({paths!r})"
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0 and run.stdout.endswith("all the same\n"), run.stdout + run.stderr


def test_reopening_leaves_no_memory_behind(tmp_path):
    path = preset(tmp_path / "w", "f16", **SHAPE)
    gpus = [testing.Ops(f"cuda:{i}", "float16") for i in range(2)]
    said, free = [], []
    for _ in range(5):
        with Engine(path, device="cuda", tensor_parallel=2, kv_memory_mb=512) as engine:
            said.append(engine.generate([5, 6, 7], max_tokens=20, ignore_eos=True).token_ids.tolist())
            inside = [g.free_memory for g in gpus]
        del engine  # which has the memory
        free.append([g.free_memory for g in gpus])
    assert all(s == said[0] for s in said)
    assert min(after - before for before, after in zip(inside, free[-1])) > 256 << 20
    assert all(abs(a - b) <= 8 << 20 for now in free[1:] for a, b in zip(now, free[0]))


def test_refused(tmp_path):
    _, native = make_neox(tmp_path, "f32")
    with pytest.raises(ValueError, match=f"tensor_parallel is {GPUS + 1}, one GPU each; from cuda:0 there are {GPUS}"):
        runner(native, device="cuda", tensor_parallel=GPUS + 1)
    with pytest.raises(ValueError, match=f"tensor_parallel is 2, one GPU each; from cuda:{GPUS - 1} there is 1"):
        runner(native, device=f"cuda:{GPUS - 1}", tensor_parallel=2)
    _, odd = make_neox(tmp_path / "odd", "f32", num_attention_heads=3)
    with pytest.raises(ValueError, match="tensor_parallel is 2, but the model's heads, 3, is not divisible by it"):
        runner(odd, device="cuda", tensor_parallel=2)
