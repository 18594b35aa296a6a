"""The bundled demo model, converted and run by our engine: transformers' greedy text in any company, the card's perplexity,
fill in the middle that parses."""

import ast
import contextlib
import math
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from codefuse_triton import Engine, Vocab, devices
from codefuse_triton._native import testing

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "tools" / "demo" / "checkpoint"
for directory in (ROOT / "tools", ROOT / "tools" / "demo"):
    sys.path.insert(0, str(directory))
import convert  # noqa: E402
import heldout  # noqa: E402
import spm  # noqa: E402
from fake_model import held  # noqa: E402
from helpers import Pages, make_batch  # noqa: E402

WINDOW = 1024  # of the card's protocol
NEW_TOKENS = 64
PROMPTS = [
    'def fibonacci(n):\n    """Return the first n Fibonacci numbers."""\n',
    "import os\nimport sys\n\n\ndef main():\n    parser = argparse.ArgumentParser(",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "# language: Python\n# read a JSON file and return its contents\ndef load_json(path):\n",
    "for i in range(10):\n    pri",
    "# 文字列を逆順にする\ndef reverse(s):\n",
    "x",
    "\n".join(f"    def method_{i}(self, value):\n        self.value_{i} = value\n" for i in range(24)),  # 17 KV pages
]


CUDA = any(name.startswith("cuda") for name in devices()[0])
ON = pytest.mark.parametrize("on", [
    pytest.param(dict(device="cpu"), id="cpu"),
    pytest.param(dict(device="cuda", dtype="float32"), id="cuda",
                 marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason=f"no CUDA device: {devices()[1]}")]),
])


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "weights"
    convert.convert(CHECKPOINT, path, progress=contextlib.nullcontext(lambda n: None))
    return path


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """transformers' greedy completions of PROMPTS in float32."""
    from transformers import GPTNeoXForCausalLM

    model = GPTNeoXForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    tokenizer = spm.Tokenizer((CHECKPOINT / "tokenizer.model").read_bytes())
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        new = out[0, ids.shape[1]:].tolist()
        texts.append(tokenizer.decode(new[:new.index(spm.EOS_ID)] if spm.EOS_ID in new else new))
    return texts


def test_size():
    assert sum(f.stat().st_size for f in CHECKPOINT.rglob("*")) <= 25_000_000


@ON
def test_greedy_text_alone(weights, expected, on):
    with Engine(weights, **on) as engine:
        for prompt, want in zip(PROMPTS, expected):
            assert engine.generate(prompt, max_tokens=NEW_TOKENS, token_healing=False).text == want
            assert b"".join(c.text for c in engine.stream(prompt, max_tokens=NEW_TOKENS, token_healing=False)).decode() == want


VARIANTS = {
    "together": dict(slots=8),
    "prompts in chunks of 7": dict(slots=4, prefill_tokens=7),
    "preempted": dict(slots=8, max_len=128, kv_bytes=3 << 20),  # 6 pages of 32 tokens; the long prompt, the last, does not fit
}


@ON
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_text_in_company(weights, expected, variant, on):
    vocab = Vocab.load(weights)
    with Engine._of(testing.held_engine(str(weights), vocab.token_bytes, **on, **VARIANTS[variant]), vocab) as engine:
        prompts = PROMPTS[:-1] if variant == "preempted" else PROMPTS
        got: list[str] = [""] * len(prompts)

        def one(i: int) -> None:
            got[i] = engine.generate(prompts[i], max_tokens=NEW_TOKENS, token_healing=False).text

        threads = [threading.Thread(target=one, args=(i,)) for i in range(len(prompts))]
        with held(engine, len(prompts)):
            for t in threads:
                t.start()
        for t in threads:
            t.join()
        assert got == expected[:len(prompts)]
        assert (engine.stats()["preemptions"] > 0) == (variant == "preempted")


def test_tokens_are_the_demo_tokenizers(weights):
    """ids, and bytes back, of text with a literal U+2581, control symbols written out, and every kind of character."""
    tokenizer = spm.Tokenizer((CHECKPOINT / "tokenizer.model").read_bytes())
    with Engine(weights, device="cpu", slots=1) as engine:
        for text in ["▁ ▁▁x", "<|endoftext|><fim_middle>", " \t\n  é文🙂\u0000\u200b", "", "if x:\n        return 1\n"]:
            ids = engine.vocab.encode(text)
            assert ids == tokenizer.encode(text) and spm.EOS_ID not in ids
            assert engine.vocab.decode(ids) == text.encode()
        assert engine.vocab.eos_ids == [spm.EOS_ID]
        assert [engine.vocab.special_id(p) for p in spm.FIM_PIECES] == [spm.FIM_PREFIX_ID, spm.FIM_MIDDLE_ID, spm.FIM_SUFFIX_ID]


def test_held_out_perplexity_is_the_cards(weights):
    card = (CHECKPOINT / "README.md").read_text()
    row = re.search(r"`tools/demo/heldout.jsonl` \| (\d+) \| \d+ \| (\d+) \| ([\d.]+) \| ([\d.]+) \|", card)
    documents, count, loss, perplexity = int(row[1]), int(row[2]), float(row[3]), float(row[4])
    tokenizer = spm.Tokenizer((CHECKPOINT / "tokenizer.model").read_bytes())
    runner = testing.Runner(str(weights), slots=1, prefill_rows=testing.DECODE_ROWS, max_len=WINDOW)
    nats, seen, texts = 0.0, 0, [d.text for d in heldout.load()]
    for text in texts:
        ids = [spm.EOS_ID, *tokenizer.encode(text), spm.EOS_ID]
        for start in range(0, len(ids) - 1, WINDOW):
            window = ids[start:start + WINDOW + 1]
            nats -= log_likelihood(runner, window)
            seen += len(window) - 1
    assert (len(texts), seen) == (documents, count)
    assert nats / seen == pytest.approx(loss, abs=2e-4)
    assert math.exp(nats / seen) == pytest.approx(perplexity, abs=2e-3)


def log_likelihood(runner: testing.Runner, ids: list[int]) -> float:
    """Sum of log p(ids[i + 1] | ids[: i + 1]), the window run in chunks."""
    pages, total, step = Pages(runner.slots, runner.max_len, runner.pages), 0.0, testing.DECODE_ROWS
    for start in range(0, len(ids) - 1, step):
        part = ids[start:min(start + step, len(ids) - 1)]
        logits = runner.logits(make_batch(pages, prefill=[(0, part, start)], logits="all")).astype(np.float64)
        top = logits.max(1)
        chosen = logits[np.arange(len(part)), ids[start + 1:start + 1 + len(part)]]
        total += float((chosen - top - np.log(np.exp(logits - top[:, None]).sum(1))).sum())
    return total


FIM = [
    ("def area(width, height):\n    return ", "\n\n\ndef volume(width, height, depth):\n    return width * height * depth\n"),
    ("import os\n\n\ndef exists(path):\n    return ", "\n\n\nprint(exists('x'))\n"),
    ("class Point:\n    def __init__(self, x, y):\n        self.x = ", "\n        self.y = y\n"),
    ("values = [1, 2, 3]\nfor value in ", ":\n    print(value)\n"),
]


def test_fill_in_the_middle_is_python(weights):
    """The rest of a line, in suffix-prefix-middle order (the order a model of this size has learned best): most parse."""
    good = 0
    with Engine(weights, device="cpu") as engine:
        encode = engine.vocab.encode
        for prefix, suffix in FIM:
            result = engine.generate(prefix, suffix=suffix, fim_mode="spm", max_tokens=48, stop=["\n"])
            prompt = [spm.FIM_PREFIX_ID, spm.FIM_SUFFIX_ID, *encode(suffix), spm.FIM_MIDDLE_ID, *encode(prefix)]
            assert result.num_input_tokens == len(prompt)
            plain = engine.generate(prefix, suffix=suffix, fim_mode="spm", max_tokens=48, stop=["\n"], token_healing=False)
            assert plain.text == engine.generate(prompt, max_tokens=48, stop=["\n"]).text
            with contextlib.suppress(SyntaxError):
                ast.parse(prefix + result.text + suffix)
                good += bool(result.text.strip())
    assert good >= 3
