"""Text through the whole path: plain tritonclient, our client, HTTP; streams, order, Unicode, options."""
from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from codefuse_triton_client import AsyncClient, Client, Result
from serving_helpers import LONG, PROMPT, PlainStream, generate, generate_stream, metrics, post, tensor, wait_busy, wait_idle, wait_until

from codefuse_triton import Vocab
from codefuse_triton.triton_server import TritonServer

PROMPTS = [f"def function_{i}(self, value):\n" for i in range(24)]
# Sampled hot, the model writes single bytes of characters, characters of every length and ill-formed text.
WILD = dict(temperature=8.0, seed=5, max_tokens=200, ignore_eos=True)


def inputs(prompt: str, max_tokens: int, stream: bool) -> list:
    """What tensorrtllm_backend's end_to_end_grpc_client.py sends."""
    return [tensor("text_input", "BYTES", [prompt.encode()]), tensor("max_tokens", "INT32", [max_tokens]),
            tensor("bad_words", "BYTES", [b""]), tensor("stop_words", "BYTES", [b""]), tensor("stream", "BOOL", [stream]),
            tensor("beam_width", "INT32", [1]), tensor("temperature", "FP32", [0.0]), tensor("end_id", "INT32", [-1]),
            tensor("pad_id", "INT32", [0]), tensor("repetition_penalty", "FP32", [1.0]),
            tensor("presence_penalty", "FP32", [0.0]), tensor("random_seed", "UINT64", [1])]


def test_plain_tritonclient(server: TritonServer) -> None:
    stream = PlainStream(server, "ensemble", inputs(PROMPT, 200, True), request_id="42")
    results = list(stream)
    stream.close()
    text = "".join(r.as_numpy("text_output")[0].decode() for r in results)
    assert len(results) > 4 and text
    assert [r.as_numpy("chunk_index")[0][0] for r in results] == list(range(len(results)))
    assert all(r.as_numpy("batch_index")[0][0] == 0 and r.as_numpy("sequence_index")[0][0] == 0 for r in results)
    assert all(r.get_response().id == "42" for r in results)
    assert results[-1].as_numpy("finish_reason")[0][0] == b"length"
    assert results[-1].as_numpy("num_output_tokens")[0][0] == 200
    whole = PlainStream(server, "ensemble", inputs(PROMPT, 200, False))
    (only,) = list(whole)
    whole.close()
    assert only.as_numpy("text_output")[0].decode() == text


def test_direct_generator(server: TritonServer) -> None:
    ids = list(range(300, 320))
    stream = PlainStream(server, "generator", [tensor("input_ids", "INT32", ids), tensor("max_tokens", "INT32", [8]),
                                               tensor("stream", "BOOL", [True]), tensor("return_log_probs", "BOOL", [True])])
    results = list(stream)
    stream.close()
    tokens = np.concatenate([r.as_numpy("output_ids").reshape(-1) for r in results])
    log_probs = np.concatenate([r.as_numpy("output_log_probs").reshape(-1) for r in results])
    assert len(tokens) == len(log_probs) == results[-1].as_numpy("num_output_tokens")[0][0] == 8
    assert (log_probs <= 0).all() and log_probs.sum() == pytest.approx(results[-1].as_numpy("cum_log_probs")[0][0], abs=1e-4)
    assert len({r.as_numpy("uid")[0][0] for r in results}) == 1
    assert results[-1].as_numpy("error")[0][0] == b"" and results[-1].as_numpy("num_input_tokens")[0][0] == len(ids)


def test_our_client(client: Client) -> None:
    with client.stream(PROMPT, max_tokens=200, logprobs=True) as stream:
        chunks = list(stream)
    result = stream.result
    assert result.text == "".join(c.text for c in chunks) and len(chunks) > 4
    assert [c.index for c in chunks] == list(range(len(chunks)))
    assert result.finish_reason == "length" and result.num_output_tokens == 200 == len(result.log_probs)
    assert result.cum_log_prob == pytest.approx(sum(result.log_probs), abs=1e-3)
    assert result.num_input_tokens > 3
    assert 0 < result.timings.prefill_s + result.timings.decode_s < result.timings.total_s
    assert 0 < result.timings.first_chunk_s < result.timings.total_s
    assert client.complete(PROMPT, max_tokens=200).text == result.text
    assert client.is_ready()


def test_several_answers(server: TritonServer, client: Client) -> None:
    options = dict(max_tokens=40, temperature=1.0, seed=70)
    alone = [client.complete(PROMPT, max_tokens=40, temperature=1.0, seed=70 + i).text for i in range(5)]
    assert len(set(alone)) > 1
    with client.stream(PROMPT, n=5, **options) as stream:
        chunks = list(stream)
    assert [r.text for r in stream.results] == alone == [r.text for r in client.complete_all(PROMPT, n=5, **options)]
    assert [c.sequence_index for c in chunks] != sorted(c.sequence_index for c in chunks)  # interleaved
    for i, text in enumerate(alone):
        mine = [c for c in chunks if c.sequence_index == i]
        assert "".join(c.text for c in mine) == text and [c.index for c in mine] == list(range(len(mine)))
    best = client.complete_all(PROMPT, n=2, best_of=5, logprobs=True, **options)
    every = client.complete_all(PROMPT, n=5, logprobs=True, **options)
    mean = sorted(every, key=lambda r: -r.cum_log_prob / r.num_output_tokens)
    assert [r.text for r in best] == [r.text for r in mean[:2]]
    (one,) = client.complete_all(PROMPT, best_of=3, exclude_input=False, **options)
    assert one.text in [PROMPT + text for text in alone[:3]]
    events = generate_stream(server, text_input=PROMPT, num_return_sequences=2, stream=True, **options)
    assert {e["sequence_index"] for e in events} == {0, 1}
    raw = PlainStream(server, "ensemble", [
        tensor("text_input", "BYTES", [PROMPT.encode()]), tensor("max_tokens", "INT32", [40]), tensor("num_return_sequences", "INT32", [2]),
        tensor("temperature", "FP32", [1.0]), tensor("random_seed", "UINT64", [70]), tensor("exclude_input_in_output", "BOOL", [False])])
    results = list(raw)
    raw.close()
    assert {int(r.as_numpy("sequence_index")[0][0]): r.as_numpy("text_output")[0].decode() for r in results} == {i: PROMPT + alone[i] for i in (0, 1)}


def test_direct_generator_with_answers_and_top_tokens(server: TritonServer) -> None:
    stream = PlainStream(server, "generator", [
        tensor("input_ids", "INT32", list(range(300, 320))), tensor("max_tokens", "INT32", [8]), tensor("temperature", "FP32", [1.0]),
        tensor("num_return_sequences", "INT32", [3]), tensor("num_log_probs", "INT32", [2]), tensor("repetition_penalty", "FP32", [1.2])])
    results = list(stream)
    stream.close()
    assert sorted(r.as_numpy("sequence_index")[0][0] for r in results) == [0, 1, 2]
    for r in results:
        assert r.as_numpy("output_ids").shape == r.as_numpy("output_log_probs").shape == (1, 8) and r.as_numpy("top_token_ids").shape == (1, 16)
        assert (np.diff(r.as_numpy("top_log_probs").reshape(8, 2)) <= 0).all()


def test_beams(server: TritonServer, client: Client) -> None:
    texts = client.complete_all(PROMPT, n=4, beam_width=6, max_tokens=20, logprobs=True, ignore_eos=True)
    assert len({r.text for r in texts}) == 4 and {r.finish_reason for r in texts} == {"length"}
    assert [r.cum_log_prob for r in texts] == sorted((r.cum_log_prob for r in texts), reverse=True)
    assert texts[0].text != client.complete(PROMPT, max_tokens=20, ignore_eos=True).text
    with client.stream(PROMPT, n=2, beam_width=6, max_tokens=20, ignore_eos=True) as stream:
        assert [(c.sequence_index, c.text) for c in stream] == [(i, texts[i].text) for i in range(2)]
    assert generate(server, text_input=PROMPT, max_tokens=20, beam_width=6, ignore_eos=True)["text_output"] == texts[0].text


def test_leaving_on_any_device(server: TritonServer, client: Client) -> None:
    """test_cancel.py has every way to leave, on the CPU; a GPU has finished LONG in a third of a second."""
    before = metrics(server).get("finished_cancelled", 0)
    for _ in range(8):
        with client.stream(PROMPT, **LONG) as stream:
            next(stream)
    assert wait_idle(server) < 1
    wait_until(lambda: metrics(server).get("finished_cancelled", 0) >= before + 6, 2, "nearly all have been cancelled")


@pytest.mark.parametrize("options", [dict(n=6, temperature=1.0), dict(beam_width=8)], ids=["answers", "beams"])
def test_leaving_several_answers_frees_all_places(slow_server: TritonServer, options: dict[str, Any]) -> None:
    with Client(slow_server.grpc_url) as client, client.stream(PROMPT, **LONG, **options) as stream:
        if "n" in options:
            next(stream)  # beams say nothing before their end
        wait_busy(slow_server, 6)
    assert wait_idle(slow_server) < 1


def test_top_log_probs(server: TritonServer, client: Client, weights: Path) -> None:
    vocab = Vocab.load(weights)
    with client.stream(PROMPT, max_tokens=30, top_logprobs=4) as stream:
        chunks = list(stream)
    for result in (stream.result, client.complete(PROMPT, max_tokens=30, top_logprobs=4)):
        assert len(result.token_ids) == len(result.log_probs) == len(result.top) == 30
        assert vocab.decode(result.token_ids).decode() == result.text
        for id, log_prob, top in zip(result.token_ids, result.log_probs, result.top):
            assert len(top) == 4 and (top[0].id, top[0].log_prob) == (id, log_prob)  # greedy
            assert [t.log_prob for t in top] == sorted((t.log_prob for t in top), reverse=True)
            assert all(t.text == vocab.decode([t.id]).decode(errors="replace") for t in top)
    assert all(len(c.top) == len(c.token_ids) for c in chunks)
    raw = generate(server, text_input=PROMPT, max_tokens=2, sampling_parameters='{"logprobs": 2}')
    assert len(raw["top_tokens"]) == len(raw["top_token_ids"]) == len(raw["top_log_probs"]) == 4 and len(raw["output_token_ids"]) == 2


def test_biases_penalties_and_bad_words(server: TritonServer, client: Client, weights: Path) -> None:
    plain = client.complete(PROMPT, max_tokens=60)
    word = plain.text[10:13]
    without = client.complete(PROMPT, max_tokens=60, bad_words=[word, "return"])
    assert word in plain.text and word not in without.text and "return" not in without.text
    assert client.complete(PROMPT, max_tokens=60, repetition_penalty=1.5, frequency_penalty=0.5).text != plain.text
    vocab = Vocab.load(weights)  # the three ways to say one bias
    (id,) = [i for i in vocab.encode("pass") if b"pass" in vocab.token_bytes[i]]
    text = client.complete(PROMPT, max_tokens=8, logit_bias={id: 100.0}).text
    assert text == vocab.decode([id]).decode() * 8
    fields = dict(text_input=PROMPT, max_tokens=8)
    assert generate(server, **fields, sampling_parameters=json.dumps({"logit_bias": {str(id): 100}}))["text_output"] == text
    stream = PlainStream(server, "ensemble", [
        tensor("text_input", "BYTES", [PROMPT.encode()]), tensor("max_tokens", "INT32", [8]),
        tensor("embedding_bias_words", "BYTES", [b"pass", b"pass"]), tensor("embedding_bias_weights", "FP32", [60.0, 40.0])])
    assert "pass" in list(stream)[-1].as_numpy("text_output")[0].decode()
    stream.close()


def test_asyncio_client(server: TritonServer, client: Client) -> None:
    async def run() -> list[Result]:
        async with AsyncClient(server.grpc_url) as aio:
            async with aio.stream(PROMPT, max_tokens=16) as stream:
                text = "".join([chunk.text async for chunk in stream])
            assert text == stream.result.text
            return [stream.result, *await asyncio.gather(*(aio.complete(p, max_tokens=16) for p in PROMPTS[:4]))]

    results = asyncio.run(run())
    assert [r.text for r in results] == [client.complete(p, max_tokens=16).text for p in (PROMPT, *PROMPTS[:4])]


def test_concurrent_streams_keep_order_and_text(server: TritonServer, client: Client) -> None:
    """More streams than slots; the client refuses a chunk out of order."""
    alone = [client.complete(prompt, max_tokens=20).text for prompt in PROMPTS]
    texts: dict[int, str] = {}

    def run(i: int) -> None:
        with client.stream(PROMPTS[i], max_tokens=20) as stream:
            texts[i] = "".join(chunk.text for chunk in stream)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [texts.get(i) for i in range(len(PROMPTS))] == alone


@pytest.mark.parametrize("prompt", ["s = 'żółw 漢字 🐢👩\u200d💻'\n", "# naïve café\n"])
def test_streamed_text_is_the_whole_text(server: TritonServer, client: Client, prompt: str) -> None:
    whole = client.complete(prompt, **WILD)
    chunks = list(client.stream(prompt, **WILD))
    assert "".join(c.text for c in chunks) == whole.text
    assert any(ord(c) > 127 for c in whole.text)
    fields = dict(text_input=prompt, **WILD)
    assert generate(server, **fields)["text_output"] == whole.text
    assert "".join(r["text_output"] for r in generate_stream(server, **fields)) == whole.text


@pytest.mark.parametrize("prompt", ["s = 'żółw 漢字 🐢👩\u200d💻'\n", "\x00\x01\r\n\t", "é" * 300])
def test_the_prompt_is_echoed_byte_for_byte(client: Client, prompt: str) -> None:
    plain = client.complete(prompt, max_tokens=6)
    assert client.complete(prompt, max_tokens=6, exclude_input=False).text == prompt + plain.text
    assert "".join(c.text for c in client.stream(prompt, max_tokens=6, exclude_input=False)) == prompt + plain.text


def test_http(server: TritonServer) -> None:
    whole = generate(server, text_input=PROMPT, max_tokens=200)
    assert whole["num_output_tokens"] == 200 and whole["finish_reason"] == "length"
    events = generate_stream(server, text_input=PROMPT, max_tokens=200)
    assert [e["chunk_index"] for e in events] == list(range(len(events))) and len(events) > 4
    assert "".join(e["text_output"] for e in events) == whole["text_output"]


def test_options_as_tensors_parameters_and_json(server: TritonServer, client: Client) -> None:
    sampled = client.complete(PROMPT, max_tokens=12, temperature=0.9, top_k=40, top_p=0.9, seed=7).text
    assert sampled != client.complete(PROMPT, max_tokens=12, temperature=0.9, top_k=40, top_p=0.9, seed=8).text
    as_json = json.dumps({"max_tokens": "12", "temperature": 0.9, "top_k": 40, "top_p": "0.9", "seed": 7, "n": 1})
    assert client.complete(PROMPT, sampling_parameters=as_json).text == sampled
    stream = PlainStream(server, "ensemble", [tensor("text_input", "BYTES", [PROMPT.encode()])],
                         parameters={"max_tokens": 12, "temperature": "0.9", "top_k": 40, "top_p": "0.9", "seed": 7})
    (only,) = list(stream)
    stream.close()
    assert only.as_numpy("text_output")[0].decode() == sampled


def test_stop_strings(client: Client) -> None:
    whole = client.complete(PROMPT, max_tokens=48).text
    stop = whole[len(whole) // 2:][:3]
    cut = whole.index(stop)
    result = client.complete(PROMPT, max_tokens=48, stop=["\x00never", stop])
    assert (result.text, result.finish_reason, result.stop_reason) == (whole[:cut], "stop", stop)
    assert client.complete(PROMPT, max_tokens=48, stop=stop, include_stop=True).text == whole[:cut] + stop
    assert "".join(c.text for c in client.stream(PROMPT, max_tokens=48, stop=stop)) == whole[:cut]


def test_end_tokens(server: TritonServer, client: Client) -> None:
    stream = PlainStream(server, "generator", [tensor("input_ids", "INT32", [400, 401]), tensor("max_tokens", "INT32", [6])])
    (result,) = list(stream)
    stream.close()
    tokens = result.as_numpy("output_ids").reshape(-1).tolist()
    for name, ignore_eos in (("end_id", False), ("stop_token_ids", False), ("stop_token_ids", True)):
        stream = PlainStream(server, "generator", [tensor("input_ids", "INT32", [400, 401]), tensor("max_tokens", "INT32", [6]),
                                                   tensor(name, "INT32", [tokens[2]]), tensor("ignore_eos", "BOOL", [ignore_eos])])
        (ended,) = list(stream)
        stream.close()
        assert ended.as_numpy("finish_reason")[0][0] == b"eos"
        assert ended.as_numpy("output_ids").reshape(-1).tolist() == tokens[:tokens.index(tokens[2])]


