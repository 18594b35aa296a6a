"""Byte tables against the tokenizers' own decoding: byte-level BPE (CodeFuse, StarCoder kind) and sentencepiece."""
import io
import json
import random
import re

import pytest
import sentencepiece
import tokenizers
from codefuse_triton import LoadError, Vocab
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

CODE = [
    "def quicksort(items):\n    if len(items) <= 1:\n        return items\n",
    "class Stack(object):\n\tdef __init__(self) -> None:\n\t\tself.items = []  # the items\n",
    "for (int i = 0; i < n; ++i) { printf(\"%d\\n\", i); }\n",
    "// 快速排序，从小到大 😀 naïve café\n",
    "import os, sys\nprint('hello, world', 12345, 0xff)\n",
] * 20
TEXTS = ["", " ", "\n\n\t x", "def f(x):\n    return x + 1\n", "héllo wörld", "排序 算法", "😀👩‍👩‍👧 ok", "a  b   c    d", "\r\n", "▁ and ▁▁x", "<0x41>", "\x00\x7f\x80"]


def byte_level(path, special=("<|endoftext|>",), extra=(), add_prefix_space=False, pre_tokenizer=None):
    t = tokenizers.Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(CODE, trainers.BpeTrainer(vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=list(special), show_progress=False))
    t.add_tokens([tokenizers.AddedToken(e, normalized=False) for e in extra])
    t.save(str(path / "tokenizer.json"))
    return t


def spaced(path):
    """A tokenizer.json of the LLaMA kind: sentencepiece pieces with byte fallback."""
    t = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    t.normalizer = normalizers.Replace(" ", "▁")
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special + [f"<0x{b:02X}>" for b in range(256)], show_progress=False, limit_alphabet=60)
    t.train_from_iterator(CODE, trainer)
    data = json.loads(t.to_str())
    data["added_tokens"] = [a for a in data["added_tokens"] if a["content"] in special]  # byte pieces are pieces, not added tokens
    (path / "tokenizer.json").write_text(json.dumps(data))
    return tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))


def sentencepiece_model(path, **options):
    out = io.BytesIO()
    settings = dict(model_type="bpe", vocab_size=420, byte_fallback=True, character_coverage=0.99, normalization_rule_name="identity",
                    remove_extra_whitespaces=False, add_dummy_prefix=False, allow_whitespace_only_pieces=True, minloglevel=2,
                    control_symbols=["<fim_prefix>"], user_defined_symbols=["\n", "\t", "<|user|>"], hard_vocab_limit=False)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CODE), model_writer=out, **{**settings, **options})
    (path / "tokenizer.model").write_bytes(out.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


def random_ids(size, count=300):
    rng = random.Random(size)
    return [[rng.randrange(size) for _ in range(rng.randint(1, 12))] for _ in range(count)]


def joined(vocab, ids):
    return vocab.decode(ids).decode("utf-8", "replace")


def marks_as_one(text):
    """sentencepiece writes U+FFFD for every stray byte, Python one for an unfinished character."""
    return re.sub("\ufffd+", "\ufffd", text)


@pytest.mark.parametrize("kind", ["codefuse", "starcoder", "spaces added"])
def test_byte_level(tmp_path, kind):
    if kind == "starcoder":
        special, extra = ("<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"), ()
    else:  # GPT-NeoX's tokenizer has runs of spaces as added tokens; é and Ġ are also byte-level characters
        special, extra = ("<|endoftext|>", "<|pad|>"), ("    ", "        ", "é", "Ġx", "快速") if kind == "spaces added" else ()
    t = byte_level(tmp_path, special, extra)
    vocab = Vocab.load(tmp_path)
    assert len(vocab) == t.get_vocab_size()
    for ids in [[i] for i in range(len(vocab))] + random_ids(len(vocab)):
        assert joined(vocab, ids) == t.decode(ids, skip_special_tokens=True), ids
    for text in TEXTS + CODE[:5]:
        ids = vocab.encode(text)
        assert ids == t.encode(text, add_special_tokens=False).ids
        if kind != "spaces added":
            assert vocab.decode(ids) == text.encode()
    assert vocab.special_ids == set(range(len(special)))
    assert all(vocab.token_bytes[i] == b"" for i in vocab.special_ids)
    # a special token written out is the token, as in transformers
    assert vocab.encode("a<|endoftext|>")[-1] == vocab.special_id("<|endoftext|>") == 0


def test_tokenizer_json_with_byte_fallback(tmp_path):
    t = spaced(tmp_path)
    vocab = Vocab.load(tmp_path)
    for id in range(len(vocab)):
        piece = t.id_to_token(id)
        assert vocab.token_bytes[id] == (b"" if id < 3 else bytes([id - 3]) if id < 259 else piece.replace("▁", " ").encode())
    for text in TEXTS + CODE[:5]:
        if "▁" in text:
            continue
        ids = vocab.encode(text)
        assert vocab.decode(ids) == text.encode() and t.decode(ids) == text
    for ids in random_ids(len(vocab)):
        ids = [i for i in ids if not 131 <= i < 259]  # of a run of bytes with one stray byte `tokenizers` keeps nothing
        assert joined(vocab, ids) == t.decode(ids, skip_special_tokens=True)


def test_metaspace(tmp_path):
    t = spaced(tmp_path)
    t.decoder = decoders.Metaspace(prepend_scheme="never")
    t.save(str(tmp_path / "tokenizer.json"))
    vocab = Vocab.load(tmp_path)
    assert vocab.token_bytes[3] == b"<0x00>"  # no ByteFallback in this decoder
    for text in CODE[:1]:
        assert vocab.decode(vocab.encode(text)).decode() == t.decode(vocab.encode(text))


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece(tmp_path, prefix, model_type):
    p = sentencepiece_model(tmp_path, add_dummy_prefix=prefix, model_type=model_type)
    vocab = Vocab.load(tmp_path)
    assert len(vocab) == p.vocab_size()
    for i in range(len(vocab)):
        if p.is_byte(i):
            assert vocab.token_bytes[i] == bytes([int(p.id_to_piece(i)[3:5], 16)])
        elif p.is_control(i) or p.is_unknown(i):
            assert vocab.token_bytes[i] == b"" and i in vocab.special_ids
        else:  # after another token, so that the decoder keeps a leading space
            assert b"x" + vocab.token_bytes[i] == p.decode([p.piece_to_id("x"), i]).encode()
    for ids in random_ids(len(vocab)):
        ids = [i for i in ids if not p.is_unknown(i)]
        ids = [p.piece_to_id("x"), *ids]
        assert marks_as_one(joined(vocab, ids)) == marks_as_one(p.decode(ids))
    for text in TEXTS + CODE[:5]:
        ids = vocab.encode(text)
        if "▁" not in text or prefix:
            assert ids == p.encode(text)
        if not (prefix and "▁" in text) and "\x00" not in text:
            assert vocab.decode(ids) == (b" " if prefix and text else b"") + text.encode(), text
    # control symbols are never read from text, user-defined ones are
    assert vocab.special_id("<fim_prefix>") not in vocab.encode("<fim_prefix>")
    assert vocab.encode("a<|user|>b")[-2] == p.piece_to_id("<|user|>") and vocab.token_bytes[p.piece_to_id("<|user|>")] == b"<|user|>"
    assert vocab.eos_ids == [p.eos_id()] and vocab.bos_id == p.bos_id()


def test_eos_comes_from_the_weights_config_first(tmp_path):
    byte_level(tmp_path, ("<|endoftext|>", "<|pad|>"))
    assert Vocab.load(tmp_path).eos_ids == [] and Vocab.load(tmp_path).bos_id == -1
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|pad|>"}, "bos_token": "<|endoftext|>"}))
    assert Vocab.load(tmp_path).eos_ids == [1] and Vocab.load(tmp_path).bos_id == 0
    (tmp_path / "config.json").write_text(json.dumps({"format_version": 1, "eos_ids": [0, 7], "bos_id": -1}))
    assert Vocab.load(tmp_path).eos_ids == [0, 7] and Vocab.load(tmp_path).bos_id == -1


def test_tokens_that_transformers_added_to_sentencepiece(tmp_path):
    p = sentencepiece_model(tmp_path)
    n, user = p.vocab_size(), p.piece_to_id("<|user|>")
    added = {str(n + 1): {"content": "  new", "special": False}, str(n + 2): {"content": "<end>", "special": True}, str(user): {"content": "<|user|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    vocab = Vocab.load(tmp_path)
    assert vocab.token_bytes[n:] == [b"", b"  new", b""] and vocab.token_bytes[user] == b""
    assert vocab.special_id("<end>") == n + 2 and user in vocab.special_ids


def test_bytes_prompt(tmp_path):
    byte_level(tmp_path)
    vocab = Vocab.load(tmp_path)
    assert vocab.encode("naïve".encode()) == vocab.encode("naïve")
    with pytest.raises(ValueError, match="not UTF-8: byte 0xff at offset 2"):
        vocab.encode(b"ab\xff")
    with pytest.raises(ValueError, match="lone surrogate at character 1"):
        vocab.encode("a\ud800")


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(LoadError, match="neither tokenizer.json nor tokenizer.model"):
        Vocab.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(LoadError, match="tokenizer.json"):
        Vocab.load(tmp_path)
    t = tokenizers.Tokenizer(models.WordPiece({"a": 0, "##b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    t.decoder = decoders.WordPiece()
    t.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(LoadError, match=r"decoder is \['WordPiece'\]; expected ByteLevel"):
        Vocab.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(LoadError, match="tokenizer.model"):
        Vocab.load(tmp_path)
    with pytest.raises(ValueError, match="expected token ids"):
        Vocab.none("somewhere").encode("text")


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    t = byte_level(tmp_path)
    t.enable_truncation(3)
    t.enable_padding(length=50)
    t.save(str(tmp_path / "tokenizer.json"))
    assert 3 < len(Vocab.load(tmp_path).encode("def quicksort(items): pass")) < 50
