"""Hugging Face architectures as data: config.json -> our config, tensor names and quirks -> canonical tensors.

The one place that knows Hugging Face names. Each architecture is a function `(hf config) -> Plan`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable

import numpy as np

from checkpoint import CheckpointError

# PretrainedConfig fields that do not change what a causal LM computes.
_BENIGN = {
    "_name_or_path", "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "sep_token_id", "initializer_range", "attention_dropout", "hidden_dropout", "classifier_dropout",
    "attention_probs_dropout_prob", "hidden_dropout_prob", "gradient_checkpointing", "return_dict", "output_attentions",
    "output_hidden_states", "id2label", "label2id", "problem_type", "num_labels", "task_specific_params", "is_decoder",
    "is_encoder_decoder", "auto_map", "use_return_dict", "_attn_implementation_autoset", "attn_implementation", "chunk_size_feed_forward",
    "tokenizer_class", "prefix", "finetuning_task", "pruned_heads", "torchscript", "cross_attention_hidden_size",
    "add_cross_attention", "decoder_start_token_id", "type_vocab_size",
}
_ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
    "silu": "silu", "swish": "silu",
}


@dataclass
class Source:
    """Where a canonical tensor comes from: an HF tensor, its expected shape there, and the exact re-ordering to ours."""

    hf_name: str
    hf_shape: tuple[int, ...]
    shape: tuple[int, ...]
    transform: Callable[[np.ndarray], np.ndarray] = lambda t: t
    alias: str = ""  # another name the same tensor goes by


@dataclass
class Plan:
    """What a conversion does: our config and, per canonical tensor, its source."""

    config: dict
    tensors: dict[str, Source] = field(default_factory=dict)
    ignored_suffixes: tuple[str, ...] = ()  # buffers that some exports carry


class _Fields:
    """Reads HF config fields by type and range; what was never read and is not benign is refused by `finish`."""

    def __init__(self, config: dict, ignore: set[str]):
        self._config, self._seen = config, set(_BENIGN) | ignore

    def get(self, name: str, default, kind: type):
        self._seen.add(name)
        value = self._config.get(name, default)
        if value is None and default is not None:
            value = default
        if value is None and name not in self._config:
            raise CheckpointError(f"config.json: field {name} is missing")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise CheckpointError(f"config.json: field {name} is {value!r}; expected {kind.__name__}")
        return value

    def positive(self, name: str, default=None) -> int:
        value = self.get(name, default, int)
        if value < 1:
            raise CheckpointError(f"config.json: field {name} is {value}; expected at least 1")
        return value

    def raw(self, name: str, default=None):
        self._seen.add(name)
        return self._config.get(name, default)

    def finish(self) -> None:
        unknown = sorted(k for k in self._config if k not in self._seen)
        if unknown:
            raise CheckpointError(
                f"config.json: field {unknown[0]} = {self._config[unknown[0]]!r} is not understood"
                f"{f' (nor {chr(44).join(unknown[1:])})' if unknown[1:] else ''}; if it does not change what the model computes, "
                f"pass --ignore-field {unknown[0]}")


def _rope_scaling(value) -> dict:
    if not value:
        return {"type": "none"}
    kind = value.get("rope_type", value.get("type", "default"))
    if kind == "default":
        return {"type": "none"}
    if kind == "linear":
        return {"type": "linear", "factor": float(value["factor"])}
    raise CheckpointError(f"config.json: rope scaling type is {kind!r}; understood are default and linear")


def gpt_neox(config: dict, ignore: set[str]) -> Plan:
    """GPTNeoXForCausalLM (CodeFuse-13B, Pythia, GPT-NeoX-20B)."""
    f = _Fields(config, ignore)
    hidden, heads = f.positive("hidden_size"), f.positive("num_attention_heads")
    layers, inter, vocab = f.positive("num_hidden_layers"), f.positive("intermediate_size"), f.positive("vocab_size")
    if hidden % heads:
        raise CheckpointError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    head_dim = hidden // heads
    act = f.get("hidden_act", "gelu", str)
    if act not in _ACTIVATIONS:
        raise CheckpointError(f"config.json: hidden_act is {act!r}; understood are {', '.join(_ACTIVATIONS)}")
    rope = f.raw("rope_parameters") or {}  # transformers >= 5 groups the rope fields here
    pct = float(rope.get("partial_rotary_factor", f.get("rotary_pct", 0.25, float)))
    rope_dim = int(head_dim * pct)
    if not 0 <= rope_dim <= head_dim or rope_dim % 2:
        raise CheckpointError(f"config.json: rotary_pct {pct} of head size {head_dim} gives {rope_dim} rotated dimensions; expected an even number up to {head_dim}")
    attention_bias, tied = f.get("attention_bias", True, bool), f.get("tie_word_embeddings", False, bool)
    ours = {
        "architecture": "gpt_neox", "vocab": vocab, "hidden": hidden, "layers": layers, "heads": heads, "kv_heads": heads,
        "head_dim": head_dim, "intermediate": inter, "max_positions": f.positive("max_position_embeddings", 2048),
        "norm": "layer", "norm_eps": f.get("layer_norm_eps", 1e-5, float),
        "residual": "parallel_two_norms" if f.get("use_parallel_residual", True, bool) else "serial",
        "activation": _ACTIVATIONS[act], "gated": False, "position": "rope", "rope_dim": rope_dim,
        "rope_theta": float(rope.get("rope_theta", f.get("rotary_emb_base", 10000.0, float))),
        "rope_scaling": _rope_scaling(rope or f.raw("rope_scaling")), "tied": tied, "window": 0,
    }
    f.finish()

    def qkv(t: np.ndarray) -> np.ndarray:
        # HF keeps q, k, v of one head together: [heads, 3, D, ...] -> [3, heads, D, ...]
        return np.ascontiguousarray(t.reshape(heads, 3, head_dim, *t.shape[1:]).swapaxes(0, 1)).reshape(t.shape)

    plan = Plan(ours, ignored_suffixes=(".attention.bias", ".attention.masked_bias", ".attention.rotary_emb.inv_freq"))

    def add(name: str, hf: str, *shape: int, **kw) -> None:
        plan.tensors[name] = Source(hf, shape, shape, **kw)

    add("embed.weight", "gpt_neox.embed_in.weight", vocab, hidden)
    for i in range(layers):
        hf, us = f"gpt_neox.layers.{i}.", f"layers.{i}."
        for norm, hf_norm in (("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm")):
            add(f"{us}{norm}.weight", f"{hf}{hf_norm}.weight", hidden)
            add(f"{us}{norm}.bias", f"{hf}{hf_norm}.bias", hidden)
        add(f"{us}qkv.weight", f"{hf}attention.query_key_value.weight", 3 * hidden, hidden, transform=qkv)
        add(f"{us}attn_out.weight", f"{hf}attention.dense.weight", hidden, hidden)
        if attention_bias:
            add(f"{us}qkv.bias", f"{hf}attention.query_key_value.bias", 3 * hidden, transform=qkv)
            add(f"{us}attn_out.bias", f"{hf}attention.dense.bias", hidden)
        add(f"{us}mlp_up.weight", f"{hf}mlp.dense_h_to_4h.weight", inter, hidden)
        add(f"{us}mlp_up.bias", f"{hf}mlp.dense_h_to_4h.bias", inter)
        add(f"{us}mlp_down.weight", f"{hf}mlp.dense_4h_to_h.weight", hidden, inter)
        add(f"{us}mlp_down.bias", f"{hf}mlp.dense_4h_to_h.bias", hidden)
    add("final_norm.weight", "gpt_neox.final_layer_norm.weight", hidden)
    add("final_norm.bias", "gpt_neox.final_layer_norm.bias", hidden)
    if tied:
        plan.ignored_suffixes += ("embed_out.weight", "lm_head.weight")
    else:
        add("lm_head.weight", "embed_out.weight", vocab, hidden, alias="lm_head.weight")  # its name in transformers >= 5
    return plan


ARCHITECTURES = {"GPTNeoXForCausalLM": gpt_neox}


def plan_for(config: dict, ignore: set[str]) -> Plan:
    """The conversion plan of an HF config; CheckpointError names what is not understood."""
    names = config.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name](config, ignore)
    raise CheckpointError(f"config.json: architectures is {names!r}; understood are {', '.join(ARCHITECTURES)}")


# Random-weight presets for benchmarks, as HF configs.
PRESETS = {
    "gptneox-13b": {  # CodeFuse-13B
        "architectures": ["GPTNeoXForCausalLM"], "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40,
        "intermediate_size": 20480, "vocab_size": 100831, "max_position_embeddings": 4096, "rotary_pct": 1.0,
        "rotary_emb_base": 10000, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "use_parallel_residual": True,
        "tie_word_embeddings": False, "bos_token_id": 100256, "eos_token_id": 100256,
    },
    "gptneox-1b": {  # Pythia-1B's shape
        "architectures": ["GPTNeoXForCausalLM"], "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 8,
        "intermediate_size": 8192, "vocab_size": 50304, "max_position_embeddings": 2048, "rotary_pct": 0.25,
        "rotary_emb_base": 10000, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "use_parallel_residual": True,
        "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0,
    },
    "gptneox-tiny": {
        "architectures": ["GPTNeoXForCausalLM"], "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 512, "vocab_size": 1000, "max_position_embeddings": 512, "rotary_pct": 1.0,
        "rotary_emb_base": 10000, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "use_parallel_residual": True,
        "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0,
    },
}
