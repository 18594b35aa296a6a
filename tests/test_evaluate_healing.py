"""tools/evaluate_healing.py on a few lines of the demo model's held-out code: what docs/cursor.md reports of many."""
import contextlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import convert  # noqa: E402
import evaluate_healing as tool  # noqa: E402


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "weights"
    convert.convert(ROOT / "tools" / "demo" / "checkpoint", path, progress=contextlib.nullcontext(lambda n: None))
    return path


def held_out():
    return [d["text"] for d in map(json.loads, tool.HELD_OUT.read_text().splitlines()) if "text" in d]


def test_healing_is_near_the_oracle(weights):
    f = tool.evaluate(weights, held_out(), lines=3, context_chars=256)
    assert f.cuts > 60 and f.broken == 0 and f.moved == 0 and f.healed > f.cuts // 2
    lost = f.nats_per_byte("healing") - f.nats_per_byte("oracle")
    assert 0 <= lost < 0.03 and f.nats_per_byte("plain") - f.nats_per_byte("oracle") > 10 * lost
    assert f.exact["healing"] >= f.exact["plain"]
    assert f.table().count("\n") == 4


def test_scores_are_the_engines(weights):
    """The scorer's log-probabilities, with keys and values of the call before, against the engine's own."""
    scorer = tool.Scorer(weights, "cpu")
    with tool.Engine(weights, device="cpu", slots=1) as engine:
        for prompt in ("def add(a, b):\n    return", "def add(a, b):\n    retur", "class A:\n"):
            ids = engine.vocab.encode(prompt)
            r = engine.generate(ids, max_tokens=5, ignore_eos=True, logprobs=True)
            tokens = r.token_ids.tolist()
            rows = scorer.log_probs(ids + tokens, len(ids))
            assert rows.shape == (5, scorer.runner.vocab)
            assert [row[t] for row, t in zip(rows, tokens)] == pytest.approx(r.logprobs.tolist(), abs=1e-4)


def test_cut_token():
    table = [b"a", b"bcd", b"ef"]
    vocab = type("V", (), {"token_bytes": table})
    assert [tool.split(vocab, [0, 1, 2], size) for size in range(7)] == [
        (0, b""), (1, b""), (1, b"b"), (1, b"bc"), (2, b""), (2, b"e"), (3, b"")]
