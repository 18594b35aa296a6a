"""tools/evaluate.py: figures against their definitions, completed lines against real greedy decoding, what quantize does with them, and the
demo model quantized."""

import contextlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from codefuse_triton import Engine, Vocab

torch = pytest.importorskip("torch")
from helpers import add_byte_tokenizer, make_neox, prompt_logits, runner  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import calibration  # noqa: E402
import convert  # noqa: E402
import evaluate as tool  # noqa: E402
import gptq_layers  # noqa: E402
import quantize  # noqa: E402
from checkpoint import CheckpointError  # noqa: E402


def quiet():
    return contextlib.nullcontext(lambda n: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Native directory with a byte tokenizer, in float32."""
    path = tmp_path_factory.mktemp("model")
    _, native = make_neox(path, vocab_size=260, hidden_size=128, intermediate_size=256)
    add_byte_tokenizer(native)
    return native


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "f16"
    convert.convert(ROOT / "tools" / "demo" / "checkpoint", path, progress=quiet())
    return path


def test_figures_are_what_their_names_say(tmp_path, model):
    quantize.quantize(model, tmp_path / "q", "q4_g128", progress=quiet())
    vocab, texts = Vocab.load(model), calibration.held_out()[:4]
    got = tool.evaluate(model, tmp_path / "q", vocab, texts, "text", 1000, "cpu", quiet())
    windows = calibration.windows(vocab, texts, 160, 6)
    assert got["windows"] == 6 and got["tokens"] == 6 * 159 and got["text"] == "text"
    p, q = (torch.from_numpy(np.stack([prompt_logits(runner(d, threads=0), w[:-1].tolist()) for w in windows])).double().log_softmax(-1) for d in (model, tmp_path / "q"))
    after = torch.from_numpy(windows[:, 1:])[..., None]
    nats, other = (-x.gather(2, after).mean() for x in (p, q))
    kl = (p.exp() * (p - q)).sum(-1)
    want = {"perplexity_original": nats.exp(), "perplexity": other.exp(), "perplexity_ratio": (other - nats).exp(), "kl_mean": kl.mean(), "kl_max": kl.max(),
            "greedy_agreement": (p.argmax(-1) == q.argmax(-1)).double().mean()}
    for key, value in want.items():
        assert got[key][0] == pytest.approx(float(value), rel=1e-4), key
        assert got[key][1] <= got[key][0] <= got[key][2] or key == "kl_max"
    assert 0.001 < got["kl_mean"][0] < 1 and got["greedy_agreement"][0] < 1


def test_a_model_against_itself(model):
    got = tool.evaluate(model, model, Vocab.load(model), calibration.held_out()[:4], "text", 1000, "cpu", quiet())
    assert got["perplexity_ratio"] == got["greedy_agreement"] == [1, 1, 1] and got["kl_mean"] == got["kl_max"] == [0, 0, 0]
    assert got["lines_completed"] == got["lines_completed_original"]


def test_intervals_are_those_of_the_mean():
    rng = np.random.default_rng(0)
    rows = np.zeros((80, 9))
    rows[:, 0], rows[:, 5], rows[:, 6] = 100, rng.binomial(100, 0.9, 80), 1
    rows[:, 1] = 100 * rng.normal(2, 0.3, 80)
    rows[:, 2] = rows[:, 1] + 1
    got, error = tool._summary(rows), 1.96 * rows[:, 5].std(ddof=1) / 100 / math.sqrt(80)
    value, low, high = got["greedy_agreement"]
    assert value == pytest.approx(rows[:, 5].mean() / 100)
    assert low == pytest.approx(value - error, abs=0.15 * error) and high == pytest.approx(value + error, abs=0.15 * error)
    # the same windows for both models: what they have in common does not blur the ratio
    assert got["perplexity_ratio"] == pytest.approx([math.exp(0.01)] * 3, rel=1e-5) and got["perplexity"][2] > 1.03 * got["perplexity"][0]


def test_lines():
    vocab = Vocab(lambda text: [], [b"a", b" b", b"\n", b";\n  ", b";\nx", b"c"], ())
    ids = np.array([1, 2, 0, 1, 5, 3, 0, 5, 1, 2, 2, 5])
    lines = tool.lines_of(ids, vocab)
    assert lines == [(4, 5), (8, 9)]  # "c;" of "a bc;" and " b\n" of "ac b\n"; the first line, the empty and the unfinished one are left out
    choice = np.array([9, 9, 9, 5, 4, 9, 9, 1, 2, 9, 9])
    assert tool._completed(choice, ids, lines[0], vocab)  # another end token with the same text before the newline
    assert tool._completed(choice, ids, lines[1], vocab)
    for at, wrong in ((3, 0), (4, 2), (4, 5), (7, 0), (8, 3)):
        other = choice.copy()
        other[at] = wrong
        assert not tool._completed(other, ids, lines[at > 6], vocab)


def test_completed_lines_are_those_that_greedy_decoding_writes(demo):
    vocab = Vocab.load(demo)
    ids, = calibration.windows(vocab, calibration.held_out(), 400, 1, seed=2)
    logits = np.concatenate(list(tool.Logits(demo, 400, "cpu").window(ids[:-1])))
    lines = tool.lines_of(ids, vocab)[:24]
    marks = [tool._completed(logits.argmax(1), ids, line, vocab) for line in lines]
    with Engine(str(demo), device="cpu") as engine:
        for (s, e), mark in zip(lines, marks):
            result = engine.generate(ids[:s].tolist(), max_tokens=e - s + 8, temperature=0, stop=["\n"])
            assert mark == (result.finish_reason == "stop" and result.text.encode() == vocab.decode(ids[s:e + 1].tolist()).split(b"\n")[0]), (s, e, result)
    assert any(marks) and not all(marks)


def gate(**options) -> quantize.Gate:
    return quantize.Gate(calibration.held_out()[:2], "text", **{"tokens": 600, "device": "cpu", **options})


def test_quantize_measures_and_refuses(tmp_path, model, monkeypatch):
    config = quantize.quantize(model, tmp_path / "q", "q8_row", gate=gate(max_loss=50), progress=quiet())
    stored = json.loads((tmp_path / "q" / "config.json").read_text())
    assert "quality" not in config and stored["quality"]["windows"] == 3 and stored["formats"]["method"] == "nearest"
    assert {k: v for k, v in stored.items() if k in config} == config
    before = {f.name: f.read_bytes() for f in (tmp_path / "q").iterdir()}
    for target in ("q", "other"):
        with pytest.raises(quantize.Refused, match="perplexity rises by .* %, more than --max-loss -90; nothing was written"):
            quantize.quantize(model, tmp_path / target, "q4_g64", gate=gate(max_loss=-90), progress=quiet())
    assert {f.name: f.read_bytes() for f in (tmp_path / "q").iterdir()} == before and not (tmp_path / "other").exists()
    quantize.quantize(model, tmp_path / "other", "q4_g64", gate=gate(max_loss=-90, accept=True), progress=quiet())
    assert runner(tmp_path / "other").vocab == 260

    # GPTQ's layers are kept for a run that accepts the result, and go with it
    how = quantize.Gptq(calibration.held_out()[:2], "text", 4, 64, "cpu")
    with pytest.raises(quantize.Refused):
        quantize.quantize(model, tmp_path / "g", "q4_g64", gate=gate(max_loss=-90), progress=quiet(), gptq=how)
    assert [f.name for f in (tmp_path / "g").iterdir()] == [".gptq"]
    monkeypatch.setattr(gptq_layers.LayerRun, "_layer", None)
    quantize.quantize(model, tmp_path / "g", "q4_g64", gate=gate(accept=True), progress=quiet(), gptq=how)
    assert sorted(f.name for f in (tmp_path / "g").iterdir()) == ["config.json", "model-00001-of-00001.safetensors", "tokenizer.json"]
    assert quantize.Gate([], "").limit("q8_row") == 0.5 and quantize.Gate([], "").limit("q4_g64") == quantize.Gate([], "").limit("q4_g128") == 10


def test_command_line(tmp_path, model, capsys):
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps(d) for d in ({"about": "none"}, *({"text": t} for t in calibration.held_out()[:3]))))
    options = [str(tmp_path / "q"), "--format", "q8_row", "--evaluate", str(text), "--evaluate-tokens", "640", "--device", "cpu", "--max-loss", "50"]
    assert quantize.main([str(model), *options]) == 0
    assert json.loads((tmp_path / "q" / "config.json").read_text())["quality"]["text"] == "text.jsonl"
    options = ["--text", str(text), "--tokens", "640", "--device", "cpu"]
    capsys.readouterr()
    assert tool.main([str(model.parent / "hf"), str(tmp_path / "q"), *options, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["windows"] == 4 and figures["perplexity_ratio"][0] == pytest.approx(1, abs=0.01)
    assert sorted(f.name for f in (tmp_path / "q").iterdir()) == ["config.json", "model-00001-of-00001.safetensors", "tokenizer.json"]
    assert tool.main([str(model), str(tmp_path / "q"), *options]) == 0
    assert "greedy agreement" in capsys.readouterr().out
    for bad, message in (([str(tmp_path), str(tmp_path / "q")], "config.json: no such file"),
                         ([str(model), str(model.parent / "hf")], "neither tokenizer.json nor tokenizer.model")):
        assert tool.main([*bad[:2], *options, *bad[2:]]) == 1
        assert message in capsys.readouterr().err


def test_models_of_different_vocabularies_are_refused(tmp_path, model):
    _, other = make_neox(tmp_path)
    with pytest.raises(CheckpointError, match="vocab is 131; the original's is 260"):
        tool.evaluate(model, other, Vocab.load(model), calibration.held_out()[:2], "text", 600, "cpu", quiet())


def test_demo_model(tmp_path, demo, record_property):
    """8 bits keep the model; 4 bits keep more of it with GPTQ than by rounding."""
    vocab, texts, quality = Vocab.load(demo), calibration.held_out(), {}
    how = quantize.Gptq(calibration.standard_library(), calibration.STANDARD_LIBRARY, 8, device="cpu")
    for name, format, gptq in (("q8_row", "q8_row", None), ("nearest", "q4_g128", None), ("gptq", "q4_g128", how)):
        quantize.quantize(demo, tmp_path / name, format, progress=quiet(), gptq=gptq)
        quality[name] = q = tool.evaluate(demo, tmp_path / name, vocab, texts, "held out", 5_000, "cpu", quiet())
        record_property(name, tool.shown(q))
        print(tool.shown(q))
    eight, nearest, gptq = quality["q8_row"], quality["nearest"], quality["gptq"]
    assert abs(eight["perplexity_ratio"][0] - 1) < 0.001 and eight["greedy_agreement"][2] > 0.99
    assert gptq["perplexity_ratio"][0] < nearest["perplexity_ratio"][1] < nearest["perplexity_ratio"][2] < 1.1
    assert gptq["kl_mean"][0] < 0.7 * nearest["kl_mean"][0] and gptq["greedy_agreement"][0] > nearest["greedy_agreement"][0] + 0.01
