"""The graph is configured by data: four architectures besides GPT-NeoX, their weights renamed here, against transformers in float32.
Between them: RMS norm, gated SiLU, grouped and multi-query attention, learned positions, a sliding window, one shared norm, linear
rope scaling, a bias on the head."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from safetensors.numpy import save_file  # noqa: E402

from helpers import make_batch, pages_of, prompt_logits, rows_not_sampled_change_nothing, runner  # noqa: E402
from test_model import TOLERANCE, close, reference  # noqa: E402
from test_ops import same_bits  # noqa: E402

TOKENS = np.random.default_rng(3).integers(0, 131, 90)
COMMON = dict(vocab_size=131, num_hidden_layers=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def native_config(**fields) -> dict:
    base = dict(format_version=1, architecture="test", vocab=131, layers=2, max_positions=128, norm="layer", norm_eps=1e-5, residual="serial",
                activation="gelu", gated=False, position="rope", rope_theta=1e4, rope_scaling={"type": "none"}, tied=False, window=0, bos_id=1,
                eos_ids=[2])
    return {**base, **fields}


def cat(state, *names):
    return torch.cat([state[n] for n in names])


def pairs(state, renames, layers=2) -> dict:
    """{ours: HF name or names to be joined by rows} for each i in layers, weights and whatever biases there are."""
    out = {}
    for ours, theirs in renames.items():
        for i in range(layers) if "{i}" in ours else [0]:
            names = [n.format(i=i) for n in ([theirs] if isinstance(theirs, str) else theirs)]
            for kind in ("weight", "bias"):
                if f"{names[0]}.{kind}" in state:
                    out[f"{ours.format(i=i)}.{kind}"] = cat(state, *(f"{n}.{kind}" for n in names)).contiguous().numpy()
    return out


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    c = LlamaConfig(**COMMON, hidden_size=48, intermediate_size=88, num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=128,
                    rms_norm_eps=1e-6, rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e5))
    model = LlamaForCausalLM(c)
    p = "model.layers.{i}."
    names = {"embed": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head", "layers.{i}.norm1": p + "input_layernorm",
             "layers.{i}.norm2": p + "post_attention_layernorm", "layers.{i}.qkv": [p + f"self_attn.{x}_proj" for x in "qkv"],
             "layers.{i}.attn_out": p + "self_attn.o_proj", "layers.{i}.mlp_gate": p + "mlp.gate_proj", "layers.{i}.mlp_up": p + "mlp.up_proj",
             "layers.{i}.mlp_down": p + "mlp.down_proj"}
    return model, names, native_config(hidden=48, heads=6, kv_heads=2, head_dim=8, intermediate=88, norm="rms", norm_eps=1e-6, activation="silu",
                                       gated=True, rope_dim=8, rope_theta=1e5, rope_scaling={"type": "linear", "factor": 4})


def gpt_bigcode():
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    c = GPTBigCodeConfig(**COMMON, n_embd=48, n_head=4, n_inner=100, n_positions=128, multi_query=True,
                         activation_function="gelu_pytorch_tanh")
    model = GPTBigCodeForCausalLM(c)
    p = "transformer.h.{i}."
    names = {"embed": "transformer.wte", "position": "transformer.wpe", "final_norm": "transformer.ln_f", "layers.{i}.norm1": p + "ln_1",
             "layers.{i}.norm2": p + "ln_2", "layers.{i}.qkv": p + "attn.c_attn", "layers.{i}.attn_out": p + "attn.c_proj",
             "layers.{i}.mlp_up": p + "mlp.c_fc", "layers.{i}.mlp_down": p + "mlp.c_proj"}
    return model, names, native_config(hidden=48, heads=4, kv_heads=1, head_dim=12, intermediate=100, activation="gelu_tanh",
                                       position="learned", tied=True)


def starcoder2():
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    c = Starcoder2Config(**COMMON, hidden_size=48, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, sliding_window=17,
                         max_position_embeddings=128, norm_epsilon=1e-5, use_bias=True, hidden_act="gelu_pytorch_tanh", tie_word_embeddings=False,
                         rope_parameters=dict(rope_type="default", rope_theta=1e5), attn_implementation="eager")
    model = Starcoder2ForCausalLM(c)
    p = "model.layers.{i}."
    names = {"embed": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head", "layers.{i}.norm1": p + "input_layernorm",
             "layers.{i}.norm2": p + "post_attention_layernorm", "layers.{i}.qkv": [p + f"self_attn.{x}_proj" for x in "qkv"],
             "layers.{i}.attn_out": p + "self_attn.o_proj", "layers.{i}.mlp_up": p + "mlp.c_fc", "layers.{i}.mlp_down": p + "mlp.c_proj"}
    return model, names, native_config(hidden=48, heads=4, kv_heads=2, head_dim=12, intermediate=96, activation="gelu_tanh", rope_dim=12,
                                       rope_theta=1e5, window=17)


def phi():
    from transformers import PhiConfig, PhiForCausalLM

    c = PhiConfig(**COMMON, hidden_size=48, intermediate_size=96, num_attention_heads=4, max_position_embeddings=128, hidden_act="gelu_new",
                  rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5))
    model = PhiForCausalLM(c)
    p = "model.layers.{i}."
    names = {"embed": "model.embed_tokens", "final_norm": "model.final_layernorm", "lm_head": "lm_head", "layers.{i}.norm1": p + "input_layernorm",
             "layers.{i}.qkv": [p + f"self_attn.{x}_proj" for x in "qkv"], "layers.{i}.attn_out": p + "self_attn.dense",
             "layers.{i}.mlp_up": p + "mlp.fc1", "layers.{i}.mlp_down": p + "mlp.fc2"}
    return model, names, native_config(hidden=48, heads=4, kv_heads=4, head_dim=12, intermediate=96, residual="parallel_one_norm",
                                       activation="gelu_tanh", rope_dim=6)


@pytest.fixture(scope="module", params=[llama, gpt_bigcode, starcoder2, phi], ids=lambda f: f.__name__)
def architecture(request, tmp_path_factory):
    torch.manual_seed(11)
    model, names, config = request.param()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.15 if p.ndim == 2 else 0.3))
    path = tmp_path_factory.mktemp(request.param.__name__)
    save_file(pairs(model.state_dict(), names), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return model.eval(), path


def test_logits(architecture):
    model, native = architecture
    close(prompt_logits(runner(native), TOKENS, 33), reference(model, TOKENS))


def test_chunks_and_decode_rows_do_not_matter(architecture):
    _, native = architecture
    r = runner(native)
    whole = prompt_logits(r, TOKENS)
    same_bits(prompt_logits(r, TOKENS, 7), whole)
    pages = pages_of(r, seed=4)
    rows = [r.logits(make_batch(pages, prefill=[(1, TOKENS[:50], 0)]))]
    rows += [r.logits(make_batch(pages, decode=[(1, t, 50 + i)])) for i, t in enumerate(TOKENS[50:])]
    same_bits(np.concatenate(rows), whole[49:])
    rows_not_sampled_change_nothing(r, TOKENS)


def test_tensor_parallel(architecture):
    _, native = architecture
    config = json.loads((native / "config.json").read_text())
    if config["kv_heads"] % 2:
        with pytest.raises(ValueError, match="tensor_parallel is 2, but the model's kv_heads, 1, is not divisible by it"):
            runner(native, tensor_parallel=2)
        return
    two = runner(native, tensor_parallel=2, threads=2)
    assert np.abs(prompt_logits(two, TOKENS) - prompt_logits(runner(native), TOKENS)).max() <= TOLERANCE
    rows_not_sampled_change_nothing(two, TOKENS)
