"""The client without a server: options to tensors, what is refused here, the flags of codefuse-client."""
from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

protocol = pytest.importorskip("codefuse_triton_client.protocol")
from codefuse_triton_client import InvalidRequest, Result, Timings, TopToken, cli  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def sent(**options: Any) -> dict[str, tuple[str, list[int], bytes]]:
    request = protocol.make_request("ensemble", "x", stream=True, options=options)
    return {t.name: (t.datatype, list(t.shape), raw) for t, raw in zip(request.inputs, request.raw_input_contents)}


def test_options_as_tensors() -> None:
    tensors = sent(max_tokens=3, stop=["a", b"\xff"], logit_bias={7: -1.5}, stop_at="line", seed=None, bad_words=[])
    assert tensors["max_tokens"] == ("INT32", [1, 1], b"\3\0\0\0")
    assert tensors["stop_words"] == ("BYTES", [1, 2], b"\1\0\0\0a\1\0\0\0\xff")
    assert tensors["logit_bias"][2][4:] == b'{"7": -1.5}' and tensors["stop_at"][1] == [1, 1]
    assert set(tensors) == {"text_input", "stream", "max_tokens", "stop_words", "logit_bias", "stop_at"}


@pytest.mark.parametrize("given, said", [
    (dict(stop=[5]), "stop_words is 5; expected text"), (dict(suffix=["a", "b"]), "suffix has 2 values; expected one"),
    (dict(session="a\udcff"), "session has a lone surrogate at character 1"), (dict(max_tokens="3"), "max_tokens is '3'; expected a number"),
    (dict(max_tokens=2**31), "max_tokens is 2147483648; expected an integer between"), (dict(ignore_eos=1), "ignore_eos is 1; expected true or false"),
    (dict(temperature=1e39), "temperature is 1e+39; expected a number between -3.40282e+38 and 3.40282e+38"), (dict(temperature=1 << 20000), "temperature is an integer of 20001 bits"), (dict(max_tokens=1 << 20000), "max_tokens is an integer of 20001 bits"),
    (dict(seed=-1), "random_seed is -1"), (dict(temperature=[0.1, 0.2]), "temperature has 2 values")],
    ids=lambda value: value if isinstance(value, str) else "")
def test_refused_here(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(said)):
        sent(**given)


def test_text_that_is_no_text() -> None:
    for prompt in ("a\ud800", 5, None):
        with pytest.raises(InvalidRequest, match="text_input (has a lone surrogate at character 1|is .*); expected text"):
            protocol.make_request("ensemble", prompt, stream=True, options={})
    for name, request in (("model", dict(model="\udcff")), ("request_id", dict(model="m", request_id="\udcff"))):
        with pytest.raises(InvalidRequest, match=f"{name} has a lone surrogate"):
            protocol.make_request(prompt="x", stream=True, options={}, **request)


GIVEN = {"INT32": ("3", 3), "UINT64": ("18446744073709551615", 2**64 - 1), "FP32": ("0.5", 0.5), "BYTES": ("é", "é")}


@pytest.mark.parametrize("keyword", protocol.OPTIONS)
def test_every_option_has_a_flag(keyword: str) -> None:
    option, flag = protocol.OPTIONS[keyword], "--" + keyword.replace("_", "-")
    if keyword in cli.NO_FLAG:
        assert cli.NO_FLAG[keyword] in cli.parser().format_help() and flag not in cli.parser().format_help()
        return
    if option.type == "BOOL":
        for arguments, value in (([], None), ([flag], True), ([flag.replace("--", "--no-", 1)], False)):
            assert getattr(cli.parser().parse_args(["x", *arguments]), keyword) is value
        return
    text, value = GIVEN[option.type]
    assert getattr(cli.parser().parse_args(["x", flag, text] + [flag, text] * option.many), keyword) == ([value, value] if option.many else value)
    assert getattr(cli.parser().parse_args(["x"]), keyword) == (128 if keyword == "max_tokens" else None)


class FakeClient:
    calls: list[tuple[Any, dict[str, Any]]] = []

    def __init__(self, url: str, *, model: str) -> None:
        pass

    def __enter__(self) -> FakeClient:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def complete_all(self, prompt: Any, *, timeout_s: float | None, **options: Any) -> list[Result]:
        self.calls.append((prompt, options))
        return [Result(f"text {i} é", "length", token_ids=(5, 6), log_probs=(-0.25, -1.5), num_output_tokens=2, timings=Timings(decode_s=0.5),
                       top=((TopToken(5, " a", -0.25),), (TopToken(7, "b", -1.0),))) for i in range(options["n"] or 1)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    monkeypatch.setattr(cli, "Client", FakeClient)
    monkeypatch.setattr(FakeClient, "calls", [])
    return FakeClient.calls


def test_several_answers(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["def f", "--n", "2", "--top-logprobs", "1", "--bad-words", "os", "--echo", "--no-token-healing"]) == 0
    out, errors = capsys.readouterr()
    assert out == "--- answer 0\ntext 0 é\n--- answer 1\ntext 1 é\n"
    assert errors.splitlines()[:2] == ["       5   -0.2500  ' a' -0.2500", "       6   -1.5000  'b' -1.0000"] and len(errors.splitlines()) == 4
    (prompt, options), = calls
    assert prompt == "def f" and {k: v for k, v in options.items() if v is not None} == dict(
        max_tokens=128, n=2, top_logprobs=1, bad_words=["os"], token_healing=False, exclude_input=False)


def test_json(calls: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert cli.main(["--json", "--n", "2", "--stats"]) == 0
    out, errors = capsys.readouterr()
    answers = [json.loads(line) for line in out.splitlines()]
    assert [a["text"] for a in answers] == ["text 0 é", "text 1 é"] and answers[0]["top"][1] == [{"id": 7, "text": "b", "log_prob": -1.0}]
    assert errors.count("2 out") == 2 and calls[0][0] == b"caf\xe9"  # the server refuses it by name


@pytest.mark.parametrize("arguments, said", [([b"x", b"--stop", b"a\xff"], "argument --stop: not UTF-8: byte 0xff at offset 1"), ([b"\xe9"], "argument prompt: not UTF-8: byte 0xe9 at offset 0"),
                                             ([b"x", b"--model", b"\xe9"], "argument --model: not UTF-8"), ([b"x", b"--timeout", b"nan"], "argument --timeout: nan; expected a number above 0"),
                                             ([b"x", b"--top-k", b"many"], "argument --top-k: invalid int value: 'many'")], ids=str)
def test_bad_arguments(arguments: list[bytes], said: str) -> None:
    result = subprocess.run([os.fsencode(sys.executable), b"-m", b"codefuse_triton_client.cli", *arguments], capture_output=True, env={**os.environ, "PYTHONUTF8": "1"})
    assert result.returncode == 2 and said in result.stderr.decode().splitlines()[-1] and result.stdout == b"" and len(result.stderr.splitlines()) == 2


def test_utf8_in_another_locale() -> None:
    code = "import sys; from codefuse_triton_client import cli; print(ascii(cli.parser().parse_args().prompt), sys.getfilesystemencoding())"
    result = subprocess.run([os.fsencode(sys.executable), b"-c", code.encode(), "café 快".encode()], capture_output=True,
                            env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert result.stdout == b"'caf\\xe9 \\u5feb' ascii\n", result
