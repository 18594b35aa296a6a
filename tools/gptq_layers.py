"""Runs GPTQ through a model layer by layer: memory near one layer and the calibration text's activations; a killed run goes on where it was.

Finished layers are in a work directory, layer-00000.npz and so on, with what enters the next one (input-00001.npy). Each file appears
whole, under its final name, or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from codefuse_triton import _native

import torch_model
from checkpoint import CheckpointError
from gptq import Gptq
from weights_writer import Planned

_TOKENS = 4096  # of the calibration text at a time
_ELEMENTS = 16 << 20  # of a matrix quantized at a time


def pick_device(name: str) -> torch.device:
    """auto: cuda if torch has it."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise CheckpointError(f"device is {name!r}; torch cannot use it: {str(e).splitlines()[0]}") from None
    return device


def _atomically(path: Path, write: Callable[[Any], None]) -> None:
    part = path.with_name(f".{path.name}")
    with open(part, "wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


class LayerRun:
    """tensors: the model's, by canonical name. formats: format id of each matrix to quantize. ids: calibration windows [S, T]. identity: what
    a run must have in common with an earlier one to go on with its layers. tick: called with 1 after each layer and after the LM head."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Planned], load: Callable[[Planned], np.ndarray], formats: dict[str, str], ids: np.ndarray,
                 work: Path, identity: dict[str, Any], device: torch.device, tick: Callable[[int], None]):
        self._c, self._tensors, self._load, self._formats, self._work, self._device, self._tick = config, tensors, load, formats, work, device, tick
        self._ids = torch.from_numpy(ids)
        torch_model.check(config)
        for name in formats:
            if name != "lm_head.weight" and name.removesuffix(".weight").rpartition(".")[2] not in sum(torch_model.STEPS, ()):
                raise CheckpointError(f"tensor {name} is none of the matrices that GPTQ calibrates: {', '.join(sum(torch_model.STEPS, ()))}, lm_head")
        state, text = work / "state.json", json.dumps({**identity, "device": device.type, "torch": torch.__version__}, indent=1, sort_keys=True)
        if work.exists() and (not state.exists() or state.read_text() != text):
            shutil.rmtree(work)
        if not work.exists():
            work.mkdir(parents=True)
            _atomically(state, lambda f: f.write(text.encode()))

    @torch.inference_mode()
    def run(self) -> None:
        layers = self._c["layers"]
        done = next(i for i in range(layers + 1) if i == layers or not self._file(i).exists())
        self._tick(done)
        x = torch.from_numpy(np.load(self._input(done))) if done else self._embedded()
        for i in range(done, layers):
            x = self._layer(i, x)
            self._input(i).unlink(missing_ok=True)
            self._tick(1)
        if "lm_head.weight" in self._formats and not self._file("lm_head").exists():
            self._head(x)
        self._tick(1)

    def parts(self, name: str) -> dict[str, np.ndarray]:
        """The stored parts of a quantized matrix (_native.pack)."""
        base = name.removesuffix(".weight")
        at = "lm_head" if base == "lm_head" else int(base.split(".")[1])
        with np.load(self._file(at)) as stored:
            return {key.rpartition("/")[2]: stored[key] for key in stored.files if key.rpartition("/")[0] == base}

    def _file(self, layer: int | str) -> Path:
        return self._work / (f"layer-{layer:05d}.npz" if isinstance(layer, int) else f"{layer}.npz")

    def _input(self, layer: int) -> Path:
        return self._work / f"input-{layer:05d}.npy"

    def _tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(self._load(self._tensors[name]))).to(self._device)  # a copy: mapped files cannot be written to

    def _embedded(self) -> torch.Tensor:
        """[S, T, H] on the host"""
        w = {n: torch.from_numpy(np.array(self._load(self._tensors[n]))) for n in ("embed.weight", "position.weight") if n in self._tensors}
        return torch_model.embed(self._c, w, self._ids)

    def _slices(self, x: torch.Tensor) -> Iterable[torch.Tensor]:
        rows = max(1, _TOKENS // x.shape[1])
        return (x[i:i + rows].to(self._device) for i in range(0, x.shape[0], rows))

    def _gptq(self, inputs: Iterable[torch.Tensor]) -> Gptq:
        """inputs: [..., K] each"""
        total, count = None, 0
        for x in inputs:
            x = x.reshape(-1, x.shape[-1])
            product = x.T @ x
            total, count = product if total is None else total.add_(product), count + x.shape[0]
        if not bool(torch.isfinite(total).all()):
            raise CheckpointError("the activations of the calibration text hold NaN or Inf")
        return Gptq(total / count)

    def _quantized(self, name: str, gptq: Gptq, w: torch.Tensor) -> dict[str, np.ndarray]:
        format, step = self._formats[name], max(1, _ELEMENTS // w.shape[1])
        try:
            blocks = [_native.pack(format, *gptq.quantize(w[i:i + step], format)) for i in range(0, w.shape[0], step)]
        except ValueError as e:
            raise CheckpointError(f"tensor {name}: {e}") from None
        return {key: np.concatenate([b[key] for b in blocks]) for key in blocks[0]}

    def _layer(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """Quantizes the layer's matrices step by step, each with the inputs that the quantized ones before it give; what leaves the layer."""
        at = f"layers.{i}."
        w = {n.removeprefix(at): self._tensor(n) for n in self._tensors if n.startswith(at)}
        stored: dict[str, np.ndarray] = {}
        for step in torch_model.STEPS:
            names = [m for m in step if f"{at}{m}.weight" in self._formats]
            if not names:
                continue
            try:
                gptq = self._gptq(next(value for which, value in torch_model.layer(self._c, w, part) if which == step) for part in self._slices(x))
            except CheckpointError as e:
                raise CheckpointError(f"{at}{names[0]}: {e}") from None
            for m in names:
                name = f"{at}{m}.weight"
                parts = self._quantized(name, gptq, w[f"{m}.weight"])
                w[f"{m}.weight"] = torch.from_numpy(_native.decode(self._formats[name], parts)).to(self._device)
                stored.update({f"{at}{m}/{key}": value for key, value in parts.items()})
        out = torch.cat([value.cpu() for part in self._slices(x) for which, value in torch_model.layer(self._c, w, part) if not which])
        # in this order: a layer's file says that what leaves it is there too
        _atomically(self._input(i + 1), lambda f: np.save(f, out.numpy()))
        _atomically(self._file(i), lambda f: np.savez(f, **stored))
        return out

    def _head(self, x: torch.Tensor) -> None:
        w = {n: self._tensor(n) for n in self._tensors if n.startswith("final_norm.")}
        gptq = self._gptq(torch_model.norm(self._c, w, "final_norm", part) for part in self._slices(x))
        parts = self._quantized("lm_head.weight", gptq, self._tensor("lm_head.weight"))
        _atomically(self._file("lm_head"), lambda f: np.savez(f, **{f"lm_head/{key}": value for key, value in parts.items()}))
