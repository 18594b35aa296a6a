"""Scales, zeros and codes of a matrix by rounding each weight to the nearest: the formats of native/formats/format.h from a quantizer's side."""

from __future__ import annotations

import numpy as np

from checkpoint import CheckpointError

GROUPS = {"q8_row": 0, "q4_g128": 128, "q4_g64": 64}  # columns that share a scale and a zero; 0: the row has one scale
FORMATS = tuple(GROUPS)
ANY_FORMAT = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"


def round_q8_row(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n, k] -> (int8 codes [n, k], float32 scale [n]) with |w - code * scale| <= scale / 2."""
    peak = np.abs(w).max(axis=1, initial=0.0)
    scale = np.where(peak > 0, peak / np.float32(127), np.float32(1)).astype(np.float32)
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    return np.clip(np.rint(w / scale[:, None]), -127, 127).astype(np.int8), scale


def group_scales(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranges [n, groups], which hold 0 -> (float16 scale, uint8 zero 0..15): 15 steps that cover the range."""
    exact = (high - low) / np.float32(15)
    if (peak := float(exact.max(initial=0.0))) > 65504:
        raise CheckpointError(f"a group spans {15 * peak:g}; a float16 scale reaches {15 * 65504}")
    scale = exact.astype(np.float16)
    scale = np.where(scale.astype(np.float32) < exact, np.nextafter(scale, np.float16(np.inf)), scale)  # never too small for the range
    scale = np.where(exact > 0, scale, np.float16(1))
    return scale, np.clip(np.rint(-low / scale.astype(np.float32)), 0, 15).astype(np.uint8)


def round_groups(w: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 [n, k] -> (uint8 codes 0..15 [n, k], float16 scale, uint8 zero 0..15 [n, k / group]) with
    |w - (code - zero) * scale| <= scale / 2: a group's range, widened to hold 0, becomes 15 steps."""
    g = w.reshape(w.shape[0], -1, group)
    scale, zero = group_scales(np.minimum(g.min(axis=2), 0), np.maximum(g.max(axis=2), 0))
    codes = np.clip(np.rint(g / scale.astype(np.float32)[:, :, None]) + zero[:, :, None], 0, 15)
    return codes.astype(np.uint8).reshape(w.shape), scale, zero


def round_to_nearest(format: str, w: np.ndarray) -> tuple[np.ndarray, ...]:
    """float32 [n, k] -> what _native.pack takes: codes, scale and, where the format has groups, zero."""
    return round_groups(w, GROUPS[format]) if GROUPS[format] else round_q8_row(w)


def check_format(name: str, format: str, shape: tuple[int, ...]) -> None:
    """CheckpointError if a matrix of that shape cannot have that format."""
    if format not in GROUPS:
        raise CheckpointError(f"format is {format!r}; expected {ANY_FORMAT}")
    if GROUPS[format] and shape[1] % GROUPS[format]:
        raise CheckpointError(f"tensor {name} has {shape[1]} columns; expected a multiple of {GROUPS[format]} in {format}")
