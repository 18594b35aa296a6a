"""Reads a weights directory of FasterTransformer (GPT-NeoX, as FasterTransformer4CodeFuse's converter wrote it) as a Hugging Face checkpoint.

config.ini and headerless files model.*.bin, in fp16 or fp32. Matrices are [in, out], those of a layer split over the GPUs that they were
written for (`.0.bin`, `.1.bin`, ...); query, key and value are [in, 3, heads, D]. The biases that every GPU adds, attention.dense.bias and
mlp.dense_4h_to_h.bias, are divided by the number of GPUs; with a parallel residual their sum may be all there is.
"""

from __future__ import annotations

import configparser
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint import CheckpointError, TensorInfo, read_json

_DTYPES = {"fp16": np.dtype("<f2"), "float16": np.dtype("<f2"), "fp32": np.dtype("<f4"), "float32": np.dtype("<f4")}
_UNSAID = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "rotary_emb_base": 10000, "max_position_embeddings": 2048}  # GPTNeoXConfig's defaults


def is_ft_directory(directory: Path) -> bool:
    return (directory / "config.ini").is_file()


def _hf_config(directory: Path) -> dict[str, Any]:
    """config.ini as a Hugging Face config; what it leaves open from a config.json beside it, else by default, which is said on stderr."""
    path, ini = directory / "config.ini", configparser.ConfigParser()
    try:
        ini.read_string(path.read_text(encoding="utf-8"))
    except (configparser.Error, UnicodeDecodeError) as e:
        raise CheckpointError(f"{path}: not an INI file ({str(e).splitlines()[0]})") from None
    if "gptneox" not in ini:
        raise CheckpointError(f"{path}: sections are {ini.sections()}; expected gptneox, the only model that is read")
    section = ini["gptneox"]

    def integer(name: str, low: int) -> int:
        value = section.get(name)
        if value is None or not re.fullmatch(r"\d+", value) or int(value) < low:
            raise CheckpointError(f"{path}: field {name} is {'missing' if value is None else repr(value)}; expected an integer, at least {low}")
        return int(value)

    if section.get("weight_data_type") not in _DTYPES:
        raise CheckpointError(f"{path}: field weight_data_type is {section.get('weight_data_type')!r}; expected {', '.join(_DTYPES)}")
    heads, d = integer("head_num", 1), integer("size_per_head", 1)
    config = {
        "architectures": ["GPTNeoXForCausalLM"], "num_attention_heads": heads, "hidden_size": heads * d, "intermediate_size": integer("inter_size", 1),
        "num_hidden_layers": integer("num_layer", 1), "vocab_size": integer("vocab_size", 1), "rotary_pct": (integer("rotary_embedding", 0) + 0.5) / d,
        "bos_token_id": integer("start_id", 0), "eos_token_id": integer("end_id", 0), "use_parallel_residual": bool(integer("use_gptj_residual", 0)),
    }
    if not (directory / "config.json").is_file():
        print(f"{path} does not say {', '.join(f'{k} (taken as {v})' for k, v in _UNSAID.items())}; "
              "the model's Hugging Face config.json in that directory would", file=sys.stderr)
        return {**config, **_UNSAID}
    told = read_json(directory / "config.json")
    for name in ("num_attention_heads", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "use_parallel_residual"):
        if told.get(name, config[name]) != config[name]:
            raise CheckpointError(f"{directory / 'config.json'}: field {name} is {told[name]!r}; config.ini makes it {config[name]!r}")
    return {**config, **told}


class _Files:
    def __init__(self, directory: Path, dtype: np.dtype):
        self._directory, self._dtype = directory, dtype
        self.tensors: dict[str, TensorInfo] = {}
        for old in sorted(directory.glob("model.*.q.bin")):
            raise CheckpointError(f"{old}: int8 codes in the order of one GPU generation's kernels, which cannot be told from the file; "
                                  "start from the fp16 or fp32 directory that they were made from (tools/quantize.py --format q8_row)")
        split = "model.layers.0.attention.query_key_value.weight.{}.bin"
        self.gpus = next(i for i in range(1025) if not self.has(split.format(i)))
        if not self.gpus:
            raise CheckpointError(f"{directory / split.format(0)} is missing")

    def has(self, file: str) -> bool:
        return (self._directory / file).is_file()

    def _view(self, file: str, *shape: int) -> Callable[[], np.ndarray]:
        path, want = self._directory / file, int(np.prod(shape)) * self._dtype.itemsize
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != want:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes; expected {want} ({list(shape)} of {self._dtype})")
        return lambda: np.memmap(path, self._dtype, "r", shape=shape)

    def add(self, hf_name: str, hf_shape: tuple[int, ...], file: str, shape: tuple[int, ...], split: int | None = None,
            to_hf: Callable[[np.ndarray], np.ndarray] = lambda t: t) -> None:
        """A tensor that `file` has with that shape, or, split along an axis, the files of all GPUs have together."""
        if split is None:
            views = [self._view(f"{file}.bin", *shape)]
        else:
            if shape[split] % self.gpus:
                raise CheckpointError(f"{self._directory / file}.*.bin: {shape[split]} cannot be shared by the {self.gpus} GPUs that there are files for")
            part = (*shape[:split], shape[split] // self.gpus, *shape[split + 1:])
            views = [self._view(f"{file}.{i}.bin", *part) for i in range(self.gpus)]

        def load() -> np.ndarray:
            whole = views[0]() if len(views) == 1 else np.concatenate([v() for v in views], axis=split)
            return to_hf(whole)

        first = self._directory / (f"{file}.bin" if split is None else f"{file}.0.bin")
        self.tensors[hf_name] = TensorInfo(hf_name, hf_shape, self._dtype, first, load)

    def zeros(self, hf_name: str, n: int) -> None:
        self.tensors[hf_name] = TensorInfo(hf_name, (n,), self._dtype, self._directory, lambda: np.zeros(n, self._dtype))


def open_ft_directory(directory: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """(Hugging Face config, tensors by their Hugging Face names)."""
    config = _hf_config(directory)
    ini = configparser.ConfigParser()
    ini.read(directory / "config.ini", encoding="utf-8")
    files = _Files(directory, _DTYPES[ini["gptneox"]["weight_data_type"]])
    h, f, heads, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"))
    d = h // heads

    def transposed(t: np.ndarray) -> np.ndarray:
        return t.T

    def bias(t: np.ndarray) -> np.ndarray:  # of all GPUs
        return (t * t.dtype.type(files.gpus)).astype(t.dtype)

    files.add("gpt_neox.embed_in.weight", (vocab, h), "model.wte", (vocab, h))
    files.add("embed_out.weight", (vocab, h), "model.lm_head.weight", (vocab, h))
    for part in ("weight", "bias"):
        files.add(f"gpt_neox.final_layer_norm.{part}", (h,), f"model.final_layernorm.{part}", (h,))
    for i in range(config["num_hidden_layers"]):
        hf, us = f"gpt_neox.layers.{i}.", f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            for part in ("weight", "bias"):
                files.add(f"{hf}{norm}.{part}", (h,), f"{us}{norm}.{part}", (h,))
        files.add(f"{hf}attention.query_key_value.weight", (3 * h, h), f"{us}attention.query_key_value.weight", (h, 3, h), 2,
                  lambda t: t.reshape(h, 3, heads, d).transpose(2, 1, 3, 0).reshape(3 * h, h))
        files.add(f"{hf}attention.query_key_value.bias", (3 * h,), f"{us}attention.query_key_value.bias", (3, h), 1,
                  lambda t: t.reshape(3, heads, d).swapaxes(0, 1).reshape(-1))
        files.add(f"{hf}attention.dense.weight", (h, h), f"{us}attention.dense.weight", (h, h), 0, transposed)
        files.add(f"{hf}mlp.dense_h_to_4h.weight", (f, h), f"{us}mlp.dense_h_to_4h.weight", (h, f), 1, transposed)
        files.add(f"{hf}mlp.dense_h_to_4h.bias", (f,), f"{us}mlp.dense_h_to_4h.bias", (f,), 0)
        files.add(f"{hf}mlp.dense_4h_to_h.weight", (h, f), f"{us}mlp.dense_4h_to_h.weight", (f, h), 0, transposed)
        summed = f"{us}mlp.attention.bias.sum"
        if config["use_parallel_residual"] and files.has(f"{summed}.bin") and not files.has(f"{us}attention.dense.bias.bin"):
            files.add(f"{hf}mlp.dense_4h_to_h.bias", (h,), summed, (h,), to_hf=bias)
            files.zeros(f"{hf}attention.dense.bias", h)
        else:
            for hf_name in ("attention.dense.bias", "mlp.dense_4h_to_h.bias"):
                files.add(f"{hf}{hf_name}", (h,), f"{us}{hf_name}", (h,), to_hf=bias)
    return config, files.tensors
