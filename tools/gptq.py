"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): codes of one matrix that keep its products with given inputs, in torch.

For rows w of the matrix and inputs x the squared error of a product is (w - q) H (w - q)^T with H = x^T x. Columns are rounded one by
one, those with the largest inputs first; the error of each is made up for by the columns that are not rounded yet. Scales and
zeros are chosen first and belong to columns that lie together, whatever the order of rounding (GPTQ's "static groups"), so that
the result is an ordinary matrix of the format.
"""

from __future__ import annotations

import numpy as np
import torch

from checkpoint import CheckpointError
from rounding import GROUPS

DAMPING = 0.01  # added to H's diagonal, of its mean
_COLUMNS = 128  # rounded before the others are brought up to date
_SHRINK = [1 - i / 40 for i in range(21)]  # of the range that the codes cover: 1 .. 0.5


def row_errors(w: torch.Tensor, q: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """(w - q) H (w - q)^T of each row: [n, k], [n, k], [k, k] -> [n]."""
    d = w - q
    return ((d @ hessian) * d).sum(1)


class Grid:
    """The values that a weight can have: scale and zero of each row, or of each row's groups."""

    def __init__(self, format: str, w: torch.Tensor, weight: torch.Tensor):
        """Chooses, of 21 ranges, the one with the least rounding error summed with weight [k] over a row (a group). w [n, k]."""
        self.format, self._group = format, GROUPS[format] or w.shape[1]
        g, wg = w.reshape(w.shape[0], -1, self._group), weight.reshape(-1, self._group)
        best = None
        for shrink in _SHRINK:
            scale, zero = self._range(g, shrink)
            error = ((self._values(self._codes(g, scale[..., None], zero[..., None]), scale[..., None], zero[..., None]) - g).square() * wg).sum(2)
            if best is None:
                best, self.scale, self.zero = error, scale, zero
                continue
            better = error < best
            best, self.scale, self.zero = (torch.where(better, x, y) for x, y in ((error, best), (scale, self.scale), (zero, self.zero)))
        self._columns = self.scale.T.contiguous(), self.zero.T.contiguous()

    def _range(self, g: torch.Tensor, shrink: float) -> tuple[torch.Tensor, torch.Tensor]:
        if self.format == "q8_row":
            scale = g.abs().amax(2) * (shrink / 127)
            return torch.where(scale > 0, scale.clamp(min=torch.finfo(torch.float32).tiny), 1.0), torch.zeros_like(scale)
        low, high = g.amin(2).clamp(max=0) * shrink, g.amax(2).clamp(min=0) * shrink
        scale = ((high - low) / 15).to(torch.float16).to(g.dtype)  # as it is stored
        if not torch.isfinite(scale).all():
            raise CheckpointError(f"a group spans {float((high - low).max()):g}; a float16 scale reaches {15 * 65504}")
        scale = torch.where(scale > 0, scale, 1.0)
        return scale, (-low / scale).round().clamp(0, 15)

    def _codes(self, w, scale, zero):
        low, high = (-127, 127) if self.format == "q8_row" else (0, 15)
        return ((w / scale).round() + zero).clamp(low, high)

    def _values(self, codes, scale, zero):
        return (codes - zero) * scale

    def round(self, w: torch.Tensor) -> torch.Tensor:
        """The nearest codes of [n, k] values."""
        g = w.reshape(w.shape[0], -1, self._group)
        return self._codes(g, self.scale[..., None], self.zero[..., None]).reshape(w.shape)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        g = codes.reshape(codes.shape[0], -1, self._group)
        return self._values(g, self.scale[..., None], self.zero[..., None]).reshape(codes.shape)

    def round_column(self, j: int, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Column j [n] -> (codes, the values they mean)."""
        scale, zero = self._columns[0][j // self._group], self._columns[1][j // self._group]
        codes = self._codes(column, scale, zero)
        return codes, self._values(codes, scale, zero)

    def packed(self, codes: torch.Tensor) -> tuple[np.ndarray, ...]:
        """What _native.pack takes."""
        if self.format == "q8_row":
            return codes.to(torch.int8).cpu().numpy(), self.scale[:, 0].to(torch.float32).cpu().numpy()
        return codes.to(torch.uint8).cpu().numpy(), self.scale.to(torch.float16).cpu().numpy(), self.zero.to(torch.uint8).cpu().numpy()


def _inverse_factor(h: torch.Tensor) -> torch.Tensor:
    """Upper U with U^T U = (H + damping)^-1; more damping where H is too close to singular for its type."""
    mean, damping, one = float(h.diagonal().mean()), DAMPING, torch.eye(len(h), dtype=h.dtype, device=h.device)
    while damping <= 1:
        damped = h.flip(0, 1)
        damped.diagonal().add_(damping * mean)
        lower, bad = torch.linalg.cholesky_ex(damped)
        if not bad:  # H = R R^T with R = flipped lower, so U = R^-1
            return torch.linalg.solve_triangular(lower.flip(0, 1), one, upper=True)
        damping *= 10
    raise CheckpointError("the inputs of the calibration text give no usable Hessian (it is not positive definite, even damped)")


def _compensated(w: torch.Tensor, upper: torch.Tensor, order: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes [n, k]; columns of w rounded in that order, errors spread over those that follow by the rows of upper."""
    w = w.T[order].contiguous()  # [k, n]: a column is a run of memory
    codes, columns = torch.empty_like(w), order.tolist()
    for begin in range(0, len(columns), _COLUMNS):
        end = min(begin + _COLUMNS, len(columns))
        errors = torch.empty_like(w[begin:end])
        for i in range(begin, end):
            codes[columns[i]], value = grid.round_column(columns[i], w[i])
            torch.div(w[i] - value, upper[i, i], out=errors[i - begin])
            w[i + 1:end].addr_(upper[i, i + 1:end], errors[i - begin], alpha=-1)
        w[end:].addmm_(upper[begin:end, end:].T, errors, alpha=-1)
    return codes.T.contiguous()


class Gptq:
    """What all rows of matrices with the same inputs share. hessian: the mean of x^T x over the inputs [k, k]."""

    def __init__(self, hessian: torch.Tensor):
        self._hessian, diagonal = hessian, hessian.diagonal()
        used = diagonal != 0
        mean = diagonal[used].mean() if bool(used.any()) else torch.ones((), dtype=hessian.dtype, device=hessian.device)
        h = hessian.clone()
        h.diagonal()[~used] = mean  # inputs that the calibration text never has: rounded to the nearest
        self._weight = h.diagonal() / mean
        self._order = torch.argsort(h.diagonal(), descending=True, stable=True)
        self._upper = _inverse_factor(h[self._order][:, self._order])

    def quantize(self, w: torch.Tensor, format: str) -> tuple[np.ndarray, ...]:
        """w [n, k] -> what _native.pack takes: codes, scale and, where the format has groups, zero. Of each row the better of GPTQ's codes
        and the nearest ones on the same grid, so that its error (row_errors) is never above that of rounding there."""
        grid = Grid(format, w, self._weight)
        codes, nearest = _compensated(w, self._upper, self._order, grid), grid.round(w)
        worse = row_errors(w, grid.values(codes), self._hessian) > row_errors(w, grid.values(nearest), self._hessian)
        codes[worse] = nearest[worse]
        return grid.packed(codes)
