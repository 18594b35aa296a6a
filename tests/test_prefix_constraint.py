"""The prefix constraint against its definition: which tokens keep the text on the way to the bytes that it must begin with."""
import random

import pytest
from codefuse_triton import _native

Spelling = _native.testing.Spelling


def spelling(tokens, text, never=(), vocab=None):
    return Spelling(list(tokens), list(never), len(tokens) if vocab is None else vocab, text)


def plain_spells(tokens, text):
    """[len(text) + 1] whether tokens in a row spell text[i:], the last of them possibly more."""
    ok = [False] * len(text) + [True]
    for i in reversed(range(len(text))):
        rest = text[i:]
        ok[i] = any(t and (t.startswith(rest) or rest.startswith(t) and ok[i + len(t)]) for t in tokens)
    return ok


def plain_allowed(tokens, text, ok):
    return [i for i, t in enumerate(tokens) if t and (t.startswith(text) or text.startswith(t) and ok[len(t)])]


def test_tokens_that_are_or_begin_or_continue_the_bytes():
    tokens = [b"", b"r", b"re", b"ret", b"return", b"retry", b"x", b"et", b"t", b"ret"]
    s = spelling(tokens, b"ret")
    assert s.possible and not s.done and s.left == 3
    assert s.allowed() == [1, 2, 3, 4, 5, 9]  # "r" because "et" follows, both "ret"
    s.next(1)
    assert s.allowed() == [7] and s.left == 2
    s.next(7)
    assert s.done and s.left == 0
    s = spelling(tokens, b"ret")
    s.next(4)
    assert s.done


def test_no_dead_end():
    tokens = [b"a", b"ab", b"cd", b"abcde"]
    assert spelling(tokens, b"abc").allowed() == [1, 3]  # after "a" nothing begins with "b"
    assert not spelling(tokens, b"abx").possible
    assert not spelling([b""], b"a").possible
    assert not spelling(tokens, b"abcdx").possible
    assert spelling(tokens, b"").done and spelling(tokens, b"").possible


def test_what_is_never_text():
    tokens = [b"<", b"<fim>", b"f", b"<f", b"beyond"]
    assert spelling(tokens, b"<").allowed() == [0, 1, 3]
    assert spelling(tokens, b"<", never=[1, -1, 99]).allowed() == [0, 3]
    assert not spelling(tokens, b"b", vocab=4).possible


@pytest.mark.parametrize("alphabet", [b"ab", bytes([0x00, 0x20, 0x7F, 0x80, 0xFF])])
def test_random_vocabularies(alphabet):
    rng = random.Random(alphabet)
    for _ in range(1500):
        tokens = [bytes(rng.choices(alphabet, k=rng.choice([0, 1, 1, 2, 2, 3, 5]))) for _ in range(rng.randint(1, 14))]
        never = {i for i in range(len(tokens)) if rng.random() < 0.1}
        usable = [b"" if i in never else t for i, t in enumerate(tokens)]
        text = bytes(rng.choices(alphabet, k=rng.randint(1, 9)))
        ok = plain_spells(usable, text)
        s = spelling(tokens, text, never)
        assert s.possible == ok[0]
        at = 0
        while s.possible and not s.done:
            allowed = s.allowed()
            assert allowed == plain_allowed(usable, text[at:], ok[at:]) != []
            token = rng.choice(allowed)
            s.next(token)
            at += len(tokens[token])
            assert s.left == max(0, len(text) - at) and s.done == (at >= len(text))


def test_all_bytes_spell_everything():
    tokens = [bytes([b]) for b in range(256)] + [b"ab", b"  ", "é".encode()]
    rng = random.Random(1)
    for _ in range(200):
        text = bytes(rng.choices(range(256), k=rng.randint(1, 40)))
        s, out = spelling(tokens, text), b""
        while not s.done:
            token = rng.choice(s.allowed())
            s.next(token)
            out += tokens[token]
        assert out.startswith(text)


def test_a_large_vocabulary_is_ready_at_once():
    rng = random.Random(2)
    tokens = [bytes(rng.choices(b"abcdefgh ", k=rng.randint(1, 9))) for _ in range(150_000)]
    s = spelling(tokens, b" ab")
    want = [i for i, t in enumerate(tokens) if t.startswith(b" ab") or t in (b" ", b" a")]
    assert s.allowed() == want
