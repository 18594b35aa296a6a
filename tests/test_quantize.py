"""tools/quantize.py and the quantized formats: codes are the nearest, what is packed comes back, and
what cannot be is refused."""

import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from codefuse_triton import _native
from codefuse_triton._native import LoadError, testing

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import convert  # noqa: E402
import quantize as tool  # noqa: E402
from checkpoint import CheckpointError, read_safetensors  # noqa: E402
from rounding import FORMATS, GROUPS, round_to_nearest  # noqa: E402
from helpers import Pages, make_batch, make_neox, pages_of, prompt_logits, runner  # noqa: E402

SIZES = dict(hidden_size=256, num_attention_heads=4, intermediate_size=512)  # columns that every format can have
QUIET = dict(tokenizer=False, progress=contextlib.nullcontext(lambda n: None))


def weights(n: int, k: int, seed: int = 0) -> np.ndarray:
    """Rows of every size and kind: normal, shifted, one sign, one value, zeros, tiny."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((n, k)).astype(np.float32) * np.float32(10.0) ** rng.integers(-4, 3, (n, 1))
    w[1::7] += 3
    w[2::7] = np.abs(w[2::7]) + 0.5
    w[3::7] = -0.25
    w[4::7] = 0
    w[5::7] *= 1e-7
    w[6::7, 5] = 50
    return w


def pack(format: str, w: np.ndarray) -> dict[str, np.ndarray]:
    return _native.pack(format, *round_to_nearest(format, w))


@pytest.mark.parametrize("format", FORMATS)
def test_codes_are_the_nearest(format):
    w = weights(77, 384)
    choices = round_to_nearest(format, w)
    parts = pack(format, w)
    decoded = _native.decode(format, parts)
    step = np.broadcast_to(choices[1].astype(np.float32).reshape(77, -1, 1), (77, choices[1].size // 77, 384 * 77 // choices[1].size)).reshape(77, 384)
    assert (np.abs(w - decoded) <= step * 0.5001).all()
    # a scale is not larger than the range asks for
    peak = np.abs(w).max(axis=1) if format == "q8_row" else None
    if format == "q8_row":
        used = peak > 0
        np.testing.assert_allclose(choices[1][used] * 127, peak[used], rtol=1e-6)
    else:
        g = w.reshape(77, -1, GROUPS[format])
        span = np.maximum(g.max(axis=2), 0) - np.minimum(g.min(axis=2), 0)
        assert (choices[1].astype(np.float32) * 15 <= span * 1.001 + 15 * 6e-8)[span > 0].all()
    assert (decoded[4::7] == 0).all()


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_packed_comes_back(format):
    rng = np.random.default_rng(1)
    for n, k in ((1, 128), (5, 256), (64, 1024)):
        if format == "q8_row":
            codes, scale, zero = rng.integers(-127, 128, (n, k)).astype(np.int8), rng.random(n).astype(np.float32), None
            values = codes * scale[:, None]
        else:
            codes = rng.integers(0, 16, (n, k)).astype(np.uint8)
            group = GROUPS[format]
            scale, zero = rng.random((n, k // group)).astype(np.float16), rng.integers(0, 16, (n, k // group)).astype(np.uint8)
            values = ((codes.reshape(n, -1, group).astype(np.float32) - zero[:, :, None]) * scale.astype(np.float32)[:, :, None]).reshape(n, k)
        parts = _native.pack(format, codes, scale, zero)
        np.testing.assert_array_equal(_native.unpack(format, parts), codes)
        np.testing.assert_array_equal(_native.decode(format, parts), values)
        assert parts["weight"].nbytes == n * k // (1 if format == "q8_row" else 2)


def test_bad_codes_scales_and_shapes_are_refused():
    codes, scale = np.zeros((2, 128), np.int8), np.ones(2, np.float32)
    with pytest.raises(ValueError, match="code of q8_row is -128"):
        _native.pack("q8_row", codes - np.int8(127) - np.int8(1), scale)
    with pytest.raises(ValueError, match=r"scale: expected a contiguous array \[2\] of float32, found \[3\]"):
        _native.pack("q8_row", codes, np.ones(3, np.float32))
    with pytest.raises(ValueError, match="codes: expected .* int8, found .* int32"):
        _native.pack("q8_row", codes.astype(np.int32), scale)
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="scale holds"):
            _native.pack("q8_row", codes, np.array([1, bad], np.float32))
    codes, scale, zero = np.zeros((2, 128), np.uint8), np.ones((2, 1), np.float16), np.zeros((2, 1), np.uint8)
    with pytest.raises(ValueError, match="code of q4_g128 is 16"):
        _native.pack("q4_g128", codes + np.uint8(16), scale, zero)
    with pytest.raises(ValueError, match="zero holds 16; expected 0 to 15"):
        _native.pack("q4_g128", codes, scale, zero + np.uint8(16))
    with pytest.raises(ValueError, match="zero is missing"):
        _native.pack("q4_g128", codes, scale)
    with pytest.raises(ValueError, match="has 96 columns; expected a multiple of 128 in q4_g128"):
        _native.pack("q4_g128", codes[:, :96].copy(), scale, zero)
    with pytest.raises(ValueError, match="format is 'f16'; expected q8_row, q4_g128 or q4_g64"):
        _native.pack("f16", codes, scale)
    with pytest.raises(ValueError, match="format is 'q5'; expected one of f32, f16, bf16, q8_row, q4_g128, q4_g64"):
        _native.pack("q5", codes, scale)


def test_words_of_other_tools():
    codes = np.random.default_rng(0).integers(0, 16, (5, 24)).astype(np.uint8)
    for interleaved, order in ((False, range(8)), (True, (0, 2, 4, 6, 1, 3, 5, 7))):
        digits = codes.reshape(5, 3, 8)[:, :, list(order)].astype(np.uint32)
        words = (digits << np.arange(0, 32, 4, dtype=np.uint32)).sum(2, dtype=np.uint32).view(np.int32)
        np.testing.assert_array_equal(_native.unpack_words(words, interleaved), codes)
    with pytest.raises(ValueError, match="words: expected a contiguous array .* of int32, found .* of int64"):
        _native.unpack_words(words.astype(np.int64), False)


@pytest.mark.parametrize("format", FORMATS)
def test_a_matrix_in_parts_is_the_matrix(format):
    ops, parts = testing.Ops("cpu", threads=1), pack(format, weights(77, 384))
    for rows in ([], [77], [1, 76], [30, 0, 7, 40]):
        np.testing.assert_array_equal(ops.read_matrix(parts, format, rows), _native.decode(format, parts))


# ---- products on the CPU ---------------------------------------------------------------------------------------------------------


CONFIG = json.dumps(dict(format_version=1, architecture="test", vocab=97, hidden=64, layers=1, heads=4, kv_heads=2, head_dim=16, intermediate=64,
                         max_positions=200, norm="layer", norm_eps=1e-5, residual="serial", activation="gelu", gated=False, position="rope",
                         rope_dim=8, rope_theta=10000.0, rope_scaling={"type": "none"}, tied=False, window=0, bos_id=-1, eos_ids=[]))


def rows_batch(n: int, logits="none") -> dict:
    return make_batch(Pages(8, 200, 64), prefill=[(0, [1] * n, 0)], logits=logits)


@pytest.fixture(scope="module", params=testing.cpu_kernels())
def ops(request):
    ops = testing.Ops("cpu", threads=2, kernels=request.param)
    ops.plan(CONFIG, 8, 160, 200, 64)
    return ops


@pytest.mark.parametrize("format,n,k", [("q8_row", 1, 1), ("q8_row", 7, 5), ("q8_row", 111, 111), ("q8_row", 300, 256), ("q4_g128", 1, 128),
                                        ("q4_g128", 111, 384), ("q4_g128", 300, 1024), ("q4_g64", 1, 64),
                                        ("q4_g64", 111, 192), ("q4_g64", 300, 1024)])
def test_linear(ops, format, n, k):
    rng = np.random.default_rng(n)
    parts = pack(format, (rng.standard_normal((n, k)) / np.sqrt(k)).astype(np.float32))
    w, bias = _native.decode(format, parts).astype(np.float64), rng.standard_normal(n).astype(np.float32)
    x, y = rng.standard_normal((111, k)).astype(np.float32), rng.standard_normal((111, n)).astype(np.float32)
    want, tolerance = x @ w.T + bias, 1e-6 * (4 + np.abs(x) @ np.abs(w).T)
    whole = ops.linear(rows_batch(111), x, parts, format, bias)
    assert (np.abs(whole - want) <= tolerance).all()
    for t in (1, 2, 3, 9, 64):
        assert ops.linear(rows_batch(t), x[:t], parts, format, bias).tobytes() == whole[:t].tobytes()
    assert (np.abs(ops.linear_add(rows_batch(111), y, x, parts, format, bias) - (y + want)) <= 2 * tolerance).all()
    assert ops.logits(rows_batch(9, "all"), x[:9], parts, format, bias).tobytes() == whole[:9].tobytes()
    plain = ops.linear(rows_batch(9), x[:9], _native.decode(format, parts), "f32", bias)
    assert (np.abs(plain - whole[:9]) <= tolerance[:9]).all()


# ---- whole models ----------------------------------------------------------------------------------------------------------------


def stored(path: Path) -> dict[str, np.ndarray]:
    return {name: info.load() for f in sorted(path.glob("*.safetensors")) for name, info in read_safetensors(f).items()}


def decoded_twin(quantized: Path, target: Path) -> Path:
    """The same model with its decoded weights as float32."""
    from weights_writer import Planned, write_weights

    config, tensors = json.loads((quantized / "config.json").read_text()), stored(quantized)
    header = {}
    for f in quantized.glob("*.safetensors"):
        raw = f.read_bytes()
        header.update(json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])["__metadata__"])
    plain = []
    for name, value in tensors.items():
        base, _, kind = name.rpartition(".")
        if kind in ("scale", "zero"):
            continue
        format = header.get(f"{name}.format")
        if format:
            parts = {"weight": value, **{p: tensors[f"{base}.{p}"] for p in ("scale", "zero") if f"{base}.{p}" in tensors}}
            value = _native.decode(format, parts)
        value = np.ascontiguousarray(value, np.float32)
        plain.append(Planned(name, value.shape, value.dtype, lambda value=value: value))
    write_weights(target, {k: v for k, v in config.items() if k not in ("files", "tokenizer_files")}, plain, [])
    return target


@pytest.mark.parametrize("format", FORMATS)
def test_model_is_that_of_its_decoded_weights(tmp_path, format):
    _, native = make_neox(tmp_path, **SIZES)
    config = tool.quantize(native, tmp_path / "q", format, **QUIET)
    assert config["formats"] == {"matrices": format, "lm_head": "q8_row", "method": "nearest"}
    twin = decoded_twin(tmp_path / "q", tmp_path / "twin")
    tokens = [int(t) for t in np.random.default_rng(1).integers(0, 131, 60)]
    a = runner(tmp_path / "q")
    want, got = prompt_logits(runner(twin), tokens), prompt_logits(a, tokens)
    assert np.abs(want - got).max() <= 1e-4 * np.abs(want).max()
    assert a.weight_bytes < runner(twin).weight_bytes * {"q8_row": 0.29, "q4_g128": 0.18, "q4_g64": 0.19}[format]
    for world in (2,) if format == "q4_g128" else (2, 4):
        shared = prompt_logits(runner(tmp_path / "q", tensor_parallel=world), tokens)
        assert np.abs(want - shared).max() <= 1e-4 * np.abs(want).max()
    if format == "q4_g128":
        with pytest.raises(ValueError, match="tensor_parallel is 4, but the 256 columns of layers.0.attn_out.weight in q4_g128 .* multiples of 128"):
            runner(tmp_path / "q", tensor_parallel=4)


def test_from_a_hugging_face_checkpoint_and_from_its_conversion_the_same(tmp_path):
    _, native = make_neox(tmp_path, "f16", **SIZES)
    tool.quantize(native, tmp_path / "a", "q4_g128", "q4_g128", **QUIET)
    tool.quantize(tmp_path / "hf", tmp_path / "b", "q4_g128", "q4_g128", **QUIET)
    a, b = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() for n in a)
    assert a["lm_head.weight"].dtype == np.uint8 and a["embed.weight"].dtype == np.float16
    tool.quantize(native, tmp_path / "c", "q8_row", "keep", dtype="bf16", **QUIET)
    c = stored(tmp_path / "c")
    assert c["lm_head.weight"].dtype == c["layers.0.qkv.bias"].dtype == convert.DTYPES["bf16"] and c["layers.0.qkv.weight"].dtype == np.int8
    assert runner(tmp_path / "c").dtype == "float32"


def test_refusals(tmp_path):
    _, native = make_neox(tmp_path)  # 96 columns
    with pytest.raises(CheckpointError, match="tensor layers.0.qkv.weight has 96 columns; expected a multiple of 128 in q4_g128"):
        tool.quantize(native, tmp_path / "q", "q4_g128", **QUIET)
    with pytest.raises(CheckpointError, match="format is 'q3'; expected q8_row, q4_g128 or q4_g64"):
        tool.quantize(native, tmp_path / "q", "q3", **QUIET)
    with pytest.raises(CheckpointError, match="is the source"):
        tool.quantize(native, native, "q8_row", **QUIET)
    tool.quantize(native, tmp_path / "q", "q8_row", **QUIET)
    before = {f.name: f.read_bytes() for f in (tmp_path / "q").iterdir()}
    with pytest.raises(CheckpointError, match="quantized already"):
        tool.quantize(tmp_path / "q", tmp_path / "qq", "q8_row", **QUIET)
    file, = native.glob("*.safetensors")
    at = read_safetensors(file)["layers.1.mlp_up.weight"].load().offset
    raw = bytearray(file.read_bytes())
    raw[at:at + 4] = np.float32(np.nan).tobytes()
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match="layers.1.mlp_up.weight holds 1 NaN or Inf"):
        tool.quantize(native, tmp_path / "q", "q8_row", **QUIET)
    assert {f.name: f.read_bytes() for f in (tmp_path / "q").iterdir()} == before
    assert tool.main([str(tmp_path / "nowhere"), str(tmp_path / "x"), "--format", "q8_row"]) == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("change,message", [
    ({"layers.0.qkv.scale": None}, r"tensor layers.0.qkv.scale is missing; expected shape \[768, 2\]"),
    ({"layers.0.qkv.weight.format": "q4_g32"}, "tensor layers.0.qkv.weight format is 'q4_g32'; expected one of"),
    ({"layers.0.qkv.weight.format": "q4_g64"}, r"tensor layers.0.qkv.scale has shape \[768, 2\]; expected \[768, 4\]"),
    ({"layers.0.qkv.weight.format": "q8_row"}, r"tensor layers.0.qkv.weight has shape \[768, 128\]; expected \[768, 256\]"),
    ({"layers.0.qkv.weight.format": "f16"}, "format f16 in the metadata; expected q8_row, q4_g128 or q4_g64"),
    ({"layers.0.qkv.weight.format": None}, r"tensor layers.0.qkv.weight has shape \[768, 128\]; expected \[768, 256\]"),
    ({"embed.weight.format": "q8_row"}, None),
])
def test_damaged_files_are_refused(tmp_path, change, message):
    _, native = make_neox(tmp_path, **SIZES)
    tool.quantize(native, tmp_path / "q", "q4_g128", **QUIET)
    file, = (tmp_path / "q").glob("*.safetensors")
    raw = file.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + n])
    for key, value in change.items():
        place = header["__metadata__"] if key.endswith(".format") else header
        if value is None:
            del place[key]
        else:
            place[key] = value
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + n:])
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    (tmp_path / "q" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "files"}))  # its checksum would tell first
    if message:
        with pytest.raises(LoadError, match=message):
            runner(tmp_path / "q")
    else:
        runner(tmp_path / "q")  # an embedding is what its elements are


@pytest.mark.parametrize("format", FORMATS)
def test_random_weights(tmp_path, format):
    convert.write_random("gptneox-tiny", tmp_path / "w", format, 0, on_disk=False)
    r = runner(tmp_path / "w")
    logits = prompt_logits(r, [1, 2, 3, 4])
    assert np.isfinite(logits).all() and 0.01 < logits.std() < 10
    config = json.loads((tmp_path / "w" / "config.json").read_text())
    h, f, layers, vocab = config["hidden"], config["intermediate"], config["layers"], config["vocab"]
    matrices = layers * (4 * h * h + 2 * h * f) + vocab * h
    rows = layers * (5 * h + f) + vocab
    want = matrices + 4 * rows if format == "q8_row" else matrices // 2 + matrices // GROUPS[format] * 3
    assert want <= r.weight_bytes <= want + 4 * layers * (4 * h + 5 * h + f) + 8 * h
    convert.write_random("gptneox-tiny", tmp_path / "x", format, 0, on_disk=True)
    on_disk = runner(tmp_path / "x")
    assert on_disk.weight_bytes == r.weight_bytes and prompt_logits(on_disk, [1, 2, 3, 4]).tobytes() == logits.tobytes()
