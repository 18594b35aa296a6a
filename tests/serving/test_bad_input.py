"""What is wrong is refused with the field, the value and the limit, and nobody else notices."""
from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from codefuse_triton_client import Client, InvalidRequest
from serving_helpers import PROMPT, PlainStream, generate, post, tensor, wait_idle
from tritonclient.utils import InferenceServerException

from codefuse_triton.triton_server import TritonServer

REFUSED = [  # fields of a generate request, what the message says
    (dict(), ["text_input is missing"]),
    (dict(max_tokens=4), ["text_input is missing"]),
    (dict(text_input=""), ["text_input is empty"]),
    (dict(text_input="a", max_tokens=0), ["max_tokens is 0", "at least 1", "between 1 and"]),
    (dict(text_input="a", max_tokens=-5), ["max_tokens is -5"]),
    (dict(text_input="a", max_tokens=10**6), ["1000000", "2048"]),
    (dict(text_input="def f():\n" * 2000), ["2048"]),
    (dict(text_input="a", temperature=-0.5), ["temperature is -0.5", "between 0 and"]),
    (dict(text_input="a", top_p=1.5), ["top_p is 1.5", "between 0 and 1"]),
    (dict(text_input="a", top_k=-2), ["top_k is -2"]),
    (dict(text_input="a", min_p=2), ["min_p is 2.0"]),
    (dict(text_input="a", min_length=9, max_tokens=4), ["min_length is 9", "max_tokens (4)"]),
    (dict(text_input="a", min_length=1, min_tokens=2), ["min_tokens is 2", "min_length is 1", "give one"]),
    (dict(text_input="a", seed=1, random_seed=2), ["seed is 2", "seed is 1"]),
    (dict(text_input="a", max_tokens=4, sampling_parameters='{"max_tokens": 5}'), ["max_tokens is 4", "sampling_parameters.max_tokens is 5"]),
    (dict(text_input="a", sampling_parameters="{"), ["sampling_parameters is not JSON"]),
    (dict(text_input="a", sampling_parameters="[1]"), ["sampling_parameters is [1]", "JSON object"]),
    (dict(text_input="a", sampling_parameters='{"temprature": 1}'), ["'temprature'", "'temperature'"]),
    (dict(text_input="a", sampling_parameters='{"temperature": "hot"}'), ["sampling_parameters.temperature is 'hot'"]),
    (dict(text_input="a", sampling_parameters='{"temperature": NaN}'), ["sampling_parameters.temperature", "finite"]),
    (dict(text_input="a", sampling_parameters='{"n": 2}'), ["num_return_sequences is 2", "temperature 0"]),
    (dict(text_input="a", sampling_parameters='{"n": 65}'), ["sampling_parameters.n is 65", "between 1 and 64"]),
    (dict(text_input="a", max_token=3), ["'max_token'", "'max_tokens'"]),
    (dict(text_input="a", beam_width=65), ["beam_width is 65", "between 1 and 64"]),
    (dict(text_input="a", beam_width=4, top_k=50), ["top_k is 50", "beam_width 4"]),
    (dict(text_input="a", repetition_penalty=0), ["repetition_penalty is 0", "between 0.01 and 100"]),
    (dict(text_input="a", bad_words=["x" * 2000]), ["bad_words has a string of 2000 bytes", "at most 1024"]),
    (dict(text_input="a", sampling_parameters='{"logit_bias": {"999999": 1}}'), ["logit_bias has token 999999", "expected 0.."]),
    (dict(text_input="a", suffix="x", fim_mode="mps"), ["fim_mode is 'mps'", "psm, spm"]),
    (dict(text_input="a", stop_at=["word"]), ["stop_at is 'word'", "line, block, bracket, suffix, repetition"]),
    (dict(text_input="a", max_time_ms=-1), ["max_time_ms is -1"]),
    (dict(text_input="a", prefix_bytes="x"), ["prefix_bytes is a tensor"]),
    (dict(text_input="a", stop_words=["x" * 2000]), ["stop_words", "2000 bytes", "1024"]),
    (dict(text_input="a", stop_words=["x" * 1000] * 70), ["stop has 70000 bytes", "65536"]),
    (dict(text_input="a", bad_words=["x"] * 99), ["bad_words has 99", "64"]),
    (dict(text_input="a", stop_uid=1), ["'stop_uid'"]),
]


@pytest.fixture(scope="module", autouse=True)
def neighbour(shared_server: TritonServer) -> Any:
    """Somebody whose requests go on through all of it, and have the text that they had before."""
    texts: list[str] = []
    done = threading.Event()

    def run() -> None:
        while not done.is_set():
            with client.stream(PROMPT, max_tokens=40) as stream:
                texts.append("".join(chunk.text for chunk in stream))

    with Client(shared_server.grpc_url) as client, ThreadPoolExecutor() as pool:
        expected = client.complete(PROMPT, max_tokens=40).text
        running = pool.submit(run)
        yield
        done.set()
        running.result(timeout=20)
    assert texts and set(texts) == {expected}
    wait_idle(shared_server)


@pytest.mark.parametrize("fields, said", REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_refused(shared_server: TritonServer, fields: dict[str, Any], said: list[str]) -> None:
    status, body = post(shared_server, "/v2/models/ensemble/generate", fields)
    assert status == 400 and any(part in body.decode() for part in said), body
    assert all(part in body.decode() for part in said[:1]), body


@pytest.mark.parametrize("body", [b"", b"not json", b"[]", b'{"text_input": 5}', b'{"text_input": "a", "max_tokens": "x"}',
                                  b'{"text_input": "a", "temperature": "x"}', b'{"text_input": ["a", "b"]}', b'{"text_input": null}'])
def test_malformed_http(shared_server: TritonServer, body: bytes) -> None:
    status, answer = post(shared_server, "/v2/models/ensemble/generate", body)
    assert status in (400, 500) and b"error" in answer


def refused_by_grpc(server: TritonServer, model: str, inputs: list[Any]) -> str:
    stream = PlainStream(server, model, inputs)
    try:
        with pytest.raises(InferenceServerException) as error:
            list(stream)
    finally:
        stream.close()
    return error.value.message()


def test_bad_tensors(shared_server: TritonServer) -> None:
    two = tensor("text_input", "BYTES", [b"a", b"b"], [2, 1])
    assert "batch-size must be <= 1" in refused_by_grpc(shared_server, "ensemble", [two])
    text = tensor("text_input", "BYTES", [b"a"])
    assert "Expected" in refused_by_grpc(shared_server, "ensemble", [text, tensor("max_tokens", "INT32", [1, 2])])
    assert "data-type" in refused_by_grpc(shared_server, "ensemble", [text, tensor("max_tokens", "FP32", [4])])
    assert "unexpected" in refused_by_grpc(shared_server, "ensemble", [text, tensor("nonsense", "FP32", [4])])
    assert "UTF-8" in refused_by_grpc(shared_server, "ensemble", [tensor("text_input", "BYTES", [b"\xff\xfe"])])
    assert "UTF-8" in refused_by_grpc(shared_server, "ensemble", [text, tensor("stop_words", "BYTES", [b"\xff"])])
    assert "nan" in refused_by_grpc(shared_server, "ensemble", [text, tensor("temperature", "FP32", [float("nan")])])
    assert "input_ids is missing" in refused_by_grpc(shared_server, "generator", [tensor("max_tokens", "INT32", [4])])
    assert "999999" in refused_by_grpc(shared_server, "generator", [tensor("input_ids", "INT32", [5, 999999])])
    assert "-3" in refused_by_grpc(shared_server, "generator", [tensor("input_ids", "INT32", [-3])])


def test_client_errors(shared_server: TritonServer) -> None:
    with Client(shared_server.grpc_url) as client:
        with pytest.raises(InvalidRequest, match="^max_tokens is 0; it must be between 1 and 2147483647$") as error:
            list(client.stream("a", max_tokens=0))
        assert error.value.code == "INVALID_ARGUMENT"
        with pytest.raises(InvalidRequest, match="max_tokens is 1099511627776; expected an integer"):
            client.complete("a", max_tokens=2**40)
        with pytest.raises(InvalidRequest, match="ignore_eos is 1; expected true or false"):
            client.complete("a", ignore_eos=1)
        with pytest.raises(TypeError, match="max_token"):
            client.complete("a", max_token=1)


def test_neutral_values_and_null_are_accepted(shared_server: TritonServer) -> None:
    neutral = ('{"n": 1, "best_of": null, "presence_penalty": 0, "frequency_penalty": "0.0", "repetition_penalty": 1, "top_k": -1, '
               '"top_p": 1, "min_p": 0, "stop": null, "bad_words": [], "detokenize": true, "skip_special_tokens": "true", '
               '"length_penalty": 1.0, "early_stopping": false, "prompt_logprobs": null, "logprobs": 0, "max_tokens": 3}')
    result = generate(shared_server, text_input="a", sampling_parameters=neutral, beam_width=1, suffix="", session="",
                      bad_words=[""], num_return_sequences=1, token_healing=False, pad_id=0, length_penalty=1.0)
    assert result["num_output_tokens"] == 3 and len(result["output_log_probs"]) == 3
