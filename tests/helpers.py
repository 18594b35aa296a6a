"""Shared by tests of ops and models: tiny random GPT-NeoX checkpoints, batches, weights as bits."""

import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

from codefuse_triton._native import testing

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import convert  # noqa: E402

PAGE = testing.PAGE_TOKENS
TORCH_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

TINY = dict(vocab_size=131, hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=152,
            max_position_embeddings=160, rotary_pct=0.25, bos_token_id=1, eos_token_id=2)


def make_neox(path: Path, dtype: str = "f32", **fields):
    """A random GPTNeoXForCausalLM saved under path/hf and converted to path/native; returns (model in float32, native directory)."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(7)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**{**TINY, **fields}))
    with torch.no_grad():  # the library's own initial values are too small and too alike to show mistakes
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (0.15 if p.ndim == 2 else 0.3))
            p.copy_(p.to(TORCH_DTYPES[dtype]))
    state = {k: v.to(TORCH_DTYPES[dtype]) for k, v in model.state_dict().items()}
    model.save_pretrained(path / "hf", state_dict=state)
    convert.convert(path / "hf", path / "native", tokenizer=False, progress=contextlib.nullcontext(lambda n: None))
    return model.eval(), path / "native"


def add_byte_tokenizer(native: Path) -> None:
    """A tokenizer.json whose tokens 3 to 258 are the bytes; the vocab is at least 259."""
    import tokenizers

    t = tokenizers.Tokenizer(tokenizers.models.BPE({c: i + 3 for i, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}, []))
    t.pre_tokenizer, t.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    t.save(str(native / "tokenizer.json"))
    config = json.loads((native / "config.json").read_text())
    (native / "config.json").write_text(json.dumps({**config, "tokenizer_files": ["tokenizer.json"]}))


def as_format(w: np.ndarray, format: str) -> tuple[np.ndarray, np.ndarray]:
    """float32 weights -> (their bits in the format, the values those bits mean as float32)."""
    if format == "f32":
        return np.ascontiguousarray(w, np.float32), w.astype(np.float32)
    t = torch.from_numpy(np.array(w, np.float32)).to(TORCH_DTYPES[format])
    return t.view(torch.int16).numpy().view(np.uint16).copy(), t.float().numpy()


class Pages:
    """Page tables of the sequences of a test: pages are handed out in a scattered order, as a used pool would."""

    def __init__(self, slots: int, max_len: int, pages: int, seed: int = 0):
        self.max_pages = -(-max_len // PAGE)
        self._free = list(np.random.default_rng(seed).permutation(pages))
        self._tables = {s: [] for s in range(slots)}

    def table(self, slot: int, length: int) -> list[int]:
        """The page table of slot with room for length tokens."""
        t = self._tables[slot]
        while len(t) * PAGE < length:
            t.append(int(self._free.pop()))
        return t + [0] * (self.max_pages - len(t))


def make_batch(pages: Pages, decode=(), prefill=(), logits="last", sample=None, copies=()) -> dict:
    """decode: (slot, token, position) rows. prefill: (slot, tokens, position of the first) chunks. copies: (from, to, tokens) of pages.
    logits: "last" (every decode row and every chunk's last row), "all", "none" or row numbers."""
    b = dict(decode_rows=len(decode), token=[], slot=[], position=[], chunks=[])
    for slot, token, position in decode:
        b["token"].append(int(token)), b["slot"].append(slot), b["position"].append(position)
    last = list(range(len(decode)))
    for slot, tokens, position in prefill:
        b["chunks"].append((len(b["token"]), len(tokens), slot, position))
        for i, token in enumerate(tokens):
            b["token"].append(int(token)), b["slot"].append(slot), b["position"].append(position + i)
        last.append(len(b["token"]) - 1)
    rows = {"last": last, "all": list(range(len(b["token"]))), "none": []}
    b["logit_row"] = rows[logits] if isinstance(logits, str) else list(logits)
    b["sample"] = sample or []
    b["copies"] = list(copies)
    b["table_slot"] = sorted(set(b["slot"]))
    b["table"] = sum((pages.table(s, 1 + max(p for p, q in zip(b["position"], b["slot"]) if q == s)) for s in b["table_slot"]), [])
    return b


def runner(native: Path, **options) -> testing.Runner:
    return testing.Runner(str(native), **{"slots": 4, "prefill_rows": 128, "threads": 2, **options})


def pages_of(r: testing.Runner, seed: int = 0) -> Pages:
    return Pages(r.slots, r.max_len, r.pages, seed)


def prompt_logits(r: testing.Runner, tokens, chunk: int = 10**9, slot: int = 0, seed: int = 0) -> np.ndarray:
    """[len(tokens), vocab]: logits of every position, the prompt fed in chunks of at most `chunk` rows."""
    pages, out = pages_of(r, seed), []
    step = min(chunk, testing.DECODE_ROWS, r.rows)
    for start in range(0, len(tokens), step):
        out.append(r.logits(make_batch(pages, prefill=[(slot, tokens[start:start + step], start)], logits="all")))
    return np.concatenate(out)


def rows_not_sampled_change_nothing(r: testing.Runner, tokens) -> None:
    """A decode row and two prompts: whatever rows are sampled, their logits are those of sampling all 57, bit for bit."""
    pages = pages_of(r, seed=7)
    r.logits(make_batch(pages, prefill=[(2, tokens[:30], 0)], logits="none"))
    rows = dict(decode=[(2, tokens[30], 30)], prefill=[(0, tokens[:25], 0), (3, tokens[5:36], 0)])
    every = r.logits(make_batch(pages, **rows, logits="all"))
    for some in ("none", "last", [0], [56], [0, 40, 7, 40], list(range(56))):
        batch = make_batch(pages, **rows, logits=some)
        np.testing.assert_array_equal(r.logits(batch).view(np.uint32), every[batch["logit_row"]].view(np.uint32))
    np.testing.assert_array_equal(r.logits(make_batch(pages, decode=rows["decode"])), every[:1])
    after = r.logits(make_batch(pages, decode=[(3, tokens[36], 31)]))
    others = pages_of(r, seed=8)
    r.logits(make_batch(others, prefill=rows["prefill"], logits="none"))  # no row goes on, but K and V are stored
    np.testing.assert_array_equal(r.logits(make_batch(others, decode=[(3, tokens[36], 31)])), after)


def words_of(tokens, vocab: int) -> list[int]:
    """The mask that allows these tokens."""
    bits = np.zeros(-(-vocab // 32) * 32, np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view("<u4").tolist()


def changes(vocab: int, edits: list[list[tuple]], allowed: list) -> dict:
    """Batch fields of samples with these edits and allowed tokens (None: all)."""
    masks, mask_of = [], []
    for tokens in allowed:
        mask_of.append(-1 if tokens is None else len(masks) // -(-vocab // 32))
        masks += [] if tokens is None else words_of(tokens, vocab)
    return dict(edit_begin=np.cumsum([0] + [len(e) for e in edits]).tolist(), edits=sum(edits, []), mask_of=mask_of, masks=masks)


def random_changes(vocab: int, samples: int, seed: int = 0):
    """Per sample edits, and allowed tokens or None: every kind and none."""
    rng = np.random.default_rng(seed)
    edits, allowed = [], []
    for s in range(samples):
        count = int(rng.integers(0, min(vocab, 40) + 1)) if s % 4 else 0
        tokens = np.sort(rng.choice(vocab, count, replace=False)).tolist()
        add = [[0.0, float(rng.normal() * 3), -np.inf][int(rng.integers(3))] for _ in tokens]
        penalty = [[1.0, float(rng.uniform(0.5, 2))][int(rng.integers(2))] for _ in tokens]
        edits.append(list(zip(tokens, add, penalty)))
        allowed.append(np.sort(rng.choice(vocab, int(rng.integers(1, vocab + 1)), replace=False)).tolist() if s % 3 == 0 else None)
    return edits, allowed
