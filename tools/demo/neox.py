"""GPT-NeoX as a plain torch module, and its Hugging Face checkpoint files.

Same arithmetic as transformers' GPTNeoXForCausalLM with parallel residual, full rotary, erf GELU and
biases. Parameter names are the Hugging Face ones, so the state dict is the checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import spm


@dataclass(frozen=True)
class Shape:
    vocab: int = 4096
    hidden: int = 384
    layers: int = 5
    heads: int = 6
    intermediate: int = 1536
    max_positions: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.heads = shape.heads
        self.query_key_value = nn.Linear(shape.hidden, 3 * shape.hidden)  # rows: per head q, k, v
        self.dense = nn.Linear(shape.hidden, shape.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x [B, T, H]
        batch, length, hidden = x.shape
        qkv = self.query_key_value(x).view(batch, length, self.heads, 3, -1).permute(3, 0, 2, 1, 4)
        q, k, v = qkv.unbind(0)  # [B, heads, T, D]
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dense(out.transpose(1, 2).reshape(batch, length, hidden))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x [B, heads, T, D]; cos, sin [T, D]
    low, high = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-high, low), dim=-1) * sin).to(x.dtype)


class Mlp(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(shape.hidden, shape.intermediate)
        self.dense_4h_to_h = nn.Linear(shape.intermediate, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x)))


class Layer(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(shape.hidden, eps=shape.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(shape.hidden, eps=shape.norm_eps)
        self.attention = Attention(shape)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x + self.attention(self.input_layernorm(x), cos, sin) + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.embed_in = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.final_layer_norm = nn.LayerNorm(shape.hidden, eps=shape.norm_eps)
        dim = shape.hidden // shape.heads
        inverse = shape.rope_theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = torch.outer(torch.arange(shape.max_positions, dtype=torch.float64), inverse).repeat(1, 2)
        self.register_buffer("cos", angle.cos().float(), persistent=False)  # [positions, D]
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_in(ids)
        cos, sin = self.cos[:ids.shape[1]], self.sin[:ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.final_layer_norm(x)


class NeoX(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.gpt_neox = Body(shape)
        self.embed_out = nn.Linear(shape.hidden, shape.vocab, bias=False)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for layer in self.gpt_neox.layers:
            for linear in (layer.attention.dense, layer.mlp.dense_4h_to_h):
                nn.init.normal_(linear.weight, std=0.02 / (2 * self.shape.layers) ** 0.5)

    def forward(self, ids: Tensor) -> Tensor:  # [B, T] -> logits [B, T, V]
        return self.embed_out(self.gpt_neox(ids))

    def loss(self, rows: Tensor) -> Tensor:  # rows [B, T + 1]; mean nats per token
        logits = self(rows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def hf_config(shape: Shape) -> dict:
    return {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox",
        "vocab_size": shape.vocab, "hidden_size": shape.hidden, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.max_positions, "hidden_act": "gelu",
        "rotary_pct": 1.0, "rotary_emb_base": int(shape.rope_theta), "layer_norm_eps": shape.norm_eps,
        "use_parallel_residual": True, "attention_bias": True, "tie_word_embeddings": False,
        "attention_dropout": 0.0, "hidden_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
        "bos_token_id": spm.EOS_ID, "eos_token_id": spm.EOS_ID, "torch_dtype": "float16",
    }


def save(model: NeoX, tokenizer_model: bytes, out: Path, shards: int) -> None:
    """Writes a Hugging Face directory: fp16 weights in `shards` files, configs, tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in model.state_dict().items()}
    total = sum(t.numel() * 2 for t in tensors.values())
    if shards == 1:
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    else:
        groups: list[dict[str, Tensor]] = [{} for _ in range(shards)]
        before = 0
        for name, tensor in tensors.items():
            groups[min(shards - 1, before * shards // total)][name] = tensor
            before += tensor.numel() * 2
        weight_map = {}
        for number, group in enumerate(groups, 1):
            file = f"model-{number:05d}-of-{shards:05d}.safetensors"
            save_file(group, out / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(group, file)
        _write(out / "model.safetensors.index.json",
               {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    _write(out / "config.json", hf_config(model.shape))
    _write(out / "generation_config.json", {"bos_token_id": spm.EOS_ID, "eos_token_id": spm.EOS_ID})
    (out / "tokenizer.model").write_bytes(tokenizer_model)
    _write(out / "tokenizer_config.json", {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": False,
        "add_prefix_space": False, "legacy": False, "clean_up_tokenization_spaces": False,
        "bos_token": spm.EOS_PIECE, "eos_token": spm.EOS_PIECE, "unk_token": "<unk>",
        "model_max_length": model.shape.max_positions,
        "additional_special_tokens": list(spm.FIM_PIECES)})


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def load(directory: Path) -> tuple[NeoX, spm.Tokenizer]:
    """The saved checkpoint in float32, as it will be served: its weights rounded to fp16."""
    config = json.loads((directory / "config.json").read_text())
    model = NeoX(Shape(
        config["vocab_size"], config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"],
        config["intermediate_size"], config["max_position_embeddings"], float(config["rotary_emb_base"]),
        config["layer_norm_eps"]))
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("model*.safetensors")):
        tensors |= load_file(file)
    model.load_state_dict(tensors)
    return model.float(), spm.Tokenizer((directory / "tokenizer.model").read_bytes())
