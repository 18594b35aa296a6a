"""The demo tokenizer: sentencepiece BPE with byte fallback, lossless for every Unicode text.

Ids: 0 <unk> (never produced), 1 <|endoftext|> (document separator and eos), 2 <fim_prefix>,
3 <fim_middle>, 4 <fim_suffix>, 5 newline, 6 tab, then 256 byte pieces, then learned pieces (runs of
spaces among them). 1 to 4 are control symbols: no text encodes to them. Digits are never merged.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterable

import sentencepiece

UNK_ID, EOS_ID, FIM_PREFIX_ID, FIM_MIDDLE_ID, FIM_SUFFIX_ID = range(5)
EOS_PIECE = "<|endoftext|>"
FIM_PIECES = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")
SPACE_MARK = "\u2581"   # sentencepiece's stand-in for a space


def train(texts: Iterable[str], vocab: int, sample_bytes: int, seed: int = 0) -> bytes:
    """The serialized model, trained on the non-blank lines of a random sample of the texts."""
    texts = list(texts)
    random.Random(seed).shuffle(texts)
    lines, taken = [], 0
    for text in texts:
        lines += [line for line in text.split("\n") if line.strip()]
        taken += len(text)
        if taken >= sample_bytes:
            break
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=vocab,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, split_digits=True, byte_fallback=True,
        character_coverage=0.9995, max_sentencepiece_length=16, max_sentence_length=8192,
        unk_id=UNK_ID, eos_id=EOS_ID, bos_id=-1, pad_id=-1, eos_piece=EOS_PIECE,
        control_symbols=list(FIM_PIECES), user_defined_symbols=["\n", "\t"], minloglevel=1)
    return model.getvalue()


class Tokenizer:
    def __init__(self, model: bytes):
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab = self.processor.vocab_size()
        self._mark = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]

    def encode(self, text: str) -> list[int]:
        """Ids of the text. A literal U+2581 would be read back as a space, so it goes as bytes."""
        head, *rest = text.split(SPACE_MARK)
        ids = self.processor.encode(head)
        for part in rest:
            ids += self._mark + self.processor.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids)
