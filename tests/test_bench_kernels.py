"""tools/bench_kernels.py, which times the ops of a model's layers, and what it times them with."""

import json
import subprocess
import sys

import pytest
from codefuse_triton import devices
from codefuse_triton._native import testing
from test_tools import CUDA, ON_GPU, TOOLS, preset


def run_bench_kernels(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(TOOLS / "bench_kernels.py"), *arguments], capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_figures(tmp_path, device):
    ranks = 2 if device == "cpu" or "cuda:1" in devices()[0] else 1
    run = run_bench_kernels("--preset", "gptneox-tiny", "--rows", "1,64", "--position", "100", "--prefill", "2,512", "--repeats", "3", "--threads", "2",
                            "--device", device, "--tensor-parallel", str(ranks), "--json", str(tmp_path / "out.json"))
    assert run.returncode == 0, run.stderr
    assert "64 decode rows at position 100" in run.stdout and "512 prefill rows" in run.stdout
    figures = json.loads((tmp_path / "out.json").read_text())
    assert [e["rows"] for e in figures["exchanges"] if e["us"] > 0] == ([1, 2, 64, 512] if ranks > 1 else [])
    hidden, inter = 128, 512
    elements, rows = hidden * (4 * hidden + 2 * inter), 3 * hidden + inter + 2 * hidden  # of a layer's four matrices
    bytes_of = {"f16": 2 * elements, "q8_row": elements + 4 * rows, "q4_g128": elements // 2 + elements // 128 * 3,
                "q4_g64": elements // 2 + elements // 64 * 3}
    assert list(figures["formats"]) == list(bytes_of)
    for format, f in figures["formats"].items():
        assert f["device"].startswith(device) and f["layers"] == 2 and f["weight_bytes"] == bytes_of[format]
        assert [d["rows"] for d in f["decode"]] == [1, 64] and [p["rows"] for p in f["prefill"]] == [2, 512]
        for part in (*f["decode"], *f["prefill"]):
            assert all(0 < us["min"] <= us["median"] <= us["max"] for us in part["us"].values()), part
        for d in f["decode"]:
            assert d["bytes_us"] == pytest.approx(f["weight_bytes"] / figures["read_bandwidth_gb_s"] / 1e3)
            assert d["us"]["with attention as well"]["min"] > d["us"]["both norms alone"]["min"]
        few, many = f["prefill"]
        assert many["us"]["the whole layer"]["min"] > max(few["us"]["the whole layer"]["min"], many["us"]["mlp_up"]["min"])
        assert many["tflops"]["mlp_up"] == pytest.approx(2 * 512 * hidden * inter / many["us"]["mlp_up"]["median"] / 1e6)
        assert many["tflops"]["attention"] == pytest.approx(4 * hidden * 512 * 513 / 2 / many["us"]["attention"]["median"] / 1e6)


@pytest.mark.parametrize("arguments, message", [
    (["--device", "cpu", "--preset", "gpt-9"], "preset is 'gpt-9'; known are gptneox-13b"), (["--rows", "1,x"], "rows is '1,x'; expected numbers"),
    (["--rows", "65"], "rows is '65'; expected numbers of 1 to 64"), (["--device", "cpu", "--rows", "", "--prefill", ""], "rows and prefill are both empty"),
    (["--repeats", "0"], "--repeats: 0; expected 1 to"), (["--device", "tpu"], "device is 'tpu'"),
    (["--device", "cpu", "--preset", "gptneox-tiny", "--formats", "q9"], "format is 'q9'"),
    (["--device", "cpu", "--preset", "gptneox-tiny", "--position", "512"], "position is 512; expected 0 to 511"),
    (["--device", "cpu", "--preset", "gptneox-tiny", "--prefill", "513"], "prefill_rows is 513; expected 1 to 512"),
    pytest.param([], "device is 'cuda'", marks=pytest.mark.skipif(CUDA, reason="there is a CUDA device")),
])
def test_tool_refuses(arguments, message):
    run = run_bench_kernels(*arguments)
    assert run.returncode != 0 and message in run.stderr and "Traceback" not in run.stderr and not run.stdout


@pytest.mark.parametrize("options, message", [
    (dict(ops=["norm"]), "op is 'norm'; expected one of attention, attn_out, linear_add_pair"), (dict(decode_rows=0), "decode_rows is 0 and prefill_rows 0"),
    (dict(prefill_rows=1), "decode_rows is 1 and prefill_rows 1"), (dict(decode_rows=3), "decode_rows is 3; expected 0 to 2"), (dict(repeats=0), "repeats is 0"),
])
def test_layers_refuse(tmp_path, options, message):
    layers = testing.Layers(str(preset(tmp_path / "w")), device="cpu", decode_rows=2, threads=1)
    with pytest.raises(ValueError, match=message):
        layers.time(**{"ops": ["norm_pair"], "decode_rows": 1, **options})


def test_layers_are_of_one_kind(tmp_path):
    with pytest.raises(ValueError, match="side by side"):
        testing.Layers(str(preset(tmp_path / "w", residual="serial")), device="cpu")
