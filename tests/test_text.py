"""The text cut: released pieces against a plain search over the finished text, on bytes and across token boundaries."""
import random

import pytest
from codefuse_triton import _native



def cut_text(*args, **options):
    """[(ids, text)] of the pieces; the stop string found."""
    pieces, matched, _ = _native.testing.cut_text(*args, **options)
    return [(ids, text) for ids, text, _ in pieces], matched


def plain_end(text: bytes, stops: list[bytes], min_bytes: int = 0):
    """(start, end) of the occurrence that ends first after min_bytes, the longest of those that end there; or None."""
    for end in range(min_bytes + 1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            return end - len(max(found, key=len)), end
    return None


def well_formed_prefix(tail: bytes) -> bool:
    """tail is the beginning of a UTF-8 sequence, and not a whole one."""
    try:
        tail.decode()
        return False
    except UnicodeDecodeError as e:
        return e.reason == "unexpected end of data" and e.start == 0


def is_boundary(text: bytes) -> bool:
    return not any(well_formed_prefix(text[-n:]) for n in (1, 2, 3) if n <= len(text))


def check(tokens: list[bytes], stops=(), include_stop=False, min_tokens=0):
    stops = list(stops)
    pieces, matched = cut_text(tokens, stops, include_stop, min_tokens)
    whole = b"".join(tokens)
    found = plain_end(whole, stops, len(b"".join(tokens[:min_tokens])))
    end = len(whole) if found is None else found[include_stop]
    text = b"".join(p[1] for p in pieces)
    assert text == whole[:end], (tokens, stops)
    assert matched == (whole[found[0]:found[1]] if found else b"")
    # the ids are the tokens, in order; those that lie behind the cut are not there
    ids = [i for p in pieces for i in p[0]]
    assert ids == list(range(len(ids)))
    starts = [len(b"".join(tokens[:i])) for i in range(len(tokens))]
    if found:  # no token after the one in which the stop string ends
        starts = [s for s in starts if s < found[1]]
        kept = [s < end or s == end and not t for s, t in zip(starts, tokens)]
        assert len(ids) == [*kept, False].index(False)
    else:
        assert len(ids) == len(tokens)
    # pieces but the last are whole tokens; all but the last end between characters, and decoding them apart changes nothing
    for piece_ids, piece_text in pieces[:-1]:
        assert piece_text == b"".join(tokens[i] for i in piece_ids)
    assert "".join(p[1].decode("utf-8", "replace") for p in pieces) == text.decode("utf-8", "replace")
    return pieces


def held_back(tokens, stops=()):
    """Tokens still held after all were pushed, before the end: what the last piece had to add."""
    pieces, _ = cut_text(list(tokens), list(stops))
    return b"".join(tokens[i] for i in pieces[-1][0])


def test_every_token_goes_out_at_once():
    assert check([b"def", b" f", b"(", b")"]) == [([0], b"def"), ([1], b" f"), ([2], b"("), ([3], b")"), ([], b"")]


def test_character_in_pieces_waits():
    assert check([b"a", b"\xe2", b"\x82", b"\xac", b"b"]) == [([0], b"a"), ([1, 2, 3], "€".encode()), ([4], b"b"), ([], b"")]
    assert check([b"x\xf0\x9f", b"\x98\x80y"]) == [([0, 1], b"x\xf0\x9f\x98\x80y"), ([], b"")]
    assert check([b"a", b"\xf0\x9f\x98"]) == [([0], b"a"), ([1], b"\xf0\x9f\x98")]  # never completed


@pytest.mark.parametrize("bad", [b"\x80", b"\xff", b"\xc0", b"\xc1", b"\xf5", b"\xe0\x80", b"\xed\xa0", b"\xf4\x90", b"\xf0\x80", b"\xe2\x41", b"\xf0\x9f\x41"])
def test_ill_formed_bytes_are_not_held(bad):
    assert held_back([bytes([b]) for b in bad]) == b""
    check([bytes([b]) for b in bad + b"ok"])


def test_hold_is_three_bytes_at_most():
    rng = random.Random(3)
    alphabet = [0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xED, 0xEF, 0xF0, 0xF1, 0xF4, 0xF5, 0xFF]
    for _ in range(3000):
        text = bytes(rng.choices(alphabet, k=rng.randint(1, 8)))
        tokens = [bytes([b]) for b in text]
        held = held_back(tokens)
        assert len(held) <= 3
        assert (held == b"") == is_boundary(text)
        check(tokens)


def test_boundary_holds_for_every_two_bytes():
    for a in range(256):
        for b in range(256):
            text = bytes([a, b])
            assert (held_back([bytes([a]), bytes([b])]) == b"") == is_boundary(text)


def test_stop_is_cut_out_and_its_beginning_is_held():
    assert check([b"a\n", b"\n", b"b"], [b"\n\n"]) == [([0], b"a")]
    assert check([b"a", b"\n", b"c", b"\n", b"\nd"], [b"\n\n"]) == [([0], b"a"), ([1, 2], b"\nc"), ([], b"")]
    assert check([b"ab", b"cd", b"ef"], [b"bcde"]) == [([0], b"a")]
    assert check([b"ab", b"cd", b"ef"], [b"bcde"], include_stop=True) == [([0, 1, 2], b"abcde")]
    assert check([b"stop", b"x"], [b"stop"]) == [([], b"")]


def test_first_end_wins_then_the_longest():
    assert cut_text([b"abcd"], [b"abcd", b"bc"]) == ([([0], b"a")], b"bc")
    assert cut_text([b"xabc"], [b"c", b"bc", b"abc"]) == ([([0], b"x")], b"abc")
    assert cut_text([b"a", b"b", b"c"], [b"ab", b"abc"])[1] == b"ab"


def test_stop_may_be_inside_a_character():
    assert check(["é".encode()], [b"\xa9"]) == [([0], b"\xc3")]


def test_min_tokens_skips_early_stops():
    assert check([b"x", b"x", b"a", b"x"], [b"x"], min_tokens=2) == [([0], b"x"), ([1], b"x"), ([2], b"a"), ([], b"")]
    assert check([b"x", b"x", b"x"], [b"xx"], min_tokens=2)  # begins before, ends after
    assert check([b"x", b"x"], [b"x"], min_tokens=5)[-1][1] in (b"", b"x")


def test_tokens_without_bytes():
    pieces = check([b"a", b"", b"\xc3", b"", b"\xa9"])
    assert [p[0] for p in pieces] == [[0], [1], [2, 3, 4], []]
    assert cut_text([], []) == ([([], b"")], b"")


@pytest.mark.parametrize("kind", ["ascii", "unicode", "bytes"])
def test_random_text(kind):
    rng = random.Random(kind)
    alphabet = {"ascii": [b"a", b"b", b"\n"], "unicode": [c.encode() for c in "aé€😀ß"], "bytes": [bytes([b]) for b in (0x61, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F)]}[kind]
    for _ in range(15000):
        text = b"".join(rng.choices(alphabet, k=rng.randint(0, 30)))
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 12)))
        tokens = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        stops = []
        for _ in range(rng.randint(0, 5)):
            if text and rng.random() < 0.5:  # from the text itself
                at = rng.randrange(len(text))
                stops.append(text[at:at + rng.randint(1, 8)])
            else:
                stops.append(b"".join(rng.choices(alphabet, k=rng.randint(1, 5))))
        check(tokens, stops, rng.random() < 0.5, rng.choice([0, 0, 1, 3, 9]))


def test_many_long_stops():
    rng = random.Random(9)
    stops = [bytes(rng.choices(b"ab", k=rng.randint(12, 60))) for _ in range(500)]
    text = bytes(rng.choices(b"ab", k=3000)) + stops[7] + b"ababab"
    check([text[i:i + 3] for i in range(0, len(text), 3)], stops)


def test_only_what_could_become_a_stop_is_held():
    # "ab" ends no stop string and begins none: nothing is held though an ignored match just ended
    assert held_back([b"a", b"b"], [b"bc"]) == b"b"
    assert held_back([b"a", b"b"], [b"abc", b"x"]) == b"ab"
    pieces, _ = cut_text([b"x", b"y"], [b"x"], False, 1)
    assert pieces == [([0], b"x"), ([1], b"y"), ([], b"")]


# ---- typed bytes at the beginning -------------------------------------------------------------------------------------


def test_typed_bytes_are_no_text():
    pieces, matched, counted = _native.testing.cut_text([b"re", b"t", b"urn x", b"\n"], [], typed=4)
    assert pieces == [([2], b"rn x", 1), ([3], b"\n", 0), ([], b"", 0)] and counted == 2 and matched == b""
    pieces, _, counted = _native.testing.cut_text([b"re", b"t", b"urn x"], [], typed=4, include_typed=True)
    assert pieces == [([0], b"re", 0), ([1], b"t", 0), ([2], b"urn x", 0), ([], b"", 0)] and counted == 1
    assert _native.testing.cut_text([b"ab"], [], typed=2) == ([([], b"", 0)], b"", 0)


def test_stops_are_looked_for_behind_what_was_typed():
    assert _native.testing.cut_text([b"(", b")x"], [b"()", b"("], typed=1) == ([([1], b")x", 0), ([], b"", 0)], b"", 1)
    assert _native.testing.cut_text([b"a\n\n"], [b"\n"], typed=2) == ([([], b"", 0)], b"\n", 1)
    assert _native.testing.cut_text([b"a\nb", b"c"], [b"c"], typed=2) == ([([0], b"b", 2), ([], b"", 0)], b"c", 2)


def test_random_typed_bytes():
    rng = random.Random(11)
    for _ in range(5000):
        text = b"".join(rng.choices([b"a", b"b", b"\n", "é".encode(), "€".encode()], k=rng.randint(1, 20)))
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 8)))
        tokens = [t for t in (text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])) if t]
        typed = len(text.decode()[: rng.randint(0, len(text.decode()))].encode())
        stops = [text[i:i + 2] for i in rng.choices(range(len(text)), k=2)]
        found = plain_end(text[typed:], stops)
        end = len(text) if found is None else typed + found[0]
        for include in (False, True):
            pieces, matched, counted = _native.testing.cut_text(tokens, stops, typed=typed, include_typed=include)
            assert b"".join(p[1] for p in pieces) == text[0 if include else typed:end]
            for ids, piece, skipped in pieces:
                joined = b"".join(tokens[i] for i in ids)
                assert joined[skipped:].startswith(piece) and (skipped == 0 or ids is pieces[0][0] or ids == next(p[0] for p in pieces if p[0]))
            ends = [len(b"".join(tokens[:i + 1])) for i in range(len(tokens))]
            last = len(text) if found is None else typed + found[1]
            assert counted == sum(typed < e and e - len(t) < last for e, t in zip(ends, tokens))
