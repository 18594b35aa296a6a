"""The training loop: a fixed wall-clock time, the learning rate reaching zero at its end."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from neox import NeoX

PEAK_RATE = 3e-3
WARM_UP = 0.03         # share of the time
WEIGHT_DECAY = 0.1     # on matrices only
BETAS = (0.9, 0.95)
CLIP_NORM = 1.0


@dataclass
class History:
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    compiled: bool = False
    curve: list[tuple[float, int, float]] = field(default_factory=list)  # (seconds, tokens, mean loss since the last point)


def learning_rate(progress: float) -> float:
    """Rate at a share of the training time in [0, 1]: linear warm-up, then a cosine to zero."""
    if progress < WARM_UP:
        return PEAK_RATE * max(progress, 1e-3) / WARM_UP
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP))))


def batches(passes: list[np.ndarray], size: int, device: torch.device) -> Iterator[Tensor]:
    """Endless [size, row] int64 batches: every pass in turn, then all of them again, reshuffled."""
    resident = [torch.from_numpy(rows).to(device) for rows in passes]
    generator = torch.Generator().manual_seed(0)
    while True:
        for rows in resident:
            order = torch.randperm(len(rows), generator=generator).to(device)
            for start in range(0, len(rows) - size + 1, size):
                yield rows[order[start:start + size]].long()


def _try_compiling(model: NeoX, batch: Tensor, autocast) -> bool:
    """Compiles model.loss in place and runs it once in both directions; on failure leaves it as it was."""
    plain = model.loss
    model.loss = torch.compile(plain)
    try:
        with autocast():
            loss = model.loss(batch)
        loss.backward()
        return True
    except Exception as error:  # the compiler's failures have no common type
        print(f"not compiled: {error}", flush=True)
        model.loss = plain
        return False
    finally:
        model.zero_grad(set_to_none=True)


def train(model: NeoX, passes: list[np.ndarray], batch_rows: int, seconds: float, compile_loss: bool) -> History:
    """Trains in place for `seconds`, not counting compilation."""
    device = next(model.parameters()).device
    row = passes[0].shape[1]
    if len(passes[0]) < batch_rows:
        raise ValueError(f"batch of {batch_rows} rows: one pass has only {len(passes[0])}")
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=PEAK_RATE, betas=BETAS, fused=device.type == "cuda")
    stream = batches(passes, batch_rows, device)

    def autocast():
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")

    history = History()
    if compile_loss:
        start = time.monotonic()
        history.compiled = _try_compiling(model, next(stream), autocast)
        print(f"first step {time.monotonic() - start:.0f} s, compiled: {history.compiled}", flush=True)

    model.train()
    start = reported = time.monotonic()
    recent: list[float] = []
    while (elapsed := time.monotonic() - start) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(elapsed / seconds)
        with autocast():
            loss = model.loss(next(stream))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        history.steps += 1
        history.tokens += batch_rows * (row - 1)
        if not math.isfinite(recent[-1]):
            raise FloatingPointError(f"step {history.steps}: loss {recent[-1]}")
        now = time.monotonic()
        if now - reported > seconds / 36 or now - start >= seconds:
            reported = now
            history.seconds = now - start
            history.curve.append((history.seconds, history.tokens, sum(recent) / len(recent)))
            print(f"{history.seconds:6.1f} s  step {history.steps}  {history.tokens / 1e6:.1f} M tokens  "
                  f"loss {history.curve[-1][2]:.4f}  {history.tokens / history.seconds / 1e3:.0f} k tokens/s", flush=True)
            recent.clear()
    model.eval()
    return history
