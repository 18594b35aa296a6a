"""What tokenizer.json and tokenizer.model say: text to ids, the bytes of every token, and which tokens are no text."""
from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ._native import LoadError
from .files import is_file, read_json

_SPACE = "\u2581"  # sentencepiece's mark for a space
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Tokenizer:
    encode: Callable[[str], list[int]]
    token_bytes: list[bytes]  # by id; special tokens and unused ids have none
    special: dict[str, int]  # ids of special tokens by their names
    never_text: set[int]  # tokens with bytes that stand for something else than text
    ids_by_name: dict[str, int]  # of tokens that stand for something else, special or not
    eos_ids: list[int] = field(default_factory=list)
    bos_id: int = -1  # -1: none


def read_tokenizer(directory: str, options: dict[str, Any]) -> Tokenizer:
    """From tokenizer.json or else tokenizer.model; options: of tokenizer_config.json. LoadError says what is missing or not understood."""
    if is_file(path := os.path.join(directory, "tokenizer.json")):
        return _from_tokenizer_json(path)
    if is_file(path := os.path.join(directory, "tokenizer.model")):
        return _from_sentencepiece(path, options)
    raise LoadError(f"{directory}: neither tokenizer.json nor tokenizer.model")


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


def _from_tokenizer_json(path: str) -> Tokenizer:
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

    return Tokenizer(encode, [token(id) for id in range(max(pieces, default=-1) + 1)], special, never_text, {token["content"]: token["id"] for token in added})


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


def _from_sentencepiece(path: str, options: dict[str, Any]) -> Tokenizer:
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
    return Tokenizer(encode, table, special, never_text - set(special.values()), names, [eos] if eos >= 0 else [], bos)
