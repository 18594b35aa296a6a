"""Held-out loss and sample completions of a saved checkpoint (its fp16 weights, float32 arithmetic)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

import spm
from corpus import Document
from neox import NeoX

WINDOW = 1024


@dataclass(frozen=True)
class Score:
    documents: int
    bytes: int
    tokens: int
    nats: float    # sum over all predicted tokens

    @property
    def loss(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


@torch.inference_mode()
def score(model: NeoX, tokenizer: spm.Tokenizer, documents: list[Document], batch: int = 16) -> Score:
    """For each document x = [eos] + encode(text) + [eos]; windows of WINDOW inputs x[s : s + WINDOW],
    s = 0, WINDOW, ..., each run on its own, predict x[s + 1 : s + WINDOW + 1]."""
    device = next(model.parameters()).device
    windows, count, size = [], 0, 0
    for document in documents:
        ids = [spm.EOS_ID, *tokenizer.encode(document.text), spm.EOS_ID]
        count += len(ids) - 1
        size += len(document.text.encode())
        windows += [ids[s:s + WINDOW + 1] for s in range(0, len(ids) - 1, WINDOW)]
    windows.sort(key=len)
    nats = 0.0
    for start in range(0, len(windows), batch):
        group = windows[start:start + batch]
        rows = torch.full((len(group), max(map(len, group))), -100)
        for row, ids in zip(rows, group):
            row[:len(ids)] = torch.tensor(ids)
        rows = rows.to(device)
        logits = model(rows[:, :-1].clamp(min=0))
        nats += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), rows[:, 1:].flatten(), ignore_index=-100, reduction="sum").item()
    return Score(len(documents), size, count, nats)


@torch.inference_mode()
def complete(model: NeoX, tokenizer: spm.Tokenizer, ids: list[int], new_tokens: int, temperature: float, seed: int = 0) -> str:
    """Text of up to `new_tokens` tokens after `ids`; temperature 0 is greedy."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    limit = model.shape.max_positions
    ids, begin = list(ids), len(ids)
    while len(ids) < min(limit, begin + new_tokens):
        logits = model(torch.tensor([ids], device=device))[0, -1].cpu()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial(torch.softmax(logits / temperature, 0), 1, generator=generator))
        if token == spm.EOS_ID:
            break
        ids.append(token)
    return tokenizer.decode(ids[begin:])


PROMPTS = (
    'def fibonacci(n):\n    """Return the first n Fibonacci numbers."""\n',
    "import os\nimport sys\n\n\ndef main():\n    parser = argparse.ArgumentParser(",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "# language: Python\n# read a JSON file and return its contents\ndef load_json(path):\n",
    "import numpy as np\n\n\ndef softmax(x, axis=-1):\n",
    "for i in range(10):\n    pri",
)
FIM_PROMPTS = (
    ("def read_lines(path):\n    with ", " as handle:\n        return handle.readlines()\n"),
    ("def add(a, b):\n    ", "\n\n\ndef subtract(a, b):\n    return a - b\n"),
    ("def is_even(number):\n    if num", ":\n        return True\n    return False\n"),
)


def samples(model: NeoX, tokenizer: spm.Tokenizer, new_tokens: int = 96) -> str:
    """Completions as Markdown; the generated part stands between the marks \u27ea and \u27eb."""
    blocks = []
    for prompt in PROMPTS:
        for temperature in (0.0, 0.4):
            text = complete(model, tokenizer, tokenizer.encode(prompt), new_tokens, temperature)
            blocks.append((f"left to right, temperature {temperature:g}", f"{prompt}\u27ea{text}\u27eb"))
    for prefix, suffix in FIM_PROMPTS:
        ids = [spm.FIM_PREFIX_ID, *tokenizer.encode(prefix), spm.FIM_SUFFIX_ID, *tokenizer.encode(suffix), spm.FIM_MIDDLE_ID]
        text = complete(model, tokenizer, ids, 48, 0.0)
        blocks.append(("fill in the middle, greedy", f"{prefix}\u27ea{text}\u27eb{suffix}"))
    return "\n".join(f"{title}:\n````python\n{body}\n````\n" for title, body in blocks)


@torch.inference_mode()
def difference_to_transformers(directory: Path, model: NeoX, ids: list[int]) -> float:
    """Largest absolute difference of a logit between this module and transformers, float32, CPU."""
    from transformers import GPTNeoXForCausalLM
    other = GPTNeoXForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    rows = torch.tensor([ids])
    return (other(rows).logits - model.cpu()(rows)).abs().max().item()
