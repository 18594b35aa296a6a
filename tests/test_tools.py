"""tools/bench_engine.py on tiny presets, random weights made at load, and what README.md claims."""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from codefuse_triton import Engine, LoadError, devices
from codefuse_triton._native import copy_bandwidth, read_bandwidth

ROOT = Path(__file__).parent.parent
TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))
import bench_engine  # noqa: E402
import bench_keystrokes  # noqa: E402
import convert  # noqa: E402

CUDA = any(name.startswith("cuda") for name in devices()[0])
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason=f"no CUDA device: {devices()[1]}")]
QUICK = ["--threads", "2", "--repeats", "2", "--shapes", "16/8,64/32,1024/512", "--streams", "1,3", "--stream-shape", "20/10"]


def preset(path: Path, dtype: str = "f16", seed: int = 0, **changes) -> Path:
    convert.write_random("gptneox-tiny", path, dtype, seed, on_disk=False)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    return path


def tokens(path: Path, **options) -> list[int]:
    with Engine(path, device="cpu", threads=2, **options) as engine:
        return engine.generate([5, 6, 7, 8], max_tokens=24, ignore_eos=True).token_ids.tolist()


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_random_weights_follow_their_seed(tmp_path, dtype):
    first = tokens(preset(tmp_path / "a", dtype))
    assert not list((tmp_path / "a").glob("*.safetensors"))
    assert tokens(preset(tmp_path / "b", dtype)) == first
    assert tokens(preset(tmp_path / "c", dtype, seed=1)) != first
    assert tokens(tmp_path / "a", tensor_parallel=2) == first
    convert.write_random("gptneox-tiny", tmp_path / "d", dtype, 0, on_disk=True)
    assert "random" not in json.loads((tmp_path / "d" / "config.json").read_text()) and tokens(tmp_path / "d") == first


@pytest.mark.parametrize("shape", [
    dict(residual="serial"), dict(residual="parallel_one_norm"), dict(tied=True), dict(norm="rms", gated=True, activation="silu"),
    dict(position="learned"), dict(kv_heads=1),
])
def test_random_weights_of_every_shape(tmp_path, shape):
    assert len(tokens(preset(tmp_path / "w", **shape))) == 24


@pytest.mark.parametrize("random, message", [
    ({"format": "f16"}, "random: seed is missing"), ({"seed": -1, "format": "f16"}, "random: seed is -1"),
    ({"seed": 0, "format": "q9"}, "random: format is 'q9'"), ({"seed": 0}, "random: format is missing"),
])
def test_random_weights_of_a_bad_spec(tmp_path, random, message):
    preset(tmp_path / "w", random=random)
    with pytest.raises(LoadError, match=message):
        Engine(tmp_path / "w", device="cpu")


def test_random_weights_look_normal(tmp_path):
    """The logits of one token are a mean of many weights: their scale tells that of the weights."""
    from codefuse_triton._native import testing
    from helpers import prompt_logits, runner

    logits = prompt_logits(runner(preset(tmp_path / "w", "f32")), [1, 2, 3])
    assert testing is not None and np.isfinite(logits).all()
    assert logits.std() == pytest.approx(0.02 * 128**0.5, rel=0.2)  # the last norm's output has variance 1
    assert abs(logits.mean()) < 0.05


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU), pytest.param("cuda:0", marks=ON_GPU)])
def test_read_bandwidth_of_the_gpu(device):
    assert 1e11 < read_bandwidth(device) < 1e14


def test_read_bandwidth():
    assert 1e8 < read_bandwidth("cpu", 2) < 1e13
    for device, message in [("tpu", "device is 'tpu'"), ("cuda:x", "cuda:x"), ("cuda:99", "device is 'cuda:99', but only cpu")]:
        with pytest.raises(ValueError, match=message):
            read_bandwidth(device)
    with pytest.raises(ValueError, match="threads is -1"):
        read_bandwidth("cpu", -1)


def run_bench(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(TOOLS / "bench_engine.py"), *arguments], capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_bench_of_a_preset(tmp_path, device):
    run = run_bench("--random", "gptneox-tiny", "--device", device, *QUICK, "--json", str(tmp_path / "out.json"))
    assert run.returncode == 0, run.stderr
    assert "skipped 1024/512: longer than max_len 512" in run.stdout and " 64/32 |" in run.stdout
    figures = json.loads((tmp_path / "out.json").read_text())
    assert [s["shape"] for s in figures["shapes"]] == ["16/8", "64/32"]
    assert figures["weights"] == "gptneox-tiny" and figures["device"].startswith(device) and figures["date"] and figures["device_name"]
    for row in figures["shapes"]:
        for what in ("total_ms", "ttft_ms", "decode_tokens_s"):
            assert 0 < row[what]["min"] <= row[what]["median"] <= row[what]["max"]
        assert row["ttft_ms"]["median"] <= row["total_ms"]["median"]
        assert row["percent_of_bandwidth"] == pytest.approx(1e2 * row["gb_s"] / figures["read_bandwidth_gb_s"])
    assert [(s["streams"], s["shape"]) for s in figures["streams"]] == [(1, "20/10"), (3, "20/10")]


def test_bytes_of_a_step(tmp_path):
    with Engine(preset(tmp_path / "w"), device="cpu") as engine:
        hidden, inter, vocab, layers = 128, 512, 1000, 2
        weights = 2 * (layers * (4 * hidden * hidden + 2 * hidden * inter) + vocab * hidden)
        assert weights <= engine.weight_bytes <= 1.03 * weights  # and the biases, in float32
        kv = 2 * layers * hidden * 4
        assert bench_engine.step_bytes(engine, bench_engine.Shape(100, 20)) == engine.weight_bytes + 110 * kv


def test_bench_beside_transformers(tmp_path):
    pytest.importorskip("transformers")
    run = run_bench("--random", "gptneox-tiny", "--device", "cpu", "--repeats", "1", "--shapes", "16/8", "--streams", "", "--beside", "transformers",
                    "--json", str(tmp_path / "out.json"))
    assert run.returncode == 0, run.stderr
    assert "beside transformers" in run.stdout
    row = json.loads((tmp_path / "out.json").read_text())["shapes"][0]
    assert row["times_transformers"]["total"] == pytest.approx(row["transformers"]["total_ms"]["median"] / row["total_ms"]["median"])


def test_bench_plot(tmp_path):
    run = run_bench("--random", "gptneox-tiny", "--device", "cpu", *QUICK, "--plot", str(tmp_path / "out.png"))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert run.returncode == 1 and "pip install matplotlib" in run.stderr
    else:
        assert run.returncode == 0 and (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def run_bench_load(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(TOOLS / "bench_load.py"), *arguments], capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("format", ["f16", "q8_row"])
def test_bench_load(tmp_path, device, format):
    run = run_bench_load("--random", "gptneox-tiny", "--format", format, "--write", str(tmp_path / "w"), "--device", device, "--repeats", "2",
                         "--json", str(tmp_path / "out.json"))
    assert run.returncode == 0, run.stderr
    assert "written in" in run.stdout and not (tmp_path / "w").exists()
    loads = json.loads((tmp_path / "out.json").read_text())["loads"]
    assert len(loads) == 2
    for x in loads:
        assert 0 < x["python_s"] < x["ready_s"] < x["first_token_s"] and x["device_s"] + x["weights_s"] <= x["load_s"] < x["ready_s"]
        assert x["device"].startswith(device) and x["weight_bytes"] > 5e5 and 1e7 < x["anonymous_bytes"] <= x["peak_rss_bytes"]
        assert x["verified_s"] > 0 and (device == "cpu" or 0 < x["percent_of_copy"] < 100)


@pytest.mark.parametrize("arguments, message", [
    ([], "either a weights directory, or"), (["--random", "gptneox-tiny"], "--random PRESET and --write DIR"), (["w", "--write", "x"], "either"),
    (["nowhere"], "nowhere"), (["--random", "gpt-9", "--write", "x"], "preset is 'gpt-9'"), (["--random", "gptneox-tiny", "--write", "."], "--write . exists"),
])
def test_bench_load_refuses(arguments, message):
    run = run_bench_load(*arguments)
    assert run.returncode != 0 and message in run.stderr and "Traceback" not in run.stderr


def test_copy_bandwidth():
    with pytest.raises(ValueError, match="device is 'cpu'; expected cuda or cuda:N"):
        copy_bandwidth("cpu")
    if CUDA:
        assert 1e9 < copy_bandwidth("cuda") < 1e12


@pytest.mark.parametrize("arguments, message", [
    ([], "either a weights directory or --random"), (["--random", "gpt-9"], "preset is 'gpt-9'; known are gptneox-13b"),
    (["nowhere"], "nowhere"), (["--random", "gptneox-tiny", "--shapes", "8"], "shape is '8'; expected PROMPT/OUTPUT"),
    (["x", "--beside", "transformers"], "needs --hf DIR"), (["--random", "gptneox-tiny", "--device", "tpu"], "tpu"),
])
def test_bench_refuses(arguments, message):
    run = run_bench(*arguments)
    assert run.returncode != 0 and message in run.stderr and "Traceback" not in run.stderr


README = (ROOT / "README.md").read_text()


def test_readme_tables_are_the_contract():
    import readme_tables

    assert README.count("<!-- table:") == len(readme_tables.TABLES)
    assert readme_tables.filled(README) == README, "run tools/readme_tables.py"


def test_readme_names_files_that_exist():
    named = set(re.findall(r"(?:native|tools|tests|docs|backend_src|model_repository|client)/[\w./-]*\w", README)) - {"model_repository/generator/1"}
    assert len(named) > 15
    assert not [name for name in named if not (ROOT / name).exists()]
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).is_file(), link


def test_readme_engine_example_runs(tmp_path, monkeypatch, capsys):
    example = next(code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "Engine" in code)
    convert.convert(TOOLS / "demo" / "checkpoint", tmp_path / "model_repository/generator/1", progress=contextlib.nullcontext(lambda n: None))
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert capsys.readouterr().out.endswith(" 16\n")


def test_readme_commands_parse():
    commands = re.findall(r"^ +\.venv/bin/python (tools/\w+\.py)(.*)$", README, re.M)
    assert {"tools/convert.py", "tools/serve.py", "tools/bench_engine.py"} <= {tool for tool, _ in commands}
    for tool, arguments in commands:
        usage = subprocess.run([sys.executable, str(ROOT / tool), "--help"], capture_output=True, text=True).stdout
        for flag in re.findall(r"--[\w-]+", arguments):
            assert flag in usage, f"{tool} {flag}"


def test_keystrokes_are_a_replay():
    """The same keys for every variant: prompts that grow by one character, typists with times of their own, survivors before a pause."""
    text = "".join(chr(97 + i % 26) for i in range(4000))
    keys = bench_keystrokes.make_keys([text], 20, 30, 0.6, 500, 300, 1)
    assert keys == bench_keystrokes.make_keys([text], 20, 30, 0.6, 500, 300, 1) != bench_keystrokes.make_keys([text], 20, 30, 0.6, 500, 300, 2)
    assert [k.at_s for k in keys] == sorted(k.at_s for k in keys)
    gaps = []
    for typist in range(20):
        mine = [k for k in keys if k.typist == typist]
        for a, b in zip(mine, mine[1:]):
            assert b.prompt[:-1] == a.prompt and (b.at_s - a.at_s >= 0.5) == a.survives
            gaps.append(b.at_s - a.at_s)
        assert mine[-1].survives and len(mine[0].prompt) == 301
    assert 0.15 < sum(gaps) / len(gaps) < 0.35


def test_bench_keystrokes(tmp_path, capsys, monkeypatch):
    heldout = tmp_path / "texts.jsonl"
    heldout.write_text(json.dumps({"key": "k", "text": "def f(x):\n    return x\n" * 150}) + "\n")
    monkeypatch.setattr(bench_keystrokes, "HELD_OUT", heldout)
    weights = tmp_path / "w"
    convert.convert(TOOLS / "demo" / "checkpoint", weights, progress=contextlib.nullcontext(lambda n: None))
    assert bench_keystrokes.main([str(weights), "--typists", "2", "--seconds", "1.5", "--context", "100", "--max-tokens", "8", "--pause", "200", "--device", "cpu",
                                  "--threads", "2", "--json", str(tmp_path / "out.json")]) == 0
    r = json.loads((tmp_path / "out.json").read_text())
    assert list(r) == ["neither", "cache", "sessions", "both"] and all(v["unanswered"] == v["refused"] == 0 for v in r.values())
    assert r["neither"]["hit_rate"] == r["sessions"]["hit_rate"] == 0 < r["cache"]["hit_rate"]
    assert r["both"]["computed_tokens"] < r["neither"]["computed_tokens"] and 0 < r["both"]["wasted"] < 1
    assert capsys.readouterr().out.count("\n| ") == 4
