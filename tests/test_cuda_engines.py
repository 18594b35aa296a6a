"""Several engines of one process on one GPU: their steps take turns (native/cuda/turns.h), and each says what it says alone. In a process of
its own, which can be ended when kernels wait for each other forever."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import test_cuda
from codefuse_triton import Engine
from test_tools import preset

pytestmark = test_cuda.pytestmark

SHAPE = dict(hidden=2048, heads=16, kv_heads=16, head_dim=128, rope_dim=128, intermediate=8192, layers=8, vocab=4096, max_positions=1024)
OPTIONS = dict(device="cuda:0", slots=16, prefill_tokens=256, kv_memory_mb=1024, prefix_cache="off")
THREADS, ROUNDS = 20, 4  # more threads than slots: prompts join while others decode


def texts(engine: Engine, n: int) -> list[list[int]]:
    """What thread n asks an engine: prompts of 1 to 700 tokens, greedy and sampled."""
    rng = np.random.default_rng(n)
    out = []
    for i in range(ROUNDS):
        prompt = rng.integers(1, 4096, int(rng.integers(1, 700))).tolist()
        out.append(engine.generate(prompt, max_tokens=48, ignore_eos=True, temperature=i % 2 * 0.9, seed=100 * n + i).token_ids.tolist())
    return out


def work(paths: list[str]) -> None:
    """Two engines one after the other, then together while a third one comes and goes."""
    engines = [Engine(path, **OPTIONS) for path in paths[:2]]
    alone = [[texts(e, n) for n in range(THREADS)] for e in engines]
    together: list[list] = [[None] * THREADS for _ in engines]
    ended = threading.Event()
    loads = []

    def ask(e: int, n: int) -> None:
        together[e][n] = texts(engines[e], n)

    def come_and_go() -> None:
        while not ended.is_set() or not loads:
            with Engine(paths[2], **OPTIONS) as third:
                loads.append(texts(third, 0))

    threads = [threading.Thread(target=ask, args=(e, n), daemon=True) for n in range(THREADS) for e in range(2)]
    other = threading.Thread(target=come_and_go, daemon=True)
    for t in (*threads, other):
        t.start()
    for t in threads:
        t.join()
    ended.set()
    other.join()
    for e in range(2):
        assert together[e] == alone[e], f"engine {e}"
        assert engines[e].stats()["error"] == ""
    engines.pop(0).close()  # and its memory goes: the other one goes on alone
    assert texts(engines[0], 0) == alone[1][0]
    assert loads and all(said == loads[0] for said in loads)
    print(f"{len(loads)} loads")


def test_engines_beside_each_other(tmp_path):
    paths = [str(preset(tmp_path / format, format, seed=i, **SHAPE)) for i, format in enumerate(("f16", "q4_g128", "q8_row"))]
    code = f"from test_cuda_engines import work; work({paths!r})"
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and run.stdout.endswith(" loads\n"), run.stdout + run.stderr
