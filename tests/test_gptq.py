"""GPTQ: the codes minimise what they claim to, the calibration model is the served model, and a killed run ends as if it had not been."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from codefuse_triton import _native

torch = pytest.importorskip("torch")
from helpers import add_byte_tokenizer, make_neox, prompt_logits, runner  # noqa: E402

TOOLS = Path(__file__).parent.parent / "tools"
sys.path.insert(0, str(TOOLS))
import calibration  # noqa: E402
import gptq_layers  # noqa: E402
import quantize as tool  # noqa: E402
import torch_model  # noqa: E402
from checkpoint import CheckpointError, read_safetensors  # noqa: E402
from gptq import DAMPING, Gptq, Grid, row_errors  # noqa: E402
from rounding import FORMATS, GROUPS, round_to_nearest  # noqa: E402
from weights_writer import Planned, write_weights  # noqa: E402

QUIET = dict(tokenizer=False, progress=contextlib.nullcontext(lambda n: None))


def inputs(k: int, seed: int) -> torch.Tensor:
    """[400, k] float64: correlated, a few of them large, as activations are."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((400, k // 3)) @ rng.standard_normal((k // 3, k)) / 8 + rng.standard_normal((400, k)) * 0.3
    x[:, ::17] *= 6
    return torch.from_numpy(x)


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def matrix(n: int, k: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)).double()


def decoded(format: str, choices) -> torch.Tensor:
    return torch.from_numpy(_native.decode(format, _native.pack(format, *choices))).double()


# ---- one matrix ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_a_diagonal_hessian_has_its_exact_optimum(format):
    rng = np.random.default_rng(0)
    n, k = 6, 128
    w, diagonal = matrix(n, k, 1), torch.from_numpy(rng.uniform(0.1, 10, k))
    choices = Gptq(torch.diag(diagonal)).quantize(w, format)
    group, codes = GROUPS[format] or k, np.arange(-127, 128) if format == "q8_row" else np.arange(16)
    scale = choices[1].astype(np.float64).reshape(n, -1)
    zero = choices[2].astype(np.float64) if len(choices) > 2 else np.zeros_like(scale)
    values = (codes - zero[..., None]) * scale[..., None]  # [n, groups, every code]
    error = (values.repeat(group, 1) - w.numpy()[..., None]) ** 2
    best = (error.min(2) * diagonal.numpy()).sum(1)
    np.testing.assert_allclose(row_errors(w, decoded(format, choices), torch.diag(diagonal)), best, rtol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_the_grid_is_the_best_of_its_ranges(format):
    w, weight = matrix(5, 128, 2), torch.from_numpy(np.random.default_rng(3).uniform(0.1, 10, 128))
    grid = Grid(format, w, weight)
    chosen = ((grid.values(grid.round(w)) - w).square() * weight).reshape(5, -1, GROUPS[format] or 128).sum(2)
    g = w.reshape(5, -1, GROUPS[format] or 128)
    for i in range(21):
        part = 1 - i / 40
        if format == "q8_row":
            scale, zero, low, high = g.abs().amax(2) * part / 127, torch.zeros(5, 1), -127, 127
        else:
            scale = ((g.amax(2).clamp(min=0) - g.amin(2).clamp(max=0)) * part / 15).half().double()
            zero, low, high = (-g.amin(2).clamp(max=0) * part / scale).round().clamp(0, 15), 0, 15
        values = (((g / scale[..., None]).round() + zero[..., None]).clamp(low, high) - zero[..., None]) * scale[..., None]
        assert (chosen <= ((values - g).square() * weight.reshape(-1, g.shape[2])).sum(2) + 1e-9).all()


def one_by_one(w: np.ndarray, h: np.ndarray, grid: Grid) -> np.ndarray:
    """The same from the paper's formulas, without its Cholesky factor: after each column the inverse is that of the columns that are left."""
    w, left, codes = w.copy(), list(np.argsort(-np.diag(h), kind="stable")), np.zeros(w.shape)
    h = h + DAMPING * np.diag(h).mean() * np.eye(len(h))
    while left:
        j, rest = left[0], left[1:]
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        column, value = grid.round_column(j, torch.from_numpy(w[:, j]))
        codes[:, j] = column.numpy()
        w[:, rest] -= np.outer((w[:, j] - value.numpy()) / inverse[0, 0], inverse[0, 1:])
        left = rest
    return codes


@pytest.mark.parametrize("format", FORMATS)
def test_codes_are_those_of_the_paper(format):
    w, h = matrix(8, 192 if format != "q4_g128" else 256, 4), None
    h = hessian_of(inputs(w.shape[1], 5))
    choices, grid = Gptq(h).quantize(w, format), Grid(format, w, h.diagonal() / h.diagonal().mean())
    want, nearest = torch.from_numpy(one_by_one(w.numpy(), h.numpy(), grid)), grid.round(w)
    better = row_errors(w, grid.values(want), h) <= row_errors(w, grid.values(nearest), h)
    assert better.all()
    np.testing.assert_array_equal(choices[0], want.numpy())


@pytest.mark.parametrize("format", FORMATS)
def test_error_is_never_above_that_of_rounding(format):
    ratios = []
    for seed in range(6):
        k = 256
        w, h = matrix(20, k, seed), hessian_of(inputs(k, seed + 50))
        got = row_errors(w, decoded(format, Gptq(h).quantize(w, format)), h)
        grid = Grid(format, w, h.diagonal() / h.diagonal().mean())
        assert (got <= row_errors(w, grid.values(grid.round(w)), h) * (1 + 1e-5)).all()
        ratios.append(float((got / row_errors(w, decoded(format, round_to_nearest(format, w.float().numpy())), h)).mean()))
    assert max(ratios) < 0.6, ratios


def test_rows_and_inputs_without_values():
    w, x = matrix(4, 128, 0), inputs(128, 1)
    w[1] = 0
    x[:, 5] = 0
    h = hessian_of(x)
    codes, scale, zero = Gptq(h).quantize(w, "q4_g64")
    values = decoded("q4_g64", (codes, scale, zero))
    assert (values[1] == 0).all()
    assert abs(values[0, 5] - w[0, 5]) <= scale.max()  # rounded, not dropped: the text that is served may have that input
    all_zero = Gptq(torch.zeros(128, 128, dtype=torch.float64)).quantize(w, "q8_row")
    np.testing.assert_allclose(decoded("q8_row", all_zero), w, atol=0.02)


# ---- the calibration model -------------------------------------------------------------------------------------------------------

BASE = dict(architecture="test", vocab=97, hidden=64, layers=2, heads=4, kv_heads=4, head_dim=16, intermediate=96, max_positions=128, norm="layer",
            norm_eps=1e-5, residual="serial", activation="gelu", gated=False, position="rope", rope_dim=8, rope_theta=10000.0,
            rope_scaling={"type": "none"}, tied=False, window=0, bos_id=-1, eos_ids=[])


@pytest.mark.parametrize("change", [
    {}, dict(residual="parallel_two_norms"), dict(residual="parallel_one_norm", activation="gelu_tanh"), dict(norm="rms", gated=True, activation="silu", kv_heads=2),
    dict(residual="parallel_one_norm", gated=True, activation="relu"), dict(window=7, rope_dim=16), dict(position="learned", rope_dim=0, kv_heads=1),
    dict(rope_scaling={"type": "linear", "factor": 4.0}, rope_theta=500.0),
], ids=lambda c: "-".join(map(str, c.values())) or "base")
def test_it_is_the_served_model(tmp_path, change):
    c = {**BASE, **change}
    rng = np.random.default_rng(0)
    h, f, a = c["hidden"], c["intermediate"], c["heads"] * c["head_dim"]
    shapes = {"embed.weight": (c["vocab"], h), "lm_head.weight": (c["vocab"], h)}
    if c["position"] == "learned":
        shapes["position.weight"] = (c["max_positions"], h)
    norms = ["norm1"] + ["norm2"] * (c["residual"] != "parallel_one_norm")
    for i in range(c["layers"]):
        for name, n, k in (("qkv", (c["heads"] + 2 * c["kv_heads"]) * c["head_dim"], h), ("attn_out", h, a), ("mlp_up", f, h), ("mlp_down", h, f),
                           *([("mlp_gate", f, h)] if c["gated"] else [])):
            shapes |= {f"layers.{i}.{name}.weight": (n, k), f"layers.{i}.{name}.bias": (n,)}
        for n in norms:
            shapes |= {f"layers.{i}.{n}.{part}": (h,) for part in ("weight", "bias")[:1 + (c["norm"] == "layer")]}
    shapes |= {f"final_norm.{part}": (h,) for part in ("weight", "bias")[:1 + (c["norm"] == "layer")]}
    values = {n: (rng.standard_normal(s) * (0.15 if len(s) > 1 else 0.3) + ("norm" in n)).astype(np.float32) for n, s in shapes.items()}
    write_weights(tmp_path, c, [Planned(n, v.shape, v.dtype, lambda v=v: v) for n, v in values.items()], [])
    tokens = rng.integers(0, c["vocab"], 50)
    want = prompt_logits(runner(tmp_path), tokens.tolist())

    w = {n: torch.from_numpy(v) for n, v in values.items()}
    x = torch_model.embed(c, w, torch.from_numpy(tokens)[None])
    for i in range(c["layers"]):
        at = f"layers.{i}."
        steps = list(torch_model.layer(c, {n.removeprefix(at): t for n, t in w.items() if n.startswith(at)}, x))
        assert [s for s, _ in steps] == [*torch_model.STEPS, ()]
        x = steps[-1][1]
    got = torch_model.norm(c, w, "final_norm", x) @ w["lm_head.weight"].T
    assert np.abs(got[0].numpy() - want).max() <= 2e-5 * np.abs(want).max()


# ---- runs ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A native directory of 3 layers with a tokenizer (bytes), and text."""
    path = tmp_path_factory.mktemp("model")
    _, native = make_neox(path, "f16", vocab_size=260, num_hidden_layers=3, hidden_size=128, intermediate_size=256)
    add_byte_tokenizer(native)
    text = path / "text.py"
    text.write_text("".join(calibration.held_out()[:3])[:9000])
    return native, text


def gptq_of(text: Path, **options) -> tool.Gptq:
    return tool.Gptq(calibration.read_texts(text), text.name, **{"windows": 12, "window_tokens": 48, "device": "cpu", **options})


def files(directory: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in directory.iterdir()}


class Stopped(BaseException):
    pass


def stop_after(layers: int):
    seen = 0

    def tick(n: int) -> None:
        nonlocal seen
        seen += n
        if seen >= layers:
            raise Stopped

    return contextlib.nullcontext(tick)


@pytest.mark.parametrize("format,lm_head", [("q4_g64", "q4_g128"), ("q8_row", ""), ("q4_g128", "keep")])
def test_a_stopped_run_goes_on_and_ends_the_same(tmp_path, model, monkeypatch, format, lm_head):
    native, text = model
    config = tool.quantize(native, tmp_path / "whole", format, lm_head, gptq=gptq_of(text), **QUIET)
    assert config["formats"] == {"matrices": format, "lm_head": lm_head or "q8_row", "method": "gptq"}
    assert config["calibration"] == {"text": "text.py", "windows": 12, "tokens": 12 * 48}
    assert sorted(f.name for f in (tmp_path / "whole").iterdir()) == ["config.json", "model-00001-of-00001.safetensors"]

    with pytest.raises(Stopped):
        tool.quantize(native, tmp_path / "parts", format, lm_head, gptq=gptq_of(text), **{**QUIET, "progress": stop_after(2)})
    assert sorted(f.name for f in (tmp_path / "parts" / ".gptq").iterdir()) == ["input-00002.npy", "layer-00000.npz", "layer-00001.npz", "state.json"]
    assert not (tmp_path / "parts" / "config.json").exists()

    computed, layer = [], gptq_layers.LayerRun._layer
    monkeypatch.setattr(gptq_layers.LayerRun, "_layer", lambda self, i, x: computed.append(i) or layer(self, i, x))
    tool.quantize(native, tmp_path / "parts", format, lm_head, gptq=gptq_of(text), **QUIET)
    assert computed == [2]
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_a_run_with_other_settings_starts_over(tmp_path, model):
    native, text = model
    with pytest.raises(Stopped):
        tool.quantize(native, tmp_path / "q", "q8_row", gptq=gptq_of(text, windows=3), **{**QUIET, "progress": stop_after(2)})
    tool.quantize(native, tmp_path / "q", "q8_row", gptq=gptq_of(text), **QUIET)
    tool.quantize(native, tmp_path / "whole", "q8_row", gptq=gptq_of(text), **QUIET)
    assert files(tmp_path / "q") == files(tmp_path / "whole")


def test_a_killed_process_leaves_what_another_ends(tmp_path, model):
    native, text = model
    command = [sys.executable, str(TOOLS / "quantize.py"), str(native), str(tmp_path / "q"), "--format", "q4_g64", "--method", "gptq", "--calibration", str(text),
               "--windows", "12", "--window-tokens", "48", "--device", "cpu", "--no-evaluate"]
    p = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first, limit = tmp_path / "q" / ".gptq" / "layer-00000.npz", time.monotonic() + 120
    while not first.exists() and p.poll() is None and time.monotonic() < limit:
        time.sleep(0.002)
    os.kill(p.pid, signal.SIGKILL)
    assert p.wait() == -signal.SIGKILL and not (tmp_path / "q" / "config.json").exists()
    config = tool.quantize(native, tmp_path / "q", "q4_g64", gptq=gptq_of(text), progress=contextlib.nullcontext(lambda n: None))
    tool.quantize(native, tmp_path / "whole", "q4_g64", gptq=gptq_of(text), progress=contextlib.nullcontext(lambda n: None))
    assert config["calibration"]["tokens"] == 12 * 48 and files(tmp_path / "q") == files(tmp_path / "whole")


def test_refusals(tmp_path, model, monkeypatch, capsys):
    native, text = model
    with pytest.raises(CheckpointError, match="device is 'cuda:77'; torch cannot use it"):
        tool.quantize(native, tmp_path / "q", "q8_row", gptq=gptq_of(text, device="cuda:77"), **QUIET)
    with pytest.raises(CheckpointError, match=r"the text has \d+ tokens; expected at least 160, one window"):
        tool.quantize(native, tmp_path / "q", "q8_row", gptq=tool.Gptq(["a = 1\n"], "short"), **QUIET)
    with pytest.raises(CheckpointError, match="128 columns; expected a multiple of 96"):
        monkeypatch.setitem(GROUPS, "q4_g64", 96)
        tool.quantize(native, tmp_path / "q", "q4_g64", gptq=gptq_of(text), **QUIET)
    assert not (tmp_path / "q").exists()
    for change, message in (({"rope_scaling": {"type": "yarn"}}, "rope_scaling.type is 'yarn'; GPTQ's calibration computes none, linear"), ({"norm": "batch"}, "norm is 'batch'")):
        with pytest.raises(CheckpointError, match=message):
            torch_model.check({**BASE, **change})
    with pytest.raises(CheckpointError, match="layers.0.router.weight is none of the matrices that GPTQ calibrates"):
        gptq_layers.LayerRun(BASE, {}, lambda t: t, {"layers.0.router.weight": "q8_row"}, np.zeros((1, 4), np.int64), tmp_path / "w", {}, torch.device("cpu"), print)
    options = [str(native), str(tmp_path / "q"), "--format", "q8_row", "--method", "gptq", "--no-evaluate"]
    assert tool.main([*options, "--calibration", str(tmp_path / "none.txt")]) == 1
    (tmp_path / "bad.jsonl").write_text("{\n")
    assert tool.main([*options, "--calibration", str(tmp_path / "bad.jsonl")]) == 1
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in ("gptq_layers", "gptq", "torch_model"):
        monkeypatch.delitem(sys.modules, name)
    assert tool.main([*options, "--calibration", str(text)]) == 1
    told = capsys.readouterr().err
    assert "none.txt: no such file" in told and "bad.jsonl: not JSON lines" in told
    assert "--method gptq needs the package torch, which is not installed" in told
    assert not (tmp_path / "q").exists()


def test_bad_weights_are_refused_and_leave_nothing(tmp_path, model):
    native, text = model
    damaged = tmp_path / "damaged"
    shutil.copytree(native, damaged)
    file, = damaged.glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    at = read_safetensors(file)["layers.2.mlp_down.weight"].load().offset
    raw[at:at + 2] = np.float16(np.inf).tobytes()
    file.write_bytes(raw)
    for target in ("q", "earlier"):
        if target == "earlier":
            tool.quantize(native, tmp_path / target, "q8_row", **QUIET)
        before = files(tmp_path / target) if target == "earlier" else {}
        with pytest.raises(CheckpointError, match="layers.2.mlp_down.weight holds 1 NaN or Inf"):
            tool.quantize(damaged, tmp_path / target, "q4_g64", gptq=gptq_of(text), **QUIET)
        assert files(tmp_path / target) == before if before else not (tmp_path / target).exists()


@pytest.mark.parametrize("embedding,lm_head,stored", [("", "keep", ("F16", "F16")), ("f32", "q4_g64", ("F32", "U8")), ("bf16", "q8_row", ("BF16", "I8"))])
def test_embedding_and_lm_head(tmp_path, model, embedding, lm_head, stored):
    native, text = model
    tool.quantize(native, tmp_path / "q", "q4_g64", lm_head, embedding=embedding, gptq=gptq_of(text), **QUIET)
    file, = (tmp_path / "q").glob("*.safetensors")
    raw = file.read_bytes()
    header = json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])
    assert (header["embed.weight"]["dtype"], header["lm_head.weight"]["dtype"]) == stored and header["layers.0.qkv.bias"]["dtype"] == "F16"
    with pytest.raises(CheckpointError, match="embedding is 'q8_row'; expected auto, f32, f16, bf16: it is looked up by row and never quantized"):
        tool.quantize(native, tmp_path / "q", "q4_g64", embedding="q8_row", **QUIET)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no CUDA device")
@pytest.mark.parametrize("format", FORMATS)
def test_on_a_gpu_it_is_as_good(tmp_path, model, format):
    native, text = model
    loss = {}
    for device in ("cpu", "cuda"):
        tool.quantize(native, tmp_path / device, format, gptq=gptq_of(text, device=device), **QUIET)
    tool.quantize(native, tmp_path / "nearest", format, **QUIET)
    tokens = np.random.default_rng(0).integers(3, 259, 120).tolist()
    want = prompt_logits(runner(native), tokens)
    loss = {d: float(np.square(prompt_logits(runner(tmp_path / d), tokens) - want).mean()) for d in ("cpu", "cuda", "nearest")}
    assert loss["cuda"] < 1.2 * loss["cpu"] and loss["cuda"] < 1.2 * loss["nearest"], loss
