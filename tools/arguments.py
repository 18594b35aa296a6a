"""Types of command line arguments. What is out of range is refused before anything is done, with the argument, the value and the limit."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from codefuse_triton import contract
from codefuse_triton._native import check_device

T = TypeVar("T")
DTYPES = next(s.choices for s in contract.MODEL[contract.GENERATOR].settings if s.name == "dtype")  # of activations and KV cache


def integer(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}; expected an integer") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}; expected {low} to {high}")
        return value

    return parse


def number(low: float, above: bool = False) -> Callable[[str], float]:
    """above: low itself is refused."""
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}; expected a number") from None
        if not math.isfinite(value) or value < low or above and value == low:
            raise argparse.ArgumentTypeError(f"{text}; expected a number {f'above {low:g}' if above else f'of {low:g} or more'}")
        return value

    return parse


def several(each: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Separated by commas."""
    return lambda text: [each(part) for part in text.split(",") if part]


def device(text: str) -> str:
    try:
        check_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def output(text: str) -> Path:
    """A file to write at the end."""
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: {'is a directory' if path.is_dir() else f'there is no directory {path.parent}'}; expected a file to write")
    return path
