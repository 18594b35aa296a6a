"""Prompt: what a request is computed from - tokens, typed bytes whose tokens are not certain, and for fill in the middle the text
behind the cursor and the model's template."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .vocab import Vocab

PREFIX, SUFFIX = -1, -2  # in a template: where the text before the cursor goes and where the text behind it
MODES = ("psm", "spm")  # prefix, suffix, middle; suffix, prefix, middle


@dataclass(frozen=True)
class Prompt:
    ids: Sequence[int]  # before the cursor
    typed: bytes = b""  # and behind them, up to the cursor: the output begins with these bytes
    typed_ids: Sequence[int] = ()  # what typed is where the text ends here; counted as the prompt's, and the guess at what comes
    suffix: Sequence[int] = ()  # behind the cursor
    template: Sequence[int] = ()  # of fill in the middle, with PREFIX and SUFFIX; empty: there is none
    end_ids: Sequence[int] = ()  # tokens that end the middle


@dataclass(frozen=True)
class _Fim:
    """A model kind's tokens, as published with the model; PSM and SPM as lists of names, "" for the prefix, " " for the suffix."""

    name: str
    psm: tuple[str, ...]
    spm: tuple[str, ...]  # (): the model was not trained for it
    ends: tuple[str, ...]  # end the middle where they are in the vocabulary


_KINDS = (
    _Fim("StarCoder", ("<fim_prefix>", "", "<fim_suffix>", " ", "<fim_middle>"), ("<fim_prefix>", "<fim_suffix>", " ", "<fim_middle>", ""),
         ("<|endoftext|>", "<fim_pad>", "<file_sep>", "<repo_name>")),  # and the demo model
    _Fim("Qwen", ("<|fim_prefix|>", "", "<|fim_suffix|>", " ", "<|fim_middle|>"), (),
         ("<|endoftext|>", "<|fim_pad|>", "<|file_sep|>", "<|repo_name|>")),
    _Fim("CodeLlama", ("\u2581<PRE>", "", "\u2581<SUF>", " ", "\u2581<MID>"), ("\u2581<PRE>", "\u2581<SUF>", " ", "\u2581<MID>", ""), ("\u2581<EOT>",)),
    _Fim("DeepSeek", ("<\uff5cfim\u2581begin\uff5c>", "", "<\uff5cfim\u2581hole\uff5c>", " ", "<\uff5cfim\u2581end\uff5c>"), (),
         ("<|EOT|>",)),
)


def fim_template(vocab: Vocab, mode: str = "") -> tuple[list[int], list[int]]:
    """(template, end tokens) of the first kind whose tokens the vocabulary has. mode "": PSM. ValueError."""
    if mode and mode not in MODES:
        raise ValueError(f"fim_mode is {mode!r}; expected one of {', '.join(MODES)}")
    for kind in _KINDS:
        if any(name.strip() and vocab.token_id(name) is None for name in kind.psm):
            continue
        names = kind.spm if mode == "spm" else kind.psm
        if not names:
            raise ValueError(f"fim_mode is 'spm'; models of this kind ({kind.name}) are trained for 'psm' only")
        template = [PREFIX if name == "" else SUFFIX if name == " " else vocab.token_id(name) for name in names]
        ends = [vocab.token_id(name) for name in kind.ends]
        return [t for t in template if t is not None], [e for e in ends if e is not None]
    raise ValueError("suffix is given, but the model has no tokens for fill in the middle")


def make_prompt(vocab: Vocab, text: str | bytes, *, token_healing: bool = True, suffix: str | bytes | Sequence[int] = "",
                fim_mode: str = "") -> Prompt:
    """Of the text before the cursor and, with a suffix, the text behind it. ValueError."""
    template: list[int] = []
    ends: list[int] = []
    behind: list[int] = []
    if len(suffix):
        template, ends = fim_template(vocab, fim_mode)
        behind = vocab.encode_inner(suffix) if isinstance(suffix, (str, bytes)) else list(suffix)
    if not token_healing:
        return Prompt(vocab.encode(text), b"", (), behind, template, ends)
    start = vocab.encode_open(text, may_be_empty=bool(template))
    return Prompt(start.ids, start.typed, start.typed_ids, behind, template, ends)


def assemble(prompt: Prompt, room: int) -> tuple[list[int], int, int]:
    """(The tokens to compute, how many the prefix and the suffix lost.) With a template the two are cut to room tokens together:
    the suffix loses its end where it takes more than a quarter of the room and than the prefix leaves, the prefix its beginning."""
    if not prompt.template:
        return list(prompt.ids), 0, 0
    room = max(0, room)
    suffix = list(prompt.suffix[:max(room // 4, room - len(prompt.ids))])
    prefix = list(prompt.ids[max(0, len(prompt.ids) - (room - len(suffix))):])
    ids = [i for t in prompt.template for i in (prefix if t == PREFIX else suffix if t == SUFFIX else [t])]
    return ids, len(prompt.ids) - len(prefix), len(prompt.suffix) - len(suffix)
