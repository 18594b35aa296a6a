"""Vocab: text to ids with the checkpoint's own tokenizer, and the exact bytes of every token.

A text's ids are what `tokenizers` / `sentencepiece` give without adding special tokens. With tokenizer.json, special tokens
written out in the text are recognized, as in transformers; with tokenizer.model control symbols never are.
"""
from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

from ._native import LoadError

_SPACE = "\u2581"  # sentencepiece's mark for a space
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocab:
    token_bytes: list[bytes]  # by id; special tokens and unused ids have none
    special_ids: frozenset[int]
    eos_ids: list[int]
    bos_id: int  # -1: none

    def __init__(self, encode: Callable[[str], list[int]], token_bytes: list[bytes], special_ids: Iterable[int],
                 eos_ids: Iterable[int] = (), bos_id: int = -1, ids_by_special: dict[str, int] | None = None) -> None:
        self._encode = encode
        self.token_bytes = token_bytes
        self.special_ids = frozenset(special_ids)
        self.eos_ids = list(eos_ids)
        self.bos_id = bos_id
        self._ids_by_special = ids_by_special or {}

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Vocab:
        """From tokenizer.json or else tokenizer.model; eos and bos from the weights' config.json if it is there, else from the
        tokenizer's own files. LoadError says what is missing or not understood."""
        directory = os.fspath(directory)
        options = read_json(os.path.join(directory, "tokenizer_config.json"))
        if os.path.isfile(path := os.path.join(directory, "tokenizer.json")):
            vocab = _from_tokenizer_json(path)
        elif os.path.isfile(path := os.path.join(directory, "tokenizer.model")):
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
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError as e:
                raise ValueError(f"prompt is not UTF-8: byte 0x{text[e.start]:02x} at offset {e.start}") from None
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as e:
            raise ValueError(f"prompt has a lone surrogate at character {e.start}") from None
        return self._encode(text)

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids; those of special and unknown ones are none."""
        table = self.token_bytes
        return b"".join(table[i] for i in ids if 0 <= i < len(table))

    def special_id(self, token: str) -> int | None:
        """Id of a special token by its name, such as "<|endoftext|>"."""
        return self._ids_by_special.get(token)

    def __len__(self) -> int:
        return len(self.token_bytes)


def read_json(path: str) -> dict[str, Any]:
    """The object in a file, {} without the file; LoadError."""
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as f:
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
    special = {token["content"]: token["id"] for token in data.get("added_tokens", []) if token.get("special")}
    special_ids = set(special.values())

    def token(id: int) -> bytes:
        if id not in pieces or id in special_ids:
            return b""
        return _byte_level_token(pieces[id]) if "ByteLevel" in kinds else _spaced_token(pieces[id], "ByteFallback" in kinds)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    return Vocab(encode, [token(id) for id in range(max(pieces, default=-1) + 1)], special_ids, ids_by_special=special)


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
    # tokens that transformers added; encode() does not produce those beyond the model's own
    for key, added in options.get("added_tokens_decoder", {}).items():
        id = int(key)
        table.extend(b"" for _ in range(id + 1 - len(table)))
        if added.get("special"):
            special[added["content"]] = id
            table[id] = b""
        elif id >= size:
            table[id] = added["content"].encode()

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
    return Vocab(encode, table, special.values(), [eos] if eos >= 0 else [], bos, special)
