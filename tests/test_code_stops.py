"""Where code that was asked for in part ends: against a plain search over the finished text, and by example."""
import random
import re

import pytest
from codefuse_triton import _native

NAMES = {name: 1 << i for i, name in enumerate(("line", "block", "bracket", "suffix", "repetition"))}


def cut(text, at, before="", after="", include_stop=False, tokens=None, **options):
    """(the text as streamed, what ended it)."""
    tokens = tokens or [bytes([b]) for b in text.encode()]
    flags = sum(NAMES[name] for name in at.split())
    pieces, matched, _ = _native.testing.cut_text(tokens, [], include_stop, stop_at=flags, before=before.encode(), after=after.encode(), **options)
    return b"".join(p[1] for p in pieces).decode(), matched.decode()


def show(before, text, at, **options):
    return cut(text, at, before, **options)[0]


# ---- the definitions over the finished text ---------------------------------------------------------------------------


def plain_line(before, text):
    match = re.search(r"\r?\n", text)
    return match and match.start()


class Depth:
    def __init__(self):
        self.quote, self.escaped = "", False

    def next(self, c):
        if c == "\n":
            self.quote, self.escaped = "", False
        if self.quote:
            if not self.escaped and c == self.quote:
                self.quote = ""
            self.escaped = c == "\\" and not self.escaped
            return 0
        if c in "'\"`":
            self.quote = c
        return (c in "([{") - (c in ")]}")


def scan(before, text):
    """([depth before each character of text, of brackets opened in text], [whether it closes one of before])."""
    state, outer, inner, depths, closes = Depth(), 0, 0, [], []
    for c in before:
        outer = max(0, outer + state.next(c))
    for c in text:
        depths.append(inner)
        change = state.next(c)
        closes.append(change < 0 and inner == 0 and outer > 0)
        if closes[-1]:
            outer -= 1
        else:
            inner = max(0, inner + change)
    return depths, closes


def plain_bracket(before, text):
    closes = scan(before, text)[1]
    return closes.index(True) if True in closes else None


def columns(line):
    return len(line[: len(line) - len(line.lstrip(" \t"))].expandtabs(8))


def plain_block(before, text):
    """For code without comments: lines against the line that heads the block."""
    depths = scan(before, text)[0]
    lines_before, cursor = before.split("\n")[:-1], before.split("\n")[-1]
    above = next((line for line in reversed(lines_before) if line.strip()), None)
    heading, typed = None, columns(cursor)
    if cursor.strip():
        heading = "cursor"
    elif above is not None and not (typed == 0 and not lines_before[-1].strip()):
        if 0 < typed < columns(above):
            heading = (typed, False, False)
        else:
            last = above.strip()[-1]
            heading = (columns(above), last in ":{", last == "{")
    at, end = 0, 0
    for number, line in enumerate(text.split("\n")):
        whole = cursor + line if number == 0 else line
        bare = whole.rstrip("\r")
        if whole.strip():
            if heading is None or heading == "cursor":
                last = whole.strip()[-1]
                heading = (columns(whole), last in ":{", last == "{")
            elif not (number == 0 and cursor.strip()):
                base, deeper, braced = heading
                first = whole.strip()[0]
                open_ = depths[at + len(line) - len(line.lstrip())]
                closer = first in ")]}" and columns(whole) == base and open_ == 0
                if open_ == 0 and not (braced and closer) and (columns(whole) <= base if deeper else columns(whole) < base):
                    return end
                if closer:
                    heading = (base, deeper, False)
            end = max(0, at + len(line) - (len(whole) - len(bare)))
        at += len(line) + 1
    return None


PLAIN = {"line": plain_line, "bracket": plain_bracket, "block": plain_block}
LINES = ["x = 1", "if a:", "for (;;) {", "}", "return f(", ")", "])", "s = 'it(s'", "", "", "y[0] = {", "} else {", "call('\\'')", "don't"]


def random_code(rng):
    return "".join(rng.choice(["", "", "    ", "    ", "        ", "\t"]) + rng.choice(LINES) + rng.choice(["\n", "\n", "\n", "\r\n"]) for _ in range(rng.randint(1, 9)))


@pytest.mark.parametrize("name", PLAIN)
def test_random_code(name):
    rng, ended = random.Random(name), 0
    for _ in range(6000):
        code = random_code(rng)
        at = rng.randint(0, len(code))
        before, text = code[:at], code[at:]
        end = PLAIN[name](before, text)
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 6)))
        tokens = [text[a:b].encode() for a, b in zip([0, *cuts], [*cuts, len(text)])]
        got, reason = cut(text, name, before, tokens=tokens)
        assert got == (text if end is None else text[:end]), (before, text)
        assert reason == ("" if end is None else f"stop_at:{name}")
        ended += end is not None
    assert ended > 1000


# ---- by example -----------------------------------------------------------------------------------------------------------


def test_line():
    assert cut("a + b\r\n\nc", "line") == ("a + b", "stop_at:line")
    assert cut("a\rb\n", "line") == ("a\rb", "stop_at:line")
    assert cut("a + b\r\nc", "line", include_stop=True)[0] == "a + b\r\n"
    assert cut("a + b", "line") == ("a + b", "")
    assert cut("\nx", "line") == ("", "stop_at:line")


def test_block_of_python():
    body = "    if n < 2:\n        return n\n\n    return fib(n - 1)"
    for before in ("def fib(n):\n", "class A:\n  pass\n\ndef fib(n):\n", "def fib(n): # of n:\n"):
        assert show(before, body + "\n\n\ndef g():\n    pass\n", "block") == body
    assert show("def fib(n):\n    ", body[4:] + "\n\nprint()", "block") == body[4:]
    assert show("def fi", "b(n):\n" + body + "\nx = 1\n", "block") == "b(n):\n" + body
    assert show("def f():\n    x = fo", "o()\n    return x\n\ny = 2\n", "block") == "o()\n    return x"
    assert show("        x = 1\n    ", "y = 2\n    z\nw", "block") == "y = 2\n    z"
    assert show("    return x\n\n\n", "def g():\n    return 1\n\n\ndef h():", "block") == "def g():\n    return 1"
    assert show("    return x\n", "def g():\n", "block") == ""
    assert show("def f(\n    a", ",\n    b):\n    return a\nx", "block") == ",\n    b):\n    return a"
    assert show("def f():\n", "    x = '''\n    y'''  # a:\n    z\nw", "block") == "    x = '''\n    y'''  # a:\n    z"
    assert show("def f():\n", "    x = [\n1, 2,\n]\n    z\nw", "block") == "    x = [\n1, 2,\n]\n    z"


def test_block_of_braces():
    assert show("int f() {\n", "  return 1;\n}\n\nint g() {", "block") == "  return 1;\n}"
    assert show("int f() {", "\n  if (x) {\n    y();\n  } else {\n    z();\n  }\n}\nint g;", "block") == "\n  if (x) {\n    y();\n  } else {\n    z();\n  }\n}"
    assert show("  while (x) { // {\n", "    y();\n  }\n  z();\n", "block") == "    y();\n  }"
    assert show("  if (a) {\n    x", "();\n    y();\n  }\n", "block") == "();\n    y();"


def test_block_with_stop_has_the_blank_lines():
    assert show("def f():\n", "    a\n\n\nb", "block", include_stop=True) == "    a\n\n\n"


def test_bracket():
    assert cut("a, g(b), 'x)'); y()", "bracket", "f(") == ("a, g(b), 'x)'", "stop_at:bracket")
    assert show("if (a[i", "] > f(x)) {", "bracket") == ""
    assert show("f('(", "' + (1))", "bracket") == "' + (1)"
    assert show("f(x)\n", "g(y)) + 1", "bracket") == "g(y)) + 1"  # nothing is open
    assert show("f(", "a) b", "bracket", include_stop=True) == "a)"


def test_suffix():
    suffix = "\n    return x\n\ndef g():\n"
    assert cut("y\n    return x\n", "suffix", after=suffix) == ("y", "stop_at:suffix")
    assert cut("y\n    return y\n", "suffix", after=suffix) == ("y\n    return y\n", "")
    assert show("", "a) b)", "suffix", after=")") == "a) b)"  # too little to tell
    assert show("", "a)\n  foo()\nb", "suffix", after=")\n  foo()\n") == "a"
    assert show("", "a)\n  foo()\nb", "suffix", after=")\n  foo()\n", include_stop=True) == "a)\n  foo()"


def test_repetition():
    line = "self.assertEqual(a, b)\n"
    text, reason = cut("x;" + line * 50, "repetition")
    assert reason == "stop_at:repetition" and text == ("x;" + line * 50)[:2 + 200]
    assert cut("-" * 199, "repetition")[1] == "" and cut("-" * 201, "repetition") == ("-" * 200, "stop_at:repetition")
    assert cut("".join(f"x{i} = {i}\n" for i in range(200)), "repetition")[1] == ""
    long = "".join(f"{i}," for i in range(130))  # 410 bytes
    assert len(cut(long * 9, "repetition")[0]) == 6 * len(long)
    assert cut("".join(f"{i}," for i in range(170)) * 9, "repetition")[1] == ""  # a longer unit is not looked for


def test_the_first_to_end_counts():
    assert cut("a)\n", "line bracket", "f(")[1] == "stop_at:bracket"
    assert cut("a\n)", "line bracket", "f(")[1] == "stop_at:line"
    pieces, matched, _ = _native.testing.cut_text([b"a", b"\n"], [b"\n"], stop_at=NAMES["line"])
    assert matched == b"\n" and pieces == [([0], b"a", 0), ([], b"", 0)]


def test_min_tokens():
    assert cut("a\nb\nc", "line", tokens=[b"a", b"\n", b"b", b"\n", b"c"], min_tokens=3) == ("a\nb", "stop_at:line")
    assert cut("a)b)c", "bracket", "f((", tokens=[b"a", b")", b"b)", b"c"], min_tokens=2) == ("a)b", "stop_at:bracket")


def test_nothing_is_held_without_need():
    """Pieces come token by token where no stop can cut them off."""
    def pieces(tokens, at, before=""):
        return [p[1] for p in _native.testing.cut_text(tokens, [], stop_at=NAMES[at], before=before.encode())[0]]

    assert pieces([b"a", b"\r", b"b", b"c"], "line") == [b"a", b"\rb"[:2], b"c", b""]
    assert pieces([b"  a", b"\n", b"\n", b"  ", b"b", b"\n", b"c"], "block", "f:\n") == [b"  a", b"\n\n  b", b""]
    assert pieces([b"a", b" ", b"b"], "block", "    x") == [b"a", b" ", b"b", b""]
    assert pieces([b"a", b"b"], "repetition") == [b"a", b"b", b""]


def test_random_code_with_several_stops():
    """What is found first ends the text, a stop string before places at the same byte; each cuts as it does alone."""
    rng, ended = random.Random(4), 0
    for _ in range(150):
        code = random_code(rng)
        at = rng.randint(0, len(code))
        before, text = code[:at], code[at:]
        stops = [s.encode() for s in rng.sample(["= ", "()", "\n\n", "])", "s = '", "retur"], 2)]
        include = rng.random() < 0.3

        def alone(text, flags, stops):
            pieces, matched, _ = _native.testing.cut_text([bytes([b]) for b in text.encode()], stops, include, stop_at=flags, before=before.encode())
            return b"".join(p[1] for p in pieces).decode(), matched.decode()

        first = []  # (bytes until it is found, what it makes of the text)
        for flags, strings in [(0, stops)] + [(NAMES[name], []) for name in ("line", "block", "bracket")]:
            size = next((n for n in range(len(text) + 1) if alone(text[:n], flags, strings)[1]), None)
            if size is not None:
                first.append((size, alone(text, flags, strings)))
        together = alone(text, NAMES["line"] | NAMES["block"] | NAMES["bracket"], stops)
        assert together == (min(first, key=lambda f: f[0])[1] if first else (text, "")), (before, text, stops)
        ended += bool(first)
    assert ended > 100
