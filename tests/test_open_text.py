"""Prompts that end anywhere: what of their tokens is certain, for every kind of tokenizer."""
import random

import pytest
import test_vocab
from codefuse_triton import Vocab, _native
from codefuse_triton.vocab import MAX_HEALED
from test_vocab import CODE, TEXTS, byte_level, sentencepiece_model, spaced
from tokenizers import Regex, pre_tokenizers

MORE = ["", " ", "\n", "    ", "s", "'s", "self.items", "(x)", " = 1", "0", "é", "快", "=", "\n\n  x", "\t", ".append(", "_", "ing the", "😀"]
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def tiktoken_kind(path):
    """The pre-tokenizer of Qwen and Llama 3: digits in threes, punctuation with the line ends behind it."""
    t = byte_level(path, pre_tokenizer=pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]))
    assert t.encode("x  \n\ny 1234").tokens
    return t


def deepseek_kind(path):
    """Line ends, letters, Chinese and digits split one after the other."""
    split = [pre_tokenizers.Split(Regex(p), "isolated") for p in (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+")]
    return byte_level(path, pre_tokenizer=pre_tokenizers.Sequence(
        [*split, pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]))


KINDS = {
    "byte-level": lambda path: byte_level(path),
    "runs of spaces added": lambda path: byte_level(path, extra=("    ", "        ")),
    "tiktoken": tiktoken_kind,
    "deepseek": deepseek_kind,
    "llama": spaced,
    "sentencepiece": sentencepiece_model,
    "unigram": lambda path: sentencepiece_model(path, model_type="unigram"),
    "dummy prefix": lambda path: sentencepiece_model(path, add_dummy_prefix=True),
}


@pytest.fixture(scope="module", params=KINDS)
def vocab(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("kind")
    KINDS[request.param](path)
    found = Vocab.load(path)
    found.kind = request.param
    found.bos_id = max(found.bos_id, 0)  # a text may be given back wholly
    return found


def cuts():
    """Every place of some texts, the beginning too."""
    for text in [CODE[0], CODE[1], CODE[2], CODE[3], CODE[4], *TEXTS]:
        if "▁" in text or "\x00" in text:
            continue
        for at in range(1, len(text) + 1):
            yield text[:at], text[at:]


def test_the_parts_are_the_text(vocab):
    for text, _ in cuts():
        o = vocab.encode_open(text)
        plain = vocab.encode(text)
        assert o.ids and len(o.typed_ids) <= MAX_HEALED + 3 and vocab.decode(o.typed_ids) == o.typed
        whole = vocab.decode(o.ids) + o.typed
        assert whole == vocab.decode(plain)
        assert whole.removeprefix(b" " if vocab.kind == "dummy prefix" else b"") == text.encode()
        o.typed.decode()  # whole characters
        if o.ids != [vocab.bos_id]:
            assert plain == o.ids + o.typed_ids


def test_no_continuation_changes_what_is_kept(vocab):
    rng = random.Random(5)
    changed, cases = [], 0
    for text, rest in cuts():
        o = vocab.encode_open(text)
        if o.ids == [vocab.bos_id]:
            continue
        for more in [rest, *MORE, rng.choice(MORE) + rng.choice(MORE)]:
            cases += 1
            if vocab.encode(text + more)[: len(o.ids)] != o.ids:
                changed.append((text[-20:], more))
    assert cases > 5_000 and not changed, changed[:5]


def test_nothing_is_given_back_without_need(vocab):
    """Some token begins with an end of what is given back and is longer, or a run of spaces may be split otherwise."""
    held = 0
    for text, _ in cuts():
        o = vocab.encode_open(text)
        if o.typed:
            held += 1
            assert o.typed.isspace() or any(len(t) > size and t.startswith(o.typed[-size:]) for size in range(1, len(o.typed) + 1) for t in vocab.token_bytes)
    assert held > 100


def test_typed_bytes_can_be_spelled(vocab):
    for text, _ in cuts():
        typed = vocab.encode_open(text).typed
        assert _native.testing.Spelling(vocab.token_bytes, sorted(vocab.never_text), len(vocab), typed).possible


def test_special_tokens_stay(tmp_path):
    byte_level(tmp_path, ("<|endoftext|>", "<fim>"), extra=("<user>", "    ", "快速"))
    vocab = Vocab.load(tmp_path)
    user, runs, chinese = (vocab.encode(t)[0] for t in ("<user>", "    ", "快速"))
    assert vocab.never_text == {user, chinese} and vocab.token_bytes[user] == b"<user>"
    for text, last in [("ret<|endoftext|>", 0), ("x = <fim>", 1), ("<user>", user), ("x快速", chinese)]:
        o = vocab.encode_open(text)
        assert o.ids[-1] == last and o.typed == b""
    o = vocab.encode_open("<|endoftext|>retu")
    assert o.ids[0] == 0 and o.typed and b"retu".endswith(o.typed)
    # the beginning of a special token's name is text, and is not completed to that token
    o = vocab.encode_open("x <|endof")
    allowed = _native.testing.Spelling(vocab.token_bytes, sorted(vocab.never_text), len(vocab), o.typed).allowed()
    assert not {0, 1, user, chinese} & set(allowed)
    assert runs in _native.testing.Spelling(vocab.token_bytes, sorted(vocab.never_text), len(vocab), b"   ").allowed()


def test_sentencepiece_symbols_are_not_text(tmp_path):
    p = sentencepiece_model(tmp_path)
    vocab = Vocab.load(tmp_path)
    assert vocab.never_text == {p.piece_to_id("<|user|>")}  # "\n" and "\t" are user-defined too


def test_a_character_without_tokens_is_kept(tmp_path):
    sentencepiece_model(tmp_path, byte_fallback=False)
    vocab = Vocab.load(tmp_path)
    o = vocab.encode_open("retu🐢")
    assert o.ids == vocab.encode("retu🐢") and o.typed == b""


def test_the_only_token_of_a_prompt(tmp_path):
    byte_level(tmp_path)
    vocab = Vocab.load(tmp_path)
    assert vocab.encode_open("d").ids == vocab.encode("d")  # nothing to start from
    vocab.bos_id = 0
    assert vocab.encode_open("d").ids == [0] and vocab.encode_open("d").typed == b"d"
    assert vocab.encode_open("").ids == []


def test_long_texts_are_tokenized_once(vocab, monkeypatch):
    text = CODE[0] * 300 + "    re"
    sizes = []
    encode = vocab._encode
    monkeypatch.setattr(vocab, "_encode", lambda t: sizes.append(len(t)) or encode(t))
    o = vocab.encode_open(text)
    assert sizes[0] == len(text) and all(size <= max(128, 2 * vocab._longest) + vocab._longest + 1 for size in sizes[1:])
    short = vocab.encode_open(text[-200:])
    assert o.typed == short.typed and (o.typed or vocab.kind == "unigram")


RUNS = ["=" * 100 + "\n", "a" * 64 + "\n", " " * 70 + "x\n", "1" * 50 + "\n", "ab" * 24 + "\n"] * 60


@pytest.mark.parametrize("kind", ["byte-level", "tiktoken", "llama", "sentencepiece", "unigram", "dummy prefix"])
def test_long_runs_cost_what_other_texts_do(kind, tmp_path, monkeypatch):
    """Where a run begins decides how tokens divide it up to its end; counted in characters tokenized, beside one pass over the text."""
    monkeypatch.setattr(test_vocab, "CODE", CODE + RUNS)
    KINDS[kind](tmp_path)
    vocab = Vocab.load(tmp_path)
    assert vocab._longest >= 16
    encode, work = vocab._encode, []
    vocab._encode = lambda t: work.append(len(t)) or encode(t)
    runs = ["=", "a", " ", "1", "ab", "é", "<|endoftext|>"]
    for run in [*runs, "x\n" + " " * 9]:
        for more in range(0, 67, 11) if run in runs[:2] else (0, 5):
            text = (run * (1 << 17))[:20_000 + more]
            work.clear()
            o = vocab.encode_open(text)
            assert sum(work) - len(text) <= (vocab._longest + 10) * (MAX_HEALED + 2) * max(16, vocab._longest), (run, more)
            whole = encode(text)
            assert o.ids + o.typed_ids == whole and vocab.decode(o.typed_ids) == o.typed and text.encode().endswith(o.typed)
            if len(o.typed_ids) < MAX_HEALED:  # no more was to be given back
                assert all(encode(text + end)[:len(o.ids)] == o.ids for end in ("a", "=", " ", "\n", "1", run))


def test_four_megabytes_of_one_character(tmp_path, monkeypatch):
    monkeypatch.setattr(test_vocab, "CODE", CODE + RUNS)
    byte_level(tmp_path)
    vocab = Vocab.load(tmp_path)
    encode, work = vocab._encode, []
    vocab._encode = lambda t: work.append(len(t)) or encode(t)
    o = vocab.encode_open("a" * (1 << 22))
    assert work[0] == 1 << 22 and sum(work[1:]) < 1 << 16 and o.typed


def test_an_end_that_is_not_found(tmp_path):
    """Every end of the text alone has other tokens: the most is given back, and no long text is tokenized twice."""
    byte_level(tmp_path)
    vocab = Vocab.load(tmp_path)
    encode, work = vocab._encode, []
    vocab._encode = lambda t: work.append(len(t)) or (encode(t) if len(work) == 1 else [0] * 9)
    text = CODE[0] * 300
    o = vocab.encode_open(text)
    assert sum(work[1:]) < 1 << 14 and len(o.typed_ids) >= MAX_HEALED and (vocab.decode(o.ids) + o.typed).decode() == text


def test_bad_text_is_refused(vocab):
    with pytest.raises(ValueError, match="not UTF-8"):
        vocab.encode_open(b"a\xff")
    with pytest.raises(ValueError, match="lone surrogate"):
        vocab.encode_open("a\ud800")
