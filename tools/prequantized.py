"""Hugging Face checkpoints that GPTQ or AWQ have quantized already -> our tensors with the same codes, scales and zeros.

GPTQ (AutoGPTQ, GPTQModel, transformers): qweight [K / 8, N] and qzeros [groups, N / 8] int32 of eight 4-bit codes, scales [groups, N] and
g_idx [K], the group of each input. In checkpoint_format "gptq" a zero is stored less 1 (0 as 15), in "gptq_v2" as it is.
AWQ (version gemm): qweight [K, N / 8], qzeros [groups, N / 8] in its own order within a word, scales [groups, N].

desc_act: groups of inputs that do not lie together become so by re-ordering a matrix's columns, and its inputs with them. Those of mlp_down
are re-ordered where they are computed: only an element-wise function separates them from the rows of mlp_up (and mlp_gate). The inputs of
the others are the residual stream, normalized, which all layers share in one order, and attention's output, whose order the heads decide:
there the order is stored, NAME.order, and the engine gathers the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from codefuse_triton import _native

from checkpoint import CheckpointError, TensorInfo, open_checkpoint, read_json, read_safetensors, read_torch_zip
from hf_models import Plan, Source
from rounding import GROUPS
from weights_writer import Planned, planned_matrix

_PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")


@dataclass(frozen=True)
class Method:
    """What a checkpoint's quantization config says. zero_offset: what is added to stored zeros. group: columns, or -1 for all."""

    name: str  # gptq or awq
    group: int
    zero_offset: int


def method_of(directory: Path, config: dict[str, Any]) -> Method | None:
    """The method of a checkpoint, None if it is not quantized; CheckpointError names a field that is not understood."""
    told, path, name = config.get("quantization_config"), f"{directory / 'config.json'}: quantization_config", ""
    for file, kind in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):  # of AutoGPTQ and of AutoAWQ, before they used config.json
        if told is None and (directory / file).is_file():
            told, path, name = read_json(directory / file), str(directory / file), kind
    if told is None:
        return None
    if not isinstance(told, dict):
        raise CheckpointError(f"{path} is {told!r}; expected an object")

    def field(*names: str, default: Any = None) -> Any:
        return next((told[n] for n in names if n in told), default)

    name = str(field("quant_method", default=name)).lower()
    expected = {
        "quant_method": (name, ("gptq", "awq")), "bits": (field("bits", "w_bit"), (4,)),
        "checkpoint_format": (field("checkpoint_format", default="gptq"), ("gptq", "gptq_v2") if name == "gptq" else ("gptq", "awq", "gemm")),
        "version": (str(field("version", default="gemm")).lower(), ("gemm",)), "zero_point": (field("zero_point", default=True), (True,)),
    }
    if name == "gptq":
        del expected["version"], expected["zero_point"]
    for key, (value, good) in expected.items():
        if value not in good:
            raise CheckpointError(f"{path}: field {key} is {value!r}; expected {' or '.join(map(repr, good))}")
    group = field("group_size", "q_group_size")
    if not isinstance(group, int) or (group != -1 and (group < 1 or group % min(g for g in GROUPS.values() if g))):
        raise CheckpointError(f"{path}: field group_size is {group!r}; expected -1 or a multiple of 64, the columns that share a scale in q4_g64")
    return Method(name, group, 1 if name == "gptq" and field("checkpoint_format", default="gptq") == "gptq" else 0)


def format_of(method: Method, columns: int) -> str:
    """The format that holds groups of that size: larger ones are several with the same scale and zero."""
    group = columns if method.group == -1 else method.group
    return "q4_g128" if group % 128 == 0 else "q4_g64"


def open_tensors(directory: Path) -> dict[str, TensorInfo]:
    """As open_checkpoint, or the one .safetensors or .bin file that there is (AutoGPTQ's gptq_model-4bit-64g.safetensors, ...)."""
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    if any((directory / n).exists() for n in names):
        return open_checkpoint(directory)
    for suffix, read in ((".safetensors", read_safetensors), (".bin", read_torch_zip)):
        found = sorted(f for f in directory.glob(f"*{suffix}") if f.name != "training_args.bin")
        if len(found) > 1:
            raise CheckpointError(f"{directory}: {', '.join(f.name for f in found)}: expected one {suffix} file or a shard index")
        if found:
            return read(found[0])
    return open_checkpoint(directory)


class _Matrix:
    """A quantized matrix of the checkpoint, [N, K]."""

    def __init__(self, base: str, shape: tuple[int, ...], method: Method, stored: dict[str, TensorInfo]):
        self.base, self._method, self._stored, (self.rows, self.columns) = base, method, stored, shape
        self.group = self.columns if method.group == -1 else method.group
        if self.columns % self.group:
            raise CheckpointError(f"{base} has {self.columns} columns; expected a multiple of group_size {self.group}")
        if self.rows % 8:
            raise CheckpointError(f"{base} has {self.rows} rows; expected a multiple of 8, a word of qzeros")
        n, k, groups = self.rows, self.columns, self.columns // self.group
        self._check(".qweight", (k // 8, n) if method.name == "gptq" else (k, n // 8), ("int32",))
        self._check(".qzeros", (groups, n // 8), ("int32",))
        self._check(".scales", (groups, n), ("float16", "float32", "bfloat16"))
        self.order = self._order() if f"{base}.g_idx" in stored else None

    def _check(self, part: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        info = self._stored.get(self.base + part)
        if info is None:
            raise CheckpointError(f"tensor {self.base}{part} is missing from the checkpoint")
        if info.shape != shape or str(info.dtype) not in dtypes:
            raise CheckpointError(f"{info.file}: tensor {info.name} is {info.dtype} {list(info.shape)}; expected {' or '.join(dtypes)} {list(shape)}")

    def _order(self) -> np.ndarray | None:
        """Columns in the order of their groups; None if they are in it."""
        self._check(".g_idx", (self.columns,), ("int32", "int64"))
        of = np.asarray(self._stored[f"{self.base}.g_idx"].load())
        groups = self.columns // self.group
        if of.min() < 0 or of.max() >= groups or (np.bincount(of, minlength=groups) != self.group).any():
            raise CheckpointError(f"tensor {self.base}.g_idx does not give each of {groups} groups {self.group} columns")
        return None if (np.diff(of) >= 0).all() else np.argsort(of, kind="stable")

    def parts(self, format: str, source: Source, rows: np.ndarray | None) -> dict[str, np.ndarray]:
        """What _native.pack makes of the codes, rows in our order (and then in that of `rows`)."""
        words, zeros, scales = (np.asarray(self._stored[self.base + p].load()) for p in (".qweight", ".qzeros", ".scales"))
        awq = self._method.name == "awq"
        codes = _native.unpack_words(np.ascontiguousarray(words if awq else words.T), awq)
        zero = (_native.unpack_words(np.ascontiguousarray(zeros), awq) + np.uint8(self._method.zero_offset)) % np.uint8(16)
        scale = scales.astype(np.float16)
        if not np.isfinite(scale).all() or (scale.astype(np.float32) != scales.astype(np.float32)).any():
            raise CheckpointError(f"tensor {self.base}.scales holds values that are not exact in float16")
        made = []
        for part in (codes.T if awq else codes, scale.T, zero.T):
            part = source.transform(np.ascontiguousarray(part))
            made.append(part if rows is None else part[rows])
        codes, scale, zero = made
        if self.order is not None:
            codes = codes[:, self.order]
        repeats = self.group // GROUPS[format]
        try:
            return _native.pack(format, np.ascontiguousarray(codes), *(np.ascontiguousarray(x.repeat(repeats, 1)) for x in (scale, zero)))
        except ValueError as e:
            raise CheckpointError(f"{self.base}: {e}") from None


def plan_quantized(plan: Plan, method: Method, stored: dict[str, TensorInfo], plain) -> tuple[list[Planned], str]:
    """Our tensors in writing order, and the format of the quantized ones. plain(name, source, info) plans one that is not quantized."""
    matrices: dict[str, _Matrix] = {}
    used: set[str] = set()
    for name, source in plan.tensors.items():
        base = source.hf_name.removesuffix(".weight")
        if base != source.hf_name and f"{base}.qweight" in stored:
            if source.shape != source.hf_shape:
                raise CheckpointError(f"tensor {base}.qweight: {name} is another shape there, {list(source.hf_shape)}, which codes cannot follow")
            matrices[name] = _Matrix(base, source.hf_shape, method, stored)
            used |= {base + p for p in _PARTS if base + p in stored}
    if not matrices:
        raise CheckpointError(f"the config says {method.name}, but the checkpoint has no .qweight of a matrix that is known")
    rows: dict[str, np.ndarray] = {}  # of what computes mlp_down's inputs, by the name before .weight and .bias
    for name, m in matrices.items():
        if m.order is not None and name.endswith(".mlp_down.weight"):
            rows |= {f"{name.removesuffix('mlp_down.weight')}{producer}": m.order for producer in ("mlp_up", "mlp_gate")}
    formats = {format_of(method, m.columns) for m in matrices.values()}
    format = "q4_g64" if "q4_g64" in formats else "q4_g128"
    tensors: list[Planned] = []
    for name, source in plan.tensors.items():
        order = rows.get(name.rpartition(".")[0])
        if name in matrices:
            m = matrices[name]
            tensors += planned_matrix(name, source.shape, format, lambda m=m, source=source, order=order: m.parts(format, source, order))
            if m.order is not None and not name.endswith(".mlp_down.weight"):
                columns = m.order.astype(np.int32)
                tensors.append(Planned(f"{name.removesuffix('.weight')}.order", columns.shape, columns.dtype, lambda columns=columns: columns))
            continue
        hf_name = source.hf_name if source.hf_name in stored else source.alias
        if hf_name not in stored:
            raise CheckpointError(f"tensor {source.hf_name} (our {name}) is missing from the checkpoint")
        used.add(hf_name)
        t = plain(name, source, stored[hf_name])
        tensors.append(t if order is None else Planned(t.name, t.shape, t.dtype, lambda t=t, order=order: np.ascontiguousarray(t.load()[order])))
    extra = sorted(n for n in stored if n not in used and not n.endswith(plan.ignored_suffixes))
    if extra:
        why = "; AWQ's scales of an activation have no place in our model" if extra[0].endswith(".act.scales") else ""
        raise CheckpointError(f"tensor {extra[0]} ({len(extra)} in all) is not part of {plan.config['architecture']} as config.json describes it{why}")
    return tensors, format
