"""Checkpoints that others have quantized or converted: GPTQ and AWQ keep their codes bit for bit, FasterTransformer directories are the model."""

import contextlib
import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from codefuse_triton import LoadError, _native, devices

torch = pytest.importorskip("torch")
from helpers import make_neox, prompt_logits, rows_not_sampled_change_nothing, runner  # noqa: E402
from test_cuda import greedy  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import convert  # noqa: E402
import quantize  # noqa: E402
from checkpoint import CheckpointError, read_safetensors  # noqa: E402

SIZES = dict(hidden_size=256, num_attention_heads=4, intermediate_size=512, num_hidden_layers=2)
HEADS, D, LAYERS = 4, 64, 2
TOKENS = np.random.default_rng(1).integers(0, 131, 40).tolist()
SHAPES = {"attention.query_key_value": (768, 256), "attention.dense": (256, 256), "mlp.dense_h_to_4h": (512, 256), "mlp.dense_4h_to_h": (256, 512)}
OURS = {"attention.query_key_value": "qkv", "attention.dense": "attn_out", "mlp.dense_h_to_4h": "mlp_up", "mlp.dense_4h_to_h": "mlp_down"}
DOWN = ("mlp.dense_4h_to_h",)
QUIET = dict(tokenizer=False, progress=contextlib.nullcontext(lambda n: None))


def words(codes: np.ndarray, order=range(8)) -> np.ndarray:
    """[R, C] codes 0..15 -> int32 [R, C / 8]"""
    digits = codes.reshape(len(codes), -1, 8)[:, :, list(order)].astype(np.uint32)
    return (digits << np.arange(0, 32, 4, dtype=np.uint32)).sum(2, dtype=np.uint32).view(np.int32)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("original")
    make_neox(path, "f16", **SIZES)
    return path / "hf"


class Checkpoint:
    """A checkpoint of random codes in one of the layouts; values(name) are the weights it means, in Hugging Face's order."""

    def __init__(self, directory: Path, original: Path, method: str, group: int, ordered=(), version: str = "gptq", sym: bool = False, file="model.safetensors",
                 old: bool = False, scales=np.float16):
        self.directory, rng = directory, np.random.default_rng(group + 1)
        self.tensors = {n: np.array(t.load()) for n, t in read_safetensors(original / "model.safetensors").items()}
        self.choices = {}
        for i in range(LAYERS):
            for kind, (n, k) in SHAPES.items():
                base = f"gpt_neox.layers.{i}.{kind}"
                del self.tensors[f"{base}.weight"]
                size = k if group == -1 else group
                codes, zero = rng.integers(0, 16, (n, k)), rng.integers(0, 16, (n, k // size))
                if sym:
                    zero[:] = 8
                scale = rng.uniform(0.01, 0.03, (n, k // size)).astype(np.float16)
                of = np.arange(k) // size
                if kind in ordered:
                    of = rng.permutation(of)
                self.choices[base] = codes, scale, zero, of
                if method == "gptq":
                    stored = zero if version == "gptq_v2" else (zero - 1) % 16
                    self.tensors |= {f"{base}.qweight": np.ascontiguousarray(words(codes).T), f"{base}.qzeros": words(np.ascontiguousarray(stored.T)),
                                     f"{base}.g_idx": of.astype(np.int32)}
                else:
                    interleaved = (0, 2, 4, 6, 1, 3, 5, 7)
                    self.tensors |= {f"{base}.qweight": words(np.ascontiguousarray(codes.T), interleaved), f"{base}.qzeros": words(np.ascontiguousarray(zero.T), interleaved)}
                self.tensors[f"{base}.scales"] = np.ascontiguousarray(scale.T).astype(scales)
        config = json.loads((original / "config.json").read_text())
        told = dict(bits=4, group_size=group, desc_act=bool(ordered), sym=sym, checkpoint_format=version) if method == "gptq" else \
            dict(bits=4, group_size=group, zero_point=True, version="gemm")
        if old:  # before transformers knew of it
            name, told = ("quantize_config.json", dict(bits=4, group_size=group, damp_percent=0.01, desc_act=False, sym=sym, true_sequential=True)) if method == "gptq" \
                else ("quant_config.json", dict(zero_point=True, q_group_size=group, w_bit=4, version="GEMM"))
        else:
            name, config["quantization_config"] = "", {"quant_method": method, **told}
        directory.mkdir()
        if name:
            (directory / name).write_text(json.dumps(told))
        (directory / "config.json").write_text(json.dumps(config))
        self.save(file)

    def save(self, file: str = "model.safetensors") -> None:
        state = {n: torch.from_numpy(v.view(np.int16) if v.dtype == ml_dtypes.bfloat16 else v) for n, v in self.tensors.items()}
        state = {n: t.view(torch.bfloat16) if self.tensors[n].dtype == ml_dtypes.bfloat16 else t for n, t in state.items()}
        if file.endswith(".bin"):
            torch.save(state, self.directory / file)
        else:
            import safetensors.torch

            safetensors.torch.save_file(state, self.directory / file)

    def values(self, base: str) -> np.ndarray:
        codes, scale, zero, of = self.choices[base]
        return (codes - zero[:, of]).astype(np.float32) * scale[:, of].astype(np.float32)

    def plain(self, directory: Path, original: Path) -> Path:
        """The model of those values, converted in float32."""
        import safetensors.torch

        directory.mkdir()
        config = json.loads((original / "config.json").read_text())
        state = {n: torch.from_numpy(np.array(t.load()).astype(np.float32)) for n, t in read_safetensors(original / "model.safetensors").items()}
        for base in self.choices:
            state[f"{base}.weight"] = torch.from_numpy(self.values(base))
        safetensors.torch.save_file(state, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps(config))
        convert.convert(directory, directory / "native", **QUIET)
        return directory / "native"


def our_rows(kind: str, t: np.ndarray) -> np.ndarray:
    return t.reshape(HEADS, 3, D, -1).swapaxes(0, 1).reshape(t.shape) if kind == "attention.query_key_value" else t


def check_codes(c: Checkpoint, target: Path, format: str) -> None:
    """Every code, scale and zero is the checkpoint's, at its place."""
    file, = target.glob("*.safetensors")
    stored = {n: np.array(t.load()) for n, t in read_safetensors(file).items()}
    size = int(format[4:])
    for i in range(LAYERS):
        folded = np.argsort(c.choices[f"gpt_neox.layers.{i}.mlp.dense_4h_to_h"][3], kind="stable")
        for kind, ours in OURS.items():
            codes, scale, zero, of = c.choices[f"gpt_neox.layers.{i}.{kind}"]
            order = np.argsort(of, kind="stable")
            want = [codes[:, order], scale[:, of[order][::size]], zero[:, of[order][::size]]]
            if kind == "mlp.dense_h_to_4h":
                want = [x[folded] for x in want]
            stored_order = stored.get(f"layers.{i}.{ours}.order")
            if kind in DOWN or (np.diff(of) >= 0).all():
                assert stored_order is None
            else:
                np.testing.assert_array_equal(stored_order, order)
            parts = {p: stored[f"layers.{i}.{ours}.{p}"] for p in ("weight", "scale", "zero")}
            got = [_native.unpack(format, parts), parts["scale"], parts["zero"]]
            for x, y in zip(got, want):
                np.testing.assert_array_equal(x, our_rows(kind, y))


@pytest.mark.parametrize("options,format", [
    (dict(method="gptq", group=64, sym=True), "q4_g64"), (dict(method="gptq", group=128), "q4_g128"),
    (dict(method="gptq", group=64, file="gptq_model-4bit-64g.bin", old=True), "q4_g64"), (dict(method="gptq", group=64, file="gptq_model-4bit-64g.safetensors", old=True), "q4_g64"),
    (dict(method="gptq", group=64, version="gptq_v2", scales=np.float32), "q4_g64"), (dict(method="gptq", group=-1), "q4_g128"), (dict(method="gptq", group=256), "q4_g128"),
    (dict(method="gptq", group=64, ordered=DOWN), "q4_g64"), (dict(method="gptq", group=128, ordered=DOWN), "q4_g128"),
    (dict(method="gptq", group=64, ordered=tuple(SHAPES)), "q4_g64"), (dict(method="gptq", group=128, ordered=tuple(SHAPES), version="gptq_v2"), "q4_g128"),
    (dict(method="awq", group=128), "q4_g128"), (dict(method="awq", group=64, old=True), "q4_g64"),
], ids=lambda v: v if isinstance(v, str) else "-".join(str(x if isinstance(x, (str, int)) else k) for k, x in v.items()))
def test_codes_are_kept_and_the_model_is_the_same(tmp_path, original, options, format):
    c = Checkpoint(tmp_path / "c", original, **options)
    config = convert.convert(tmp_path / "c", tmp_path / "native", **QUIET)
    assert config["formats"] == {"matrices": format, "lm_head": "keep", "method": options["method"]}
    check_codes(c, tmp_path / "native", format)
    want = prompt_logits(runner(c.plain(tmp_path / "plain", original)), TOKENS)
    r = runner(tmp_path / "native")
    assert np.abs(prompt_logits(r, TOKENS) - want).max() <= 2e-5 * np.abs(want).max()
    rows_not_sampled_change_nothing(r, TOKENS)


def test_quantize_keeps_them_and_takes_the_lm_head(tmp_path, original):
    c = Checkpoint(tmp_path / "c", original, "gptq", 64)
    config = quantize.quantize(tmp_path / "c", tmp_path / "q", "q4_g64", dtype="bf16", **QUIET)
    assert config["formats"] == {"matrices": "q4_g64", "lm_head": "q8_row", "method": "gptq"}
    check_codes(c, tmp_path / "q", "q4_g64")
    file, = (tmp_path / "q").glob("*.safetensors")
    stored = read_safetensors(file)
    assert stored["lm_head.weight"].dtype == np.int8 and stored["embed.weight"].dtype == ml_dtypes.bfloat16 and stored["layers.0.qkv.scale"].dtype == np.float16
    with pytest.raises(CheckpointError, match="format is 'q4_g128', but .* is quantized already; expected q4_g64, which keeps its codes"):
        quantize.quantize(tmp_path / "c", tmp_path / "x", "q4_g128", **QUIET)
    with pytest.raises(CheckpointError, match="method is gptq, but .* is quantized already, by gptq"):
        quantize.quantize(tmp_path / "c", tmp_path / "x", "q4_g64", gptq=quantize.Gptq(["x"], "x"), **QUIET)
    assert not (tmp_path / "x").exists()


def test_an_order_of_columns(tmp_path, original):
    """One that is not a permutation is refused, as is sharing its columns; sharing rows is not."""
    Checkpoint(tmp_path / "c", original, "gptq", 64, ("attention.query_key_value", "mlp.dense_h_to_4h", *DOWN))
    convert.convert(tmp_path / "c", tmp_path / "native", **QUIET)
    want = prompt_logits(runner(tmp_path / "native"), TOKENS)
    assert np.abs(prompt_logits(runner(tmp_path / "native", tensor_parallel=2), TOKENS) - want).max() <= 2e-5 * np.abs(want).max()
    Checkpoint(tmp_path / "d", original, "gptq", 64, ("attention.dense",))
    convert.convert(tmp_path / "d", tmp_path / "shared", **QUIET)
    with pytest.raises(ValueError, match="tensor_parallel is 2, but the columns of layers.0.attn_out.weight are in an order of their own"):
        runner(tmp_path / "shared", tensor_parallel=2)

    file, = (tmp_path / "native").glob("*.safetensors")
    raw = file.read_bytes()
    at = read_safetensors(file)["layers.1.mlp_up.order"].load().offset
    first, second = np.frombuffer(raw, np.int32, 2, at)
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    (tmp_path / "native" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "files"}))  # its checksum would tell first
    for value, message in ((second, f"layers.1.mlp_up.order has {second} twice; expected every column from 0 to 255 once"), (256, "has 256; expected"), (-1, "has -1; expected")):
        file.write_bytes(raw[:at] + np.int32(value).tobytes() + raw[at + 4:])
        with pytest.raises(LoadError, match=message):
            runner(tmp_path / "native")


@pytest.mark.parametrize("change,message", [
    (dict(bits=3), "quantization_config: field bits is 3; expected 4"), (dict(group_size=32), "field group_size is 32; expected -1 or a multiple of 64"),
    (dict(quant_method="hqq"), "field quant_method is 'hqq'; expected 'gptq' or 'awq'"), (dict(checkpoint_format="marlin"), "field checkpoint_format is 'marlin'"),
    (dict(quant_method="awq", version="gemv"), "field version is 'gemv'; expected 'gemm'"), (dict(quant_method="awq", zero_point=False), "field zero_point is False"),
    (dict(group_size=192), "layers.0.attention.query_key_value has 256 columns; expected a multiple of group_size 192"),
    (dict(group_size=128), r"query_key_value.qzeros is int32 \[4, 96\]; expected int32 \[2, 96\]"),
    (dict(quant_method="awq"), r"query_key_value.qweight is int32 \[32, 768\]; expected int32 \[256, 96\]"),
])
def test_configs_that_are_not_understood_are_refused(tmp_path, original, change, message):
    c = Checkpoint(tmp_path / "c", original, "gptq", 64)
    config = json.loads((c.directory / "config.json").read_text())
    config["quantization_config"].update(change)
    if "quant_method" in change:
        del config["quantization_config"]["checkpoint_format"]
    (c.directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        convert.convert(c.directory, tmp_path / "native", **QUIET)
    assert not (tmp_path / "native").exists()


def test_damaged_checkpoints_are_refused(tmp_path, original):
    c = Checkpoint(tmp_path / "c", original, "gptq", 64)
    base = "gpt_neox.layers.1.mlp.dense_4h_to_h"
    whole = dict(c.tensors)
    bad_scale, bad_group = whole[f"{base}.scales"].copy(), whole[f"{base}.g_idx"].copy()
    bad_scale[3, 5], bad_group[:65] = np.inf, 0
    for change, message in (
        ({f"{base}.scales": None}, "dense_4h_to_h.scales is missing"), ({f"{base}.qzeros": None}, "dense_4h_to_h.qzeros is missing"),
        ({f"{base}.scales": bad_scale}, "dense_4h_to_h.scales holds values that are not exact in float16"),
        ({f"{base}.scales": whole[f"{base}.scales"].astype(np.float32) * 1.0001}, "not exact in float16"), ({f"{base}.scales": -whole[f"{base}.scales"]}, "scale holds -"),
        ({f"{base}.g_idx": bad_group}, "dense_4h_to_h.g_idx does not give each of 8 groups 64 columns"),
        ({f"{base}.bias": None}, "dense_4h_to_h.bias .our layers.1.mlp_down.bias. is missing"),
        ({f"{base.removesuffix('dense_4h_to_h')}act.scales": np.ones(512, np.float16)}, "act.scales .* AWQ's scales of an activation have no place"),
    ):
        c.tensors = {n: v for n, v in {**whole, **change}.items() if v is not None}
        c.save()
        with pytest.raises(CheckpointError, match=message):
            convert.convert(c.directory, tmp_path / "native", **QUIET)
    assert not (tmp_path / "native").exists()
    (c.directory / "model.safetensors").rename(c.directory / "a.safetensors")
    (c.directory / "b.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="a.safetensors, b.safetensors: expected one .safetensors file or a shard index"):
        convert.convert(c.directory, tmp_path / "native", **QUIET)


@pytest.mark.gpu
@pytest.mark.skipif(not any(d.startswith("cuda") for d in devices()[0]), reason="no CUDA device")
@pytest.mark.parametrize("group", [64, 128])
def test_an_order_of_columns_on_a_gpu(tmp_path, original, group):
    Checkpoint(tmp_path / "c", original, "gptq", group, tuple(SHAPES))
    convert.convert(tmp_path / "c", tmp_path / "native", **QUIET)
    cpu, prompts = runner(tmp_path / "native", device="cpu"), [TOKENS[:n] for n in (3, 17, 40)]
    want, expected = prompt_logits(cpu, TOKENS), greedy(cpu, prompts, 20, True)
    for dtype, eps in (("float32", 1e-5), ("float16", 1e-2), ("bfloat16", 0.11)):
        r = runner(tmp_path / "native", device="cuda", dtype=dtype)
        assert np.abs(prompt_logits(r, TOKENS) - want).max() <= 4 * eps * np.abs(want).max()
        together = greedy(r, prompts, 20, True)
        assert together == greedy(r, prompts, 20, False)
        if dtype == "float32":
            assert together == expected


# ---- FasterTransformer -----------------------------------------------------------------------------------------------------------


def ft_directory(directory: Path, hf: Path, gpus: int, dtype: str, parallel: bool) -> Path:
    """As FasterTransformer's converter writes it."""
    directory.mkdir()
    config = json.loads((hf / "config.json").read_text())
    h, f, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kind = {"fp16": np.float16, "fp32": np.float32}[dtype]
    t = {n: np.array(i.load()).astype(kind) for n, i in read_safetensors(hf / "model.safetensors").items()}
    rope = config["rope_parameters"] if config.get("rope_parameters") else config
    ini = dict(model_name="gptneox", head_num=heads, size_per_head=h // heads, inter_size=f, num_layer=config["num_hidden_layers"],
               rotary_embedding=int(h // heads * rope.get("partial_rotary_factor", 0.25)), vocab_size=config["vocab_size"], start_id=config["bos_token_id"],
               end_id=config["eos_token_id"], use_gptj_residual=int(parallel), weight_data_type=dtype)
    (directory / "config.ini").write_text("[gptneox]\n" + "".join(f"{k} = {v}\n" for k, v in ini.items()))

    def put(name: str, value: np.ndarray, axis: int | None = None) -> None:
        for j, part in enumerate([value] if axis is None else np.split(value, gpus, axis)):
            np.ascontiguousarray(part).astype(kind).tofile(directory / (f"model.{name}.bin" if axis is None else f"model.{name}.{j}.bin"))

    put("wte", t["gpt_neox.embed_in.weight"])
    put("lm_head.weight", t["embed_out.weight"] if "embed_out.weight" in t else t["lm_head.weight"])
    for part in ("weight", "bias"):
        put(f"final_layernorm.{part}", t[f"gpt_neox.final_layer_norm.{part}"])
    for i in range(config["num_hidden_layers"]):
        at, to = f"gpt_neox.layers.{i}.", f"layers.{i}."
        for n in ("input_layernorm.weight", "input_layernorm.bias", "post_attention_layernorm.weight", "post_attention_layernorm.bias"):
            put(to + n, t[at + n])
        qkv = t[at + "attention.query_key_value.weight"].T.reshape(h, heads, 3, -1).transpose(0, 2, 1, 3).reshape(h, 3, h)
        put(to + "attention.query_key_value.weight", qkv, -1)
        put(to + "attention.query_key_value.bias", t[at + "attention.query_key_value.bias"].reshape(heads, 3, -1).swapaxes(0, 1).reshape(3, h), -1)
        put(to + "attention.dense.weight", t[at + "attention.dense.weight"].T, 0)
        put(to + "mlp.dense_h_to_4h.weight", t[at + "mlp.dense_h_to_4h.weight"].T, -1)
        put(to + "mlp.dense_h_to_4h.bias", t[at + "mlp.dense_h_to_4h.bias"], -1)
        put(to + "mlp.dense_4h_to_h.weight", t[at + "mlp.dense_4h_to_h.weight"].T, 0)
        biases = [(t[f"{at}{n}"] / gpus).astype(kind) for n in ("attention.dense.bias", "mlp.dense_4h_to_h.bias")]
        put(to + "attention.dense.bias", biases[0])
        put(to + "mlp.dense_4h_to_h.bias", biases[1])
        if parallel:
            put(to + "mlp.attention.bias.sum", biases[0] + biases[1])
    return directory


def stored_of(native: Path) -> dict[str, np.ndarray]:
    file, = native.glob("*.safetensors")
    return {n: np.array(t.load()) for n, t in read_safetensors(file).items()}


@pytest.mark.parametrize("gpus,dtype,parallel", [(1, "fp16", True), (2, "fp16", True), (4, "fp32", False), (2, "fp32", True), (1, "fp32", False)])
def test_a_fastertransformer_directory_is_its_checkpoint(tmp_path, capsys, gpus, dtype, parallel):
    _, native = make_neox(tmp_path, {"fp16": "f16", "fp32": "f32"}[dtype], use_parallel_residual=parallel, max_position_embeddings=2048, rotary_pct=0.5)
    ft = ft_directory(tmp_path / "ft", tmp_path / "hf", gpus, dtype, parallel)
    config = convert.convert(ft, tmp_path / "from_ft", **QUIET)
    assert "does not say hidden_act (taken as gelu), layer_norm_eps" in capsys.readouterr().err
    want = json.loads((native / "config.json").read_text())
    assert {k: v for k, v in config.items() if k != "source"} == {k: v for k, v in want.items() if k in config and k != "source"}
    a, b = stored_of(native), stored_of(tmp_path / "from_ft")
    assert a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and np.array_equal(a[n], b[n]) for n in a)

    # what config.ini leaves out comes from config.json; the sum of two biases does for both in a parallel residual
    (ft / "config.json").write_text((tmp_path / "hf" / "config.json").read_text())
    if parallel:
        for i in range(2):
            for n in ("attention.dense", "mlp.dense_4h_to_h"):
                (ft / f"model.layers.{i}.{n}.bias.bin").unlink()
    quantize.quantize(ft, tmp_path / "q", "q8_row", "keep", **QUIET)
    quantize.quantize(native, tmp_path / "q2", "q8_row", "keep", **QUIET)
    assert capsys.readouterr().err == ""
    got, want = (prompt_logits(runner(tmp_path / d), TOKENS) for d in ("q", "q2"))
    np.testing.assert_allclose(got, want, atol=2e-3 * np.abs(want).max() if dtype == "fp16" else 2e-5 * np.abs(want).max())


def test_fastertransformer_refusals(tmp_path):
    make_neox(tmp_path, "f16")
    ft = ft_directory(tmp_path / "ft", tmp_path / "hf", 2, "fp16", True)
    ini = (ft / "config.ini").read_text()

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            convert.convert(ft, tmp_path / "out", **QUIET)
        assert not (tmp_path / "out").exists()

    for old, new, message in (("gptneox]", "llama]", r"sections are \['llama'\]; expected gptneox"), ("head_num = 4", "head_num = four", "field head_num is 'four'"),
                              ("num_layer = 2\n", "", "field num_layer is missing"), ("= fp16", "= int8", "field weight_data_type is 'int8'; expected fp16"),
                              ("= fp16", "= fp32", r"model.wte.bin has \d+ bytes; expected \d+"), ("[gptneox]", "gptneox", "not an INI file"),
                              ("num_layer = 2", "num_layer = 3", r"model.layers.2.input_layernorm.weight.bin is missing")):
        (ft / "config.ini").write_text(ini.replace(old, new))
        refused(message)
    (ft / "config.ini").write_text(ini)
    (ft / "config.json").write_text(json.dumps({"hidden_size": 128}))
    refused("config.json: field hidden_size is 128; config.ini makes it 96")
    (ft / "config.json").unlink()
    (ft / "model.layers.1.mlp.dense_h_to_4h.weight.1.bin").unlink()
    refused("model.layers.1.mlp.dense_h_to_4h.weight.1.bin is missing")
    (ft / "model.layers.0.attention.dense.weight.0.q.bin").write_bytes(b"")
    refused("dense.weight.0.q.bin: int8 codes in the order of one GPU generation's kernels.* start from the fp16 or fp32 directory")
