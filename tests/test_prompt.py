"""Fill in the middle: each model kind's template from its tokens, cutting to fit, and the cursor inside a token."""
import pytest
from codefuse_triton import Engine, Outbox, Vocab
from codefuse_triton.prompt import PREFIX, SUFFIX, Prompt, assemble, fim_template, make_prompt
from fake_model import fake_engine, letters
from test_vocab import byte_level, sentencepiece_model

BEFORE, BEHIND = "def quicksort(items):\n    retu", "\n\nclass Stack(object):\n"


def starcoder(path):
    byte_level(path, ("<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<file_sep>"))


def qwen(path):  # its marks are added, but not special
    byte_level(path, ("<|endoftext|>",), extra=("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"))


def deepseek(path):
    byte_level(path, ("<｜end▁of▁sentence｜>",), extra=("<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"))


def codellama(path):
    sentencepiece_model(path, add_dummy_prefix=True, control_symbols=[], user_defined_symbols=["▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>"])


def demo(path):
    sentencepiece_model(path, control_symbols=["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>"], user_defined_symbols=["\n", "\t"])


KINDS = {
    "starcoder": (starcoder, "<fim_prefix> P <fim_suffix> S <fim_middle>", "<fim_prefix> <fim_suffix> S <fim_middle> P", "<|endoftext|> <fim_pad> <file_sep>"),
    "demo": (demo, "<fim_prefix> P <fim_suffix> S <fim_middle>", "<fim_prefix> <fim_suffix> S <fim_middle> P", "<|endoftext|>"),
    "qwen": (qwen, "<|fim_prefix|> P <|fim_suffix|> S <|fim_middle|>", None, "<|endoftext|> <|fim_pad|>"),
    "codellama": (codellama, "▁<PRE> P ▁<SUF> S ▁<MID>", "▁<PRE> ▁<SUF> S ▁<MID> P", "▁<EOT>"),
    "deepseek": (deepseek, "<｜fim▁begin｜> P <｜fim▁hole｜> S <｜fim▁end｜>", None, ""),
}


@pytest.fixture(params=KINDS)
def kind(request, tmp_path):
    KINDS[request.param][0](tmp_path)
    return (Vocab.load(tmp_path), *KINDS[request.param][1:])


def test_templates(kind):
    vocab, psm, spm, ends = kind

    def ids(names):
        return [PREFIX if n == "P" else SUFFIX if n == "S" else vocab.token_id(n) for n in names.split()]

    assert None not in ids(psm) and fim_template(vocab) == fim_template(vocab, "psm") == (ids(psm), ids(ends))
    if spm:
        assert fim_template(vocab, "spm") == (ids(spm), ids(ends))
    else:
        with pytest.raises(ValueError, match="fim_mode is 'spm'; models of this kind .* are trained for 'psm' only"):
            fim_template(vocab, "spm")
    marks = {i for i in ids(psm) if i >= 0}
    assert all(vocab.token_bytes[i] == b"" or i in vocab.never_text for i in marks)
    with pytest.raises(ValueError, match="fim_mode is 'mps'; expected one of psm, spm"):
        fim_template(vocab, "mps")


def test_prompt_is_prefix_and_suffix(kind):
    vocab, _, spm, _ = kind
    p = make_prompt(vocab, BEFORE, suffix=BEHIND)
    o = vocab.encode_open(BEFORE)
    assert (p.ids, p.typed, p.typed_ids) == (o.ids, o.typed, o.typed_ids) and vocab.decode(p.suffix) == BEHIND.encode()
    ids, *lost = assemble(p, 1000)
    assert lost == [0, 0] and ids == [i for t in p.template for i in (p.ids if t == PREFIX else p.suffix if t == SUFFIX else [t])]
    plain = make_prompt(vocab, BEFORE, suffix=BEHIND.encode(), token_healing=False)
    assert (plain.ids, plain.typed, plain.suffix) == (vocab.encode(BEFORE), b"", p.suffix)
    # nothing in front of the cursor, or only a piece of a word: the template's tokens are enough to start from
    assert assemble(make_prompt(vocab, "", suffix=BEHIND), 1000)[0] == [t for u in p.template if u != PREFIX for t in (p.suffix if u == SUFFIX else [u])]
    piece = make_prompt(vocab, "d", suffix=BEHIND)
    assert vocab.decode(piece.ids) + piece.typed in (b"d", b" d")
    if piece.typed:
        assert piece.ids == []


def test_without_a_suffix_there_is_no_template(kind):
    vocab = kind[0]
    assert make_prompt(vocab, BEFORE, suffix="").template == [] and make_prompt(vocab, BEFORE).end_ids == []


def test_a_model_without_the_tokens_refuses(tmp_path):
    byte_level(tmp_path, ("<|endoftext|>", "<fim_prefix>", "<fim_suffix>"))  # no middle
    vocab = Vocab.load(tmp_path)
    with pytest.raises(ValueError, match="suffix is given, but the model has no tokens for fill in the middle"):
        make_prompt(vocab, "a", suffix="b")
    with pytest.raises(ValueError, match="suffix is given"), fake_engine() as e:
        e.generate([1, 2], suffix=[3])


@pytest.mark.parametrize("room, prefix, suffix", [
    (100, (0, 20), (0, 30)), (50, (0, 20), (0, 30)), (40, (0, 20), (0, 20)), (30, (0, 20), (0, 10)), (24, (2, 20), (0, 6)),
    (8, (14, 20), (0, 2)), (1, (19, 20), (0, 0)), (0, (20, 20), (0, 0)), (-5, (20, 20), (0, 0))])
def test_cut_to_fit(room, prefix, suffix):
    """The prefix loses its beginning, the suffix its end; a quarter of the room is the suffix's."""
    p = Prompt(range(100, 120), suffix=range(200, 230), template=[7, PREFIX, 8, SUFFIX, 9])
    ids, lost_prefix, lost_suffix = assemble(p, room)
    assert ids == [7, *range(100 + prefix[0], 100 + prefix[1]), 8, *range(200 + suffix[0], 200 + suffix[1]), 9]
    assert (lost_prefix, lost_suffix) == (prefix[0], 30 - suffix[1])


def test_cut_to_fit_short_suffix():
    p = Prompt(range(100), suffix=range(200, 203), template=[SUFFIX, PREFIX])
    assert assemble(p, 40) == ([*range(200, 203), *range(63, 100)], 63, 0)
    assert assemble(Prompt(range(100)), 10) == ([*range(100)], 0, 0)  # refused by the engine, not cut


def test_through_the_engine():
    """Counts, the lengths that fit exactly, end tokens of the middle, typed bytes."""
    with fake_engine(max_len=64, pages=2) as e:
        p = Prompt([1] * 100, b"bb", [1], [2] * 40, [60, PREFIX, 61, SUFFIX, 62], [5])
        r = e.generate(p, max_tokens=20, ignore_eos=True, include_typed=True)
        assert r.text.startswith("bb") and r.num_truncated_tokens == (100 - 30, 40 - 9)
        assert r.num_input_tokens == 3 + 30 + 9 + 1 and r.finish_reason == "length" and r.num_output_tokens == 20
        with pytest.raises(ValueError, match="max_tokens is 62; expected at most"):
            e.generate(p, max_tokens=62)
        box, ends = Outbox(), set()
        uids = [e.submit(Prompt([3], b"", (), [4], [60, PREFIX, 61, SUFFIX, 62], list(range(1, 40))), outbox=box, max_tokens=10, seed=s) for s in range(20)]
        while len(ends) < len(uids):
            ends |= {(c.uid, c.finish_reason) for c in box.poll(10) if c.finish_reason}
        assert sum(reason == "eos" for _, reason in ends) > 15
    assert len(letters()) == 64


def test_stop_words_of_the_predecessor_and_of_special_tokens(tmp_path):
    """Sequences of token ids are the text that they are; a special token, by name or id, ends the text where it comes."""
    byte_level(tmp_path, ("<|endoftext|>",))
    vocab = Vocab.load(tmp_path)
    native = fake_engine(vocab=len(vocab), token_bytes=vocab.token_bytes)._native
    with Engine._of(native, vocab) as e:
        options = dict(max_tokens=200, ignore_eos=True)
        seed = next(s for s in range(50) if 0 in e.generate([5, 6], seed=s, **options).token_ids)
        free = e.generate([5, 6], seed=seed, **options).token_ids.tolist()
        for stop in (["<|endoftext|>"], [[0]], [b"nev\xffer", (0,)]):
            ended = e.generate([5, 6], seed=seed, stop=stop, **options)
            assert ended.finish_reason == "eos" and ended.token_ids.tolist() == free[: free.index(0)]
        word = free[:2]
        cut = e.generate([5, 6], seed=seed, stop=[word], **options)
        assert cut.stop_reason == vocab.decode(word).decode("utf-8", "replace") and cut.num_output_tokens == 0
        banned = e.generate([5, 6], seed=seed, bad_words=[[0], word], **options).token_ids
        assert 0 not in banned and vocab.decode(word) not in vocab.decode(banned)
        for words, said in ([5], r"stop\[0\] is 5; expected text or the token ids of one"), ([[0, 5]], r"stop\[0\] is \[0, 5\]; expected one token"):
            with pytest.raises(ValueError, match=said):
                e.generate([5, 6], stop=words)
