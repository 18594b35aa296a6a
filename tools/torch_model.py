"""A model of our config.json in torch, a layer at a time, for calibration: what goes into each matrix. Float32; the same graph as
native/model/model.cc, which serves it (tests/test_gptq.py holds the two together)."""

from __future__ import annotations

import math
from typing import Any, Callable, Iterator

import torch
from torch.nn import functional as F

from checkpoint import CheckpointError

# Matrices of a layer in the order of computation; those of one step have the same input.
STEPS = (("qkv",), ("attn_out",), ("mlp_up", "mlp_gate"), ("mlp_down",))
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu, "silu": F.silu,
}
Tensors = dict[str, torch.Tensor]


def check(c: dict[str, Any]) -> None:
    """CheckpointError names a config field that this model does not compute."""
    scaling = c.get("rope_scaling", {"type": "none"})
    for field, value, known in (("norm", c["norm"], ("layer", "rms")), ("residual", c["residual"], ("serial", "parallel_one_norm", "parallel_two_norms")),
                                ("activation", c["activation"], tuple(_ACTIVATIONS)), ("position", c["position"], ("rope", "learned")),
                                ("rope_scaling.type", scaling["type"], ("none", "linear"))):
        if value not in known:
            raise CheckpointError(f"config.json: {field} is {value!r}; GPTQ's calibration computes {', '.join(known)}")


def norm(c: dict[str, Any], w: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    weight, bias = w[f"{name}.weight"], w.get(f"{name}.bias")
    if c["norm"] == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, c["norm_eps"])
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + c["norm_eps"]) * weight
    return y if bias is None else y + bias


def embed(c: dict[str, Any], w: Tensors, ids: torch.Tensor) -> torch.Tensor:
    """[S, T] ids -> [S, T, H]"""
    x = w["embed.weight"][ids]
    return x + w["position.weight"][:ids.shape[1]] if c["position"] == "learned" else x


def _rotate(c: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    """[S, heads, T, D]: pairs (i, i + rope_dim / 2) of the first rope_dim dimensions."""
    dim = c["rope_dim"]
    scale = c["rope_scaling"].get("factor", 1.0)
    inverse = (1.0 / c["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float64, device=x.device) / dim)).float() / scale
    angle = torch.arange(x.shape[2], dtype=torch.float32, device=x.device)[:, None] * inverse
    cos, sin = angle.double().cos().float(), angle.double().sin().float()
    a, b = x[..., :dim // 2], x[..., dim // 2:dim]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., dim:]), -1)


def _attend(c: dict[str, Any], qkv: torch.Tensor) -> torch.Tensor:
    """[S, T, (heads + 2 kv_heads) D] -> [S, T, heads D]"""
    heads, kv, d, (s, t, _) = c["heads"], c["kv_heads"], c["head_dim"], qkv.shape
    q, k, v = qkv.reshape(s, t, heads + 2 * kv, d).transpose(1, 2).split((heads, kv, kv), 1)
    if c["position"] == "rope" and c["rope_dim"]:
        q, k = _rotate(c, q), _rotate(c, k)
    k, v = (x.repeat_interleave(heads // kv, 1) for x in (k, v))
    at = torch.arange(t, device=qkv.device)
    back = at[:, None] - at
    seen = (back >= 0) & (back < c["window"]) if c["window"] else back >= 0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=1 / math.sqrt(d))
    return out.transpose(1, 2).reshape(s, t, heads * d)


def layer(c: dict[str, Any], w: Tensors, x: torch.Tensor) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """One layer of x [S, T, H], w with names such as "qkv.weight". Yields each step of STEPS with its input [S, T, K] before it computes
    the step, with the weights that w has then; last ((), the layer's output)."""
    qkv, out, up, down = STEPS
    act = _ACTIVATIONS[c["activation"]]

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return F.linear(value, w[f"{name}.weight"], w.get(f"{name}.bias"))

    n = norm(c, w, "norm1", x)
    yield qkv, n
    attended = _attend(c, linear("qkv", n))
    yield out, attended
    y = x + linear("attn_out", attended)
    if c["residual"] != "parallel_one_norm":
        n = norm(c, w, "norm2", y if c["residual"] == "serial" else x)
    yield up, n
    h = act(linear("mlp_gate", n)) * linear("mlp_up", n) if c["gated"] else act(linear("mlp_up", n))
    yield down, h
    yield (), y + linear("mlp_down", h)
