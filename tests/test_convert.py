"""tools/convert.py: what it writes equals the checkpoint, what it does not understand it refuses, a killed run leaves nothing."""

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

TOOLS = Path(__file__).parent.parent / "tools"
sys.path.insert(0, str(TOOLS))
import convert as tool  # noqa: E402
from checkpoint import CheckpointError, read_safetensors  # noqa: E402

HEADS, HEAD_DIM, HIDDEN = 4, 16, 64


def make_checkpoint(path: Path, dtype=torch.float32, **config) -> GPTNeoXForCausalLM:
    torch.manual_seed(1)
    fields = dict(hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=96, vocab_size=131,
                  max_position_embeddings=64, rotary_pct=0.5, bos_token_id=1, eos_token_id=2)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**{**fields, **config})).to(dtype)
    model.save_pretrained(path)
    return model


def written(path: Path) -> dict[str, np.ndarray]:
    return {name: info.load() for f in sorted(path.glob("*.safetensors")) for name, info in read_safetensors(f).items()}


def edit_json(path: Path, **changes) -> None:
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_the_checkpoints(tmp_path, dtype):
    model = make_checkpoint(tmp_path / "hf", dtype)
    config = tool.convert(tmp_path / "hf", tmp_path / "out", tokenizer=False)
    tensors, state = written(tmp_path / "out"), model.state_dict()
    assert len(tensors) == len(state)
    as32 = {k: v.astype(np.float32) for k, v in tensors.items()}
    for ours, hf in [("embed.weight", "gpt_neox.embed_in.weight"), ("layers.1.mlp_up.bias", "gpt_neox.layers.1.mlp.dense_h_to_4h.bias"),
                     ("layers.0.norm2.weight", "gpt_neox.layers.0.post_attention_layernorm.weight")]:
        np.testing.assert_array_equal(as32[ours], state[hf].float().numpy())
    qkv = state["gpt_neox.layers.1.attention.query_key_value.weight"].float().numpy()
    ours = as32["layers.1.qkv.weight"]
    for head in range(HEADS):
        for part in range(3):
            np.testing.assert_array_equal(ours[(part * HEADS + head) * HEAD_DIM:][:HEAD_DIM], qkv[(head * 3 + part) * HEAD_DIM:][:HEAD_DIM])
    assert config["residual"] == "parallel_two_norms" and config["rope_dim"] == 8 and config["eos_ids"] == [2]


def test_bin_sharded_and_single_files_agree(tmp_path):
    model = make_checkpoint(tmp_path / "hf", torch.bfloat16)
    tool.convert(tmp_path / "hf", tmp_path / "single", tokenizer=False)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    tool.convert(tmp_path / "sharded", tmp_path / "from_shards", tokenizer=False)
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
    tool.convert(tmp_path / "hf", tmp_path / "from_bin", tokenizer=False)
    want = written(tmp_path / "single")
    for other in ("from_shards", "from_bin"):
        got = written(tmp_path / other)
        assert got.keys() == want.keys()
        for name in want:
            assert got[name].dtype == want[name].dtype and got[name].tobytes() == want[name].tobytes(), name


def test_bin_with_strided_views(tmp_path):
    make_checkpoint(tmp_path / "hf")
    state = load_file(tmp_path / "hf" / "model.safetensors")
    tool.convert(tmp_path / "hf", tmp_path / "want", tokenizer=False)
    (tmp_path / "hf" / "model.safetensors").unlink()
    name = "gpt_neox.layers.0.attention.dense.weight"
    state[name] = state[name].t().contiguous().t()
    torch.save(state, tmp_path / "hf" / "pytorch_model.bin")
    tool.convert(tmp_path / "hf", tmp_path / "got", tokenizer=False)
    np.testing.assert_array_equal(written(tmp_path / "got")["layers.0.attn_out.weight"], written(tmp_path / "want")["layers.0.attn_out.weight"])


def test_output_dtype(tmp_path):
    model = make_checkpoint(tmp_path / "hf")
    tool.convert(tmp_path / "hf", tmp_path / "out", dtype="bf16", tokenizer=False)
    got = written(tmp_path / "out")["embed.weight"]
    assert got.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got.astype(np.float32), model.state_dict()["gpt_neox.embed_in.weight"].bfloat16().float().numpy())


def change_state(path: Path, **tensors) -> None:
    state = load_file(path / "model.safetensors")
    for name, value in tensors.items():
        name = name.replace("__", ".")
        if value is None:
            del state[name]
        else:
            state[name] = value
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("config, message", [
    (dict(hidden_act="quick_gelu"), "hidden_act is 'quick_gelu'"),
    (dict(architectures=["MambaForCausalLM"]), "architectures is .'MambaForCausalLM'"),
    (dict(quantization_config={"bits": 4}), "quantization_config"),
    (dict(new_trick=3), "field new_trick = 3 is not understood"),
    (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "partial_rotary_factor": 0.5}), "'yarn'"),
    (dict(num_attention_heads=7), "hidden_size 64 is not a multiple of num_attention_heads 7"),
    (dict(num_hidden_layers=3), "gpt_neox.layers.2.input_layernorm.weight .* is missing"),
    (dict(num_hidden_layers=1), "is not part of gpt_neox"),
    (dict(intermediate_size=100), r"has shape \[96, 64\]; config.json makes it \[100, 64\]"),
    (dict(vocab_size="many"), "vocab_size is 'many'; expected int"),
    (dict(hidden_size=0), "hidden_size is 0; expected at least 1"),
])
def test_configs_refused_by_field(tmp_path, config, message):
    make_checkpoint(tmp_path / "hf")
    edit_json(tmp_path / "hf" / "config.json", **config)
    with pytest.raises(CheckpointError, match=message):
        tool.convert(tmp_path / "hf", tmp_path / "out", tokenizer=False)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_ignored_field(tmp_path):
    make_checkpoint(tmp_path / "hf")
    edit_json(tmp_path / "hf" / "config.json", new_trick=3)
    assert tool.main(["--no-tokenizer", "--ignore-field", "new_trick", str(tmp_path / "hf"), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("name, value, dtype, message", [
    ("gpt_neox__embed_in__weight", torch.full((131, 64), float("nan")), "auto", "8384 NaN or Inf"),
    ("gpt_neox__final_layer_norm__bias", torch.full((64,), 1e6), "f16", "magnitude 1e.06, above float16's 65504"),
    ("gpt_neox__final_layer_norm__bias", None, "auto", "gpt_neox.final_layer_norm.bias .* is missing"),
    ("gpt_neox__final_layer_norm__bias", torch.zeros(64, dtype=torch.int32), "auto", "dtype int32; expected a float type"),
])
def test_tensors_refused_by_name(tmp_path, name, value, dtype, message):
    make_checkpoint(tmp_path / "hf")
    change_state(tmp_path / "hf", **{name: value})
    with pytest.raises(CheckpointError, match=message):
        tool.convert(tmp_path / "hf", tmp_path / "out", dtype=dtype, tokenizer=False)
    assert not list((tmp_path / "out").glob("*")) and not list((tmp_path / "out").glob(".convert-*"))


def test_truncated_file(tmp_path, capsys):
    make_checkpoint(tmp_path / "hf")
    f = tmp_path / "hf" / "model.safetensors"
    f.write_bytes(f.read_bytes()[:-100])
    assert tool.main(["--no-tokenizer", str(tmp_path / "hf"), str(tmp_path / "out")]) == 1
    assert "model.safetensors: tensor" in capsys.readouterr().err


def test_missing_tokenizer(tmp_path):
    make_checkpoint(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="no tokenizer.json and no tokenizer.model"):
        tool.convert(tmp_path / "hf", tmp_path / "out")


def test_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "owned"),)

    make_checkpoint(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    with zipfile.ZipFile(tmp_path / "hf" / "pytorch_model.bin", "w") as z:
        z.writestr("archive/data.pkl", pickle.dumps({"a": Evil()}))
    with pytest.raises(CheckpointError, match="system.*refused"):
        tool.convert(tmp_path / "hf", tmp_path / "out", tokenizer=False)
    assert not (tmp_path / "owned").exists()


def test_killed_conversion_leaves_the_earlier_one(tmp_path):
    make_checkpoint(tmp_path / "hf")
    tool.convert(tmp_path / "hf", tmp_path / "out", tokenizer=False)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    script = f"""
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, {str(TOOLS)!r})
        import contextlib, convert
        @contextlib.contextmanager
        def killer():
            yield lambda n: os.kill(os.getpid(), signal.SIGKILL)
        convert.convert(Path({str(tmp_path / 'hf')!r}), Path({str(tmp_path / 'out')!r}), "bf16", tokenizer=False, progress=killer())
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert list((tmp_path / "out").glob(".convert-*")), "the kill came before anything was written: the test tests nothing"
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.is_file()} == before
    tool.convert(tmp_path / "hf", tmp_path / "out", dtype="bf16", tokenizer=False)
    assert not list((tmp_path / "out").glob(".convert-*"))
    assert written(tmp_path / "out")["embed.weight"].dtype == ml_dtypes.bfloat16


def test_target_keeps_what_is_not_ours(tmp_path):
    make_checkpoint(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.py").write_text("# mine")
    tool.convert(tmp_path / "hf", tmp_path / "out", tokenizer=False)
    assert (tmp_path / "out" / "model.py").read_text() == "# mine"
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="holds x.safetensors without a config.json"):
        tool.convert(tmp_path / "hf", tmp_path, tokenizer=False)


def test_random_presets(tmp_path):
    assert tool.main(["--random", "gptneox-13b", str(tmp_path / "a")]) == 0
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["random"] == {"seed": 0, "format": "f16"} and config["layers"] == 40 and config["files"] == []
    assert tool.main(["--random", "gptneox-tiny", "--write", "--dtype", "bf16", str(tmp_path / "b")]) == 0
    tensors = written(tmp_path / "b")
    assert tensors["lm_head.weight"].shape == (1000, 128) and tensors["lm_head.weight"].dtype == ml_dtypes.bfloat16
    assert tensors["layers.0.norm1.weight"].astype(np.float32).min() == 1
