"""Vocab: text to ids with the checkpoint's own tokenizer, and the exact bytes of every token.

A text's ids are what `tokenizers` / `sentencepiece` give without adding special tokens. With tokenizer.json, special tokens
written out in the text are recognized, as in transformers; with tokenizer.model control symbols never are.
"""
from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from .files import read_json
from .tokenizer_files import read_tokenizer

_MARK = "\u263a"  # a character that no token joins with the next
_TRIES = 8  # ends of a text that are tokenized to find one that is tokenized as in the text
MAX_HEALED = 8  # tokens at the end of a prompt that are given back at most, with those that complete a character


@dataclass(frozen=True)
class OpenText:
    """A text that ends anywhere, to be continued."""

    ids: list[int]  # tokens that no continuation of the text changes
    typed: bytes  # the rest of the text: what comes next must begin with these bytes
    typed_ids: list[int]  # and as encode() has it


class Vocab:
    token_bytes: list[bytes]  # by id; special tokens and unused ids have none
    special_ids: frozenset[int]
    never_text: frozenset[int]  # tokens with bytes that stand for something else: typed text is not completed to one
    eos_ids: list[int]
    bos_id: int  # -1: none

    def __init__(self, encode: Callable[[str], list[int]], token_bytes: list[bytes], special_ids: Iterable[int],
                 eos_ids: Iterable[int] = (), bos_id: int = -1, ids_by_special: dict[str, int] | None = None,
                 never_text: Iterable[int] = (), ids_by_name: dict[str, int] | None = None) -> None:
        self._encode = encode
        self.token_bytes = token_bytes
        self.special_ids = frozenset(special_ids)
        self.never_text = frozenset(never_text)
        self._text_tokens = sorted({b for i, b in enumerate(token_bytes) if b and i not in self.never_text})
        self._longest = max(map(len, self._text_tokens), default=0)
        self._dummy_prefix = bool(token_bytes) and self.decode(encode("a")) == b" a"  # a text is tokenized with a space in front
        self.eos_ids = list(eos_ids)
        self.bos_id = bos_id
        self._ids_by_special = ids_by_special or {}
        self._ids_by_name = ids_by_name or {}

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Vocab:
        """From tokenizer.json or else tokenizer.model; eos and bos from the weights' config.json if it is there, else from the
        tokenizer's own files. LoadError says what is missing or not understood."""
        directory = os.fspath(directory)
        options = read_json(os.path.join(directory, "tokenizer_config.json"))
        t = read_tokenizer(directory, options)
        vocab = cls(t.encode, t.token_bytes, t.special.values(), t.eos_ids, t.bos_id, t.special, t.never_text, t.ids_by_name)
        for key in ("eos", "bos"):
            token = options.get(f"{key}_token")
            id = vocab.special_id(token["content"] if isinstance(token, dict) else token or "")
            if id is not None and key == "eos":
                vocab.eos_ids = [id]
            elif id is not None:
                vocab.bos_id = id
        config = read_json(os.path.join(directory, "config.json"))
        if "format_version" in config:
            vocab.eos_ids = [int(i) for i in config.get("eos_ids", [])]
            vocab.bos_id = int(config.get("bos_id", -1))
        return vocab

    @classmethod
    def none(cls, directory: str) -> Vocab:
        """Of a weights directory without a tokenizer: prompts are token ids, outputs have no text."""
        def refuse(text: str) -> list[int]:
            raise ValueError(f"prompt is text, but {directory} has no tokenizer.json or tokenizer.model; expected token ids")
        return cls(refuse, [], ())

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of the text; bytes must be UTF-8 (ValueError)."""
        return self._encode(_checked(text))

    def encode_inner(self, text: str | bytes) -> list[int]:
        """Ids of a text that does not begin here: without the space that some tokenizers put in front."""
        text = _checked(text)
        if not self._dummy_prefix:
            return self._encode(text)
        mark = self._encode(_MARK)
        return self._encode(_MARK + text)[len(mark):]

    def encode_open(self, text: str | bytes, may_be_empty: bool = False) -> OpenText:
        """The text as far as its tokens are certain. A continuation moves the token boundaries near the end of a text: whatever it is,
        one of its tokens ends or stands behind the text, and that token starts where the rest of the text begins a token. Tokens
        that the text has in common with itself cut off at each of those places stay, up to MAX_HEALED are given back, none that
        is not text. Holds for BPE and unigram, whose tokens up to a boundary are those of the text up to there, and for
        pre-tokenizers that look ahead for the end of a run of spaces. At least one token is kept or put there, the bos, unless
        may_be_empty: without any the model has nothing to start from."""
        text = _checked(text)
        ids = self._encode(text)
        drop = self._dropped(ids, text, may_be_empty or self.bos_id >= 0)
        if drop == 0:
            return OpenText(ids, b"", [])
        start = [] if may_be_empty else [self.bos_id]
        return OpenText(ids[:-drop] or start, self.decode(ids[-drop:]), ids[-drop:])

    def _dropped(self, ids: list[int], text: str, all_may_go: bool) -> int:
        unsure = self._unsure(ids, text)
        if unsure == 0:
            return 0
        limit = 0  # trailing tokens that are text
        while limit < min(len(ids), MAX_HEALED + 3) and self.token_bytes[ids[-1 - limit]] and ids[-1 - limit] not in self.never_text:
            limit += 1
        drop = min(unsure, MAX_HEALED, limit)
        for count in (*range(drop, limit + 1), *range(drop - 1, 0, -1)):
            if count == 0 or count == len(ids) and not all_may_go:
                continue
            typed = self.decode(ids[-count:])
            end = text[-len(typed):].encode()
            whole_characters = not 0x80 <= typed[0] < 0xC0
            if whole_characters and (end.endswith(typed) or count == len(ids) and typed == b" " + end):  # the space of a dummy prefix
                return count
        return 0

    def _unsure(self, ids: list[int], text: str) -> int:
        """How many of the last tokens a continuation could change."""
        end = self._end(ids, text)
        if end is None:
            return MAX_HEALED
        part, found, encode = end
        unsure, tail = 0, part[len(part) - self._longest:] if len(part) > self._longest else part
        for size in range(1, len(tail) + 1):
            piece = tail[-size:].encode()
            if self._begins_longer_token(piece) or self._dummy_prefix and size == len(text) and self._begins_longer_token(b" " + piece):
                unsure = max(unsure, len(found) - _common(found, encode(part[:-size])))
        if part[-1:].isspace():  # pre-tokenizers look ahead for the end of a run of spaces
            unsure = max(unsure, len(found) - _common(found, encode(part + "a")))
        return unsure

    def _end(self, ids: list[int], text: str) -> tuple[str, list[int], Callable[[str], list[int]]] | None:
        """An end of the text that is tokenized as it is inside the text, at its own end at least; its ids, and what gives them. None:
        not found in a few tries, each much shorter than a long text."""
        size = max(128, 2 * self._longest)
        if len(text) <= size:
            return text, ids, self._encode
        for start in self._starts(ids, text, size):
            found = self.encode_inner(text[start:])
            if found[-MAX_HEALED - 1:] == ids[-MAX_HEALED - 1:]:
                return text[start:], found, self.encode_inner
        return None

    def _starts(self, ids: list[int], text: str, characters: int) -> Iterator[int]:
        """Where an end of so many characters and of more than MAX_HEALED tokens may begin: where tokens do, since a run of one character
        is divided by where it begins; where their bytes are not the text's (special tokens, normalized text), anywhere."""
        count, length, size = 0, 0, characters
        for _ in range(_TRIES):
            while (length < size or count <= MAX_HEALED) and count < len(ids) and self.token_bytes[ids[-1 - count]]:
                count += 1
                length += len(self.token_bytes[ids[-count]])
            if length < size or count <= MAX_HEALED:
                break
            piece = self.decode(ids[-count:])
            if not 0x80 <= piece[0] < 0xC0 and text.endswith(end := piece.decode(errors="replace")):
                yield len(text) - len(end)
            size = length + 1
        for size in (characters, 4 * characters, 16 * characters):
            yield max(0, len(text) - size)

    def _begins_longer_token(self, text: bytes) -> bool:
        place = bisect_right(self._text_tokens, text)
        return place < len(self._text_tokens) and self._text_tokens[place].startswith(text)

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids; those of special and unknown ones are none."""
        table = self.token_bytes
        return b"".join(table[i] for i in ids if 0 <= i < len(table))

    def special_id(self, token: str) -> int | None:
        """Id of a special token by its name, such as "<|endoftext|>"."""
        return self._ids_by_special.get(token)

    def token_id(self, name: str) -> int | None:
        """Id of a token that stands for something else than text by its name: special, added or a control or user-defined symbol."""
        return self._ids_by_name.get(name, self._ids_by_special.get(name))

    def __len__(self) -> int:
        return len(self.token_bytes)


def _checked(text: str | bytes) -> str:
    if isinstance(text, bytes):
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as e:
            raise ValueError(f"prompt is not UTF-8: byte 0x{text[e.start]:02x} at offset {e.start}") from None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise ValueError(f"prompt has a lone surrogate at character {e.start}") from None
    return text


def _common(a: list[int], b: list[int]) -> int:
    """Length of the beginning that both have."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
