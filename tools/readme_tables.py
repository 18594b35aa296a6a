#!/usr/bin/env python3
"""Writes the tables of README.md that follow from contract.py, between `<!-- table: NAME -->` and `<!-- end -->`.

    python tools/readme_tables.py
"""

from __future__ import annotations

import re
from pathlib import Path

from codefuse_triton import contract

README = Path(__file__).resolve().parent.parent / "README.md"


def _rows(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [header, ["---"] * len(header), *rows])


def _shape(dims: int) -> str:
    return f"[{dims}]" if dims > 0 else "[n]"


def inputs() -> str:
    rows, refused = [[f"`{t.name}`", f"{t.type} {_shape(t.dims)}", "", t.doc] for t in (contract.TEXT_INPUT,)], []
    for o in contract.OPTIONS:
        if o.neutral:
            refused.append(f"`{o.name}` ({o.doc})")
            continue
        names = f"`{o.name}`" + (f", `{o.alias}`" if o.alias else "")
        default = "" if o.default is None or o.default == () else str(o.default).lower() if isinstance(o.default, bool) else str(o.default)
        rows.append([names, f"{o.type} {_shape(o.dims)}", default, o.doc])
    t = contract.SAMPLING_PARAMETERS
    rows.append([f"`{t.name}`", f"{t.type} {_shape(t.dims)}", "", t.doc])
    return _rows(["input", "type", "default", "meaning"], rows) + f"\n\nAccepted with a neutral value only, until they are implemented: {', '.join(refused)}."


def outputs() -> str:
    return _rows(["output", "type", "meaning"], [[f"`{t.name}`", f"{t.type} {_shape(t.dims)}", t.doc] for t in contract.MODEL[contract.ENSEMBLE].outputs])


def settings() -> str:
    rows: dict[str, list[str]] = {}
    for model in contract.MODELS:
        for s in model.settings:
            if s.name in rows:
                rows[s.name][0] += f", {model.name}"
                continue
            limit = " \\| ".join(s.choices) if s.choices else f"{s.low} .. {s.high}" if s.low is not None else ""
            rows[s.name] = [model.name, f"`{s.name}`", f"`{s.default}`" if s.default else "", limit.replace("\\|", "or"), s.doc]
    return _rows(["model", "setting", "default", "values", "meaning"], list(rows.values()))


TABLES = {"inputs": inputs, "outputs": outputs, "settings": settings}


def filled(text: str) -> str:
    """text with its tables made anew; KeyError for a table of an unknown name."""
    return re.sub(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", lambda m: m[1] + TABLES[m[2]]() + "\n" + m[3], text, flags=re.S)


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
