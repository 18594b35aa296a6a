"""Completions at a cursor anywhere: inside a token, between two texts, up to where the code is complete."""
from __future__ import annotations

from pathlib import Path

import pytest
from codefuse_triton_client import Client, InvalidRequest
from serving_helpers import LONG, PlainStream, generate, generate_stream, tensor

from codefuse_triton import Vocab
from codefuse_triton.triton_server import TritonServer

TYPED = "import numpy as n"  # "np" is one token
BEFORE = "class Point:\n    def __init__(self, x, y):\n        self.x = "
BEHIND = "\n        self.y = y\n"


@pytest.fixture(scope="module")
def vocab(weights: Path) -> Vocab:
    return Vocab.load(weights)


def direct(server: TritonServer, vocab: Vocab, ids: list[int], *inputs: object, **parameters: object) -> bytes:
    stream = PlainStream(server, "generator", [tensor("input_ids", "INT32", ids), *inputs], parameters=parameters)
    (result,) = list(stream)
    stream.close()
    start, size = (int(result.as_numpy(name)[0][0]) for name in ("text_start", "text_bytes"))
    return vocab.decode(result.as_numpy("output_ids").reshape(-1).tolist())[start:start + size]


def test_a_prompt_inside_a_token(server: TritonServer, client: Client, vocab: Vocab) -> None:
    whole = client.complete(TYPED, max_tokens=8)
    assert whole.text.startswith("p\n") and whole.num_output_tokens == 8
    assert whole.num_input_tokens == len(vocab.encode(TYPED))
    assert "".join(c.text for c in client.stream(TYPED, max_tokens=8)) == whole.text
    assert generate(server, text_input=TYPED, max_tokens=8)["text_output"] == whole.text
    assert "".join(r["text_output"] for r in generate_stream(server, text_input=TYPED, max_tokens=8)) == whole.text
    typed = vocab.encode_open(TYPED)
    assert client.complete(TYPED, max_tokens=8, include_typed=True).text == typed.typed.decode() + whole.text
    assert client.complete(TYPED, max_tokens=8, exclude_input=False, include_typed=True).text == TYPED + whole.text
    assert direct(server, vocab, typed.ids, tensor("prefix_bytes", "BYTES", [typed.typed]), max_tokens=8) == whole.text.encode()


def test_healing_can_be_turned_off(server: TritonServer, client: Client, vocab: Vocab) -> None:
    healed = client.complete(TYPED, max_tokens=4).text
    plain = client.complete(TYPED, max_tokens=4, token_healing=False).text
    assert plain != healed and not plain.startswith("p\n")
    for fields in (dict(token_healing=False), dict(sampling_parameters='{"token_healing": false}')):
        assert generate(server, text_input=TYPED, max_tokens=4, **fields)["text_output"] == plain
    assert direct(server, vocab, vocab.encode(TYPED), max_tokens=4) == plain.encode()


def test_with_everything_else(client: Client) -> None:
    options = dict(max_tokens=12, temperature=0.9, top_p=0.95, seed=5, logprobs=True, stop=["\n"])
    result = client.complete(TYPED, **options)
    with client.stream(TYPED, **options) as stream:
        assert "".join(c.text for c in stream) == result.text
    assert stream.result.log_probs == result.log_probs and len(result.log_probs) == result.num_output_tokens
    assert "\n" not in result.text


def test_fill_in_the_middle(server: TritonServer, client: Client, vocab: Vocab) -> None:
    options = dict(max_tokens=24, stop=["\n"])
    spm = client.complete(BEFORE, suffix=BEHIND, fim_mode="spm", **options)
    assert spm.text == "x" and spm.num_truncated_tokens == (0, 0)
    assert spm.num_input_tokens == 3 + len(vocab.encode(BEFORE)) + len(vocab.encode(BEHIND))
    psm = client.complete(BEFORE, suffix=BEHIND, **options).text
    assert psm == client.complete(BEFORE, suffix=BEHIND, fim_mode="psm", **options).text != client.complete(BEFORE, max_tokens=24).text
    assert generate(server, text_input=BEFORE, suffix=BEHIND, fim_mode="spm", max_tokens=24, stop_words=["\n"])["text_output"] == "x"
    plain = client.complete(BEFORE, suffix=BEHIND, fim_mode="spm", token_healing=False, **options).text
    assert direct(server, vocab, vocab.encode(BEFORE), tensor("stop_words", "BYTES", [b"\n"]), tensor("suffix", "BYTES", [BEHIND.encode()]),
                  fim_mode="spm", max_tokens=24) == plain.encode()
    assert client.complete("", suffix=BEHIND, max_tokens=4).num_output_tokens > 0
    typed = client.complete(BEFORE[:-6], suffix=BEHIND, fim_mode="spm", **options)
    assert typed.text.startswith("f.")


def test_what_does_not_fit_is_cut_and_counted(client: Client) -> None:
    long, behind = "x = 1\n" * 2000, "y = 2\n" * 2000
    result = client.complete(long + BEFORE, suffix=BEHIND + behind, fim_mode="spm", max_tokens=4)
    assert result.num_input_tokens + 4 <= 2048 and min(result.num_truncated_tokens) > 1000
    with pytest.raises(InvalidRequest, match="2048|2047"):  # nothing is cut without a suffix
        client.complete(long, max_tokens=4)


def test_where_code_is_complete(client: Client, server: TritonServer) -> None:
    prompt = "def add(a, b):\n    return a"
    line = client.complete(prompt, stop_at="line", max_tokens=48)
    assert line.stop_reason == "stop_at:line" and line.finish_reason == "stop" and "\n" not in line.text
    block = client.complete(prompt, stop_at=["block", "repetition"], max_tokens=200, ignore_eos=True)
    assert block.stop_reason in ("stop_at:block", "stop_at:repetition")
    if block.stop_reason == "stop_at:block":
        assert all(row.startswith("    ") or not row.strip() for row in block.text.split("\n")[1:])
    bracket = generate(server, text_input="print(len(", stop_at=["bracket"], max_tokens=48)
    assert bracket["stop_reason"] == "stop_at:bracket" and ")" not in bracket["text_output"].replace("()", "")[-1:]
    suffix = client.complete("def f():\n    x = 1\n", suffix="    return x\n", stop_at="suffix", token_healing=False, fim_mode="spm", max_tokens=40)
    assert "return x" not in suffix.text


def test_time_is_limited(client: Client) -> None:
    result = client.complete("x = [", **LONG, max_time_ms=150)
    assert result.finish_reason == "time" and 0 < result.num_output_tokens < LONG["max_tokens"]
    assert result.timings.prefill_s + result.timings.decode_s + result.timings.queue_s < 0.6
