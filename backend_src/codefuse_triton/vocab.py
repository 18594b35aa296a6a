"""Vocab: text to ids with the checkpoint's own tokenizer, and the exact bytes of every token.

A text's ids are what `tokenizers` / `sentencepiece` give without adding special tokens. With tokenizer.json, special tokens
written out in the text are recognized, as in transformers; with tokenizer.model control symbols never are.
"""
from __future__ import annotations

import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ._native import LoadError

_SPACE = "\u2581"  # sentencepiece's mark for a space
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
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
        if is_file(path := os.path.join(directory, "tokenizer.json")):
            vocab = _from_tokenizer_json(path)
        elif is_file(path := os.path.join(directory, "tokenizer.model")):
            vocab = _from_sentencepiece(path, options)
        else:
            raise LoadError(f"{directory}: neither tokenizer.json nor tokenizer.model")
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


def on_disk(path: str) -> bytes:
    """A path for Python's own functions, which in Triton's stub would encode it in ASCII, whatever the locale."""
    return path.encode(errors="surrogateescape")


def is_file(path: str) -> bool:
    return os.path.isfile(on_disk(path))


def read_json(path: str) -> dict[str, Any]:
    """The object in a file, {} without the file; LoadError."""
    if not is_file(path):
        return {}
    try:
        with open(on_disk(path), encoding="utf-8") as f:
            value = json.load(f)
    except ValueError as e:
        raise LoadError(f"{path}: not JSON: {e}") from None
    if not isinstance(value, dict):
        raise LoadError(f"{path}: expected an object")
    return value


def _byte_level() -> dict[str, int]:
    """GPT-2's map from characters to bytes: printable bytes are themselves, the rest follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(rest)}


_CHAR_BYTES = _byte_level()


def _byte_level_token(piece: str) -> bytes:
    # a piece with any other character is literal text, as the ByteLevel decoder has it
    values = [_CHAR_BYTES.get(c) for c in piece]
    return piece.encode() if None in values else bytes(v for v in values if v is not None)


def _spaced_token(piece: str, byte_fallback: bool) -> bytes:
    if byte_fallback and (match := _BYTE.fullmatch(piece)):
        return bytes([int(match[1], 16)])
    return piece.replace(_SPACE, " ").encode()


def _decoder_steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [step for d in decoder.get("decoders", []) for step in _decoder_steps(d)]
    return [decoder]


def _from_tokenizer_json(path: str) -> Vocab:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(path)
    except Exception as e:  # tokenizers raises plain Exception
        raise LoadError(f"{path}: {e}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    data = read_json(path)
    steps = _decoder_steps(data.get("decoder"))
    kinds = [step.get("type") for step in steps]
    spaced = any(s.get("type") == "Metaspace" or s.get("type") == "Replace" and s.get("pattern", {}).get("String") == _SPACE for s in steps)
    if not set(kinds) <= {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"} or not ("ByteLevel" in kinds or spaced):
        raise LoadError(f"{path}: decoder is {kinds or 'missing'}; expected ByteLevel, or Metaspace / Replace '{_SPACE}' with or without ByteFallback")
    pieces = {id: piece for piece, id in tokenizer.get_vocab(with_added_tokens=True).items()}
    added = data.get("added_tokens", [])
    special = {token["content"]: token["id"] for token in added if token.get("special")}
    special_ids = set(special.values())
    never_text = {token["id"] for token in added if not token["content"].isspace()} - special_ids  # runs of spaces are text

    def token(id: int) -> bytes:
        if id not in pieces or id in special_ids:
            return b""
        return _byte_level_token(pieces[id]) if "ByteLevel" in kinds else _spaced_token(pieces[id], "ByteFallback" in kinds)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    return Vocab(encode, [token(id) for id in range(max(pieces, default=-1) + 1)], special_ids, ids_by_special=special,
                 never_text=never_text, ids_by_name={token["content"]: token["id"] for token in added})


_CODELLAMA_MARKS = {"\u2581<PRE>", "\u2581<MID>", "\u2581<SUF>", "\u2581<EOT>"}  # pieces of any type
_USER_DEFINED = 4  # of sentencepiece_model.proto: SentencePiece.Type


def _piece_kinds(model: bytes) -> list[int]:
    """The type of every piece of a serialized ModelProto: piece i is its i-th field 1, whose field 3 is the type (1, normal, if absent)."""
    def fields(data: bytes) -> Iterator[tuple[int, Any]]:
        at = 0

        def varint() -> int:
            nonlocal at
            value, scale = 0, 1
            while True:
                byte = data[at]
                at += 1
                value, scale = value + byte % 128 * scale, scale * 128
                if byte < 128:
                    return value

        while at < len(data):
            field, wire = divmod(varint(), 8)
            size = varint() if wire in (0, 2) else 4 if wire == 5 else 8
            if wire == 0:
                yield field, size
                continue
            yield field, data[at:at + size]
            at += size

    return [dict(fields(piece)).get(3, 1) for field, piece in fields(model) if field == 1]


def _from_sentencepiece(path: str, options: dict[str, Any]) -> Vocab:
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=path)
    except (OSError, RuntimeError) as e:
        raise LoadError(f"{path}: {e}") from None
    size = processor.vocab_size()
    pieces = [processor.id_to_piece(i) for i in range(size)]
    special = {pieces[i]: i for i in range(size) if processor.is_control(i) or processor.is_unknown(i)}
    table = [b"" if pieces[i] in special or processor.is_unused(i)
             else _spaced_token(pieces[i], processor.is_byte(i)) for i in range(size)]
    kinds = _piece_kinds(processor.serialized_model_proto())
    never_text = {i for i in range(size) if pieces[i] in _CODELLAMA_MARKS or kinds[i] == _USER_DEFINED and not pieces[i].replace(_SPACE, " ").isspace()}
    # tokens that transformers added; encode() does not produce those beyond the model's own
    for key, added in options.get("added_tokens_decoder", {}).items():
        id = int(key)
        table.extend(b"" for _ in range(id + 1 - len(table)))
        if added.get("special"):
            special[added["content"]] = id
            table[id] = b""
        elif id >= size:
            table[id] = added["content"].encode()
            never_text.add(id)

    # A literal U+2581 would be read as a space: spelled in bytes where the model can and adds no space in front of a text.
    mark = [processor.piece_to_id(f"<0x{b:02X}>") for b in _SPACE.encode()]
    exact = all(processor.is_byte(i) for i in mark) and not pieces[processor.encode("a")[0]].startswith(_SPACE)

    def encode(text: str) -> list[int]:
        if not exact or _SPACE not in text:
            return processor.encode(text)  # type: ignore[no-any-return]
        head, *rest = text.split(_SPACE)
        ids = processor.encode(head)
        for part in rest:
            ids = ids + mark + processor.encode(part)
        return ids  # type: ignore[no-any-return]

    eos, bos = processor.eos_id(), processor.bos_id()
    names = {pieces[i]: i for i in never_text if i < size}
    names.update((added["content"], int(key)) for key, added in options.get("added_tokens_decoder", {}).items() if int(key) >= size)
    return Vocab(encode, table, special.values(), [eos] if eos >= 0 else [], bos, special, never_text - set(special.values()), names)
