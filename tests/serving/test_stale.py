"""Typing ahead through the real server: sessions and deadlines before the first token, reused prompts, usage of every request."""
from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable

import pytest
from codefuse_triton_client import Client
from serving_helpers import LONG, PROMPT, SLOW, PlainStream, generate, metrics, post, tensor, wait_until

from codefuse_triton.triton_server import TritonServer


def outputs(result: Any) -> dict[str, Any]:
    return {o.name: result.as_numpy(o.name).reshape(-1).tolist() for o in result.get_response().outputs}


def test_a_key_more_costs_a_token(server: TritonServer, client: Client) -> None:
    prompt = PROMPT + "    with open(path) as file:\n        return file"
    cold = client.complete(prompt, max_tokens=8, cache_salt="keys")
    warm = client.complete(prompt, max_tokens=8, cache_salt="keys")
    assert cold.num_cached_tokens == 0 and warm.text == cold.text
    assert 1 <= warm.num_input_tokens - warm.num_cached_tokens <= 4  # the last token, and what token healing spells again
    longer = client.complete(prompt + ".read", max_tokens=8, cache_salt="keys")
    assert longer.num_input_tokens - longer.num_cached_tokens <= 6  # the last token of before may have become another one
    assert client.complete(prompt, max_tokens=8, cache_salt="others").num_cached_tokens == 0


def test_usage(server: TritonServer, client: Client) -> None:
    before = metrics(server)
    result = client.complete(PROMPT, max_tokens=12, ignore_eos=True, cache_salt="usage")
    t = result.timings
    assert (result.num_output_tokens, result.finish_reason, result.num_cached_tokens) == (12, "length", 0)
    assert t.queue_s >= 0 and t.prefill_s > 0 and t.decode_s > 0 and t.queue_s + t.prefill_s + t.decode_s < t.total_s
    streamed = outputs(list(PlainStream(server, "ensemble", [tensor("text_input", "BYTES", [PROMPT.encode()]), tensor("max_tokens", "INT32", [12]),
                                                             tensor("cache_salt", "BYTES", [b"usage"]), tensor("stream", "BOOL", [True])]))[-1])
    assert streamed["num_input_tokens"] == [result.num_input_tokens] and streamed["num_cached_tokens"] == [result.num_input_tokens - 1]
    assert len(streamed["timings"]) == 3 and streamed["timings"][1] > 0
    plain = generate(server, text_input=PROMPT, max_tokens=3, cache_salt="usage")
    assert plain["num_cached_tokens"] == result.num_input_tokens - 1 and plain["finish_reason"] == "length"
    wait_until(lambda: metrics(server)["cached_tokens"] >= before.get("cached_tokens", 0) + 2 * (result.num_input_tokens - 1), 3, "reused tokens are counted")
    said = subprocess.run([Path(sys.executable).parent / "codefuse-client", "--url", server.grpc_url, PROMPT, "--max-tokens", "2", "--cache-salt", "usage", "--stats"],
                          capture_output=True, text=True, check=True).stderr
    assert f"{result.num_input_tokens} tokens in ({result.num_input_tokens - 1} reused), 2 out" in said


@pytest.mark.parametrize("model", ["ensemble", "generator"])
def test_a_newer_request_ends_the_stale_one(slow_server: TritonServer, model: str) -> None:
    source = {"ensemble": tensor("text_input", "BYTES", [PROMPT.encode()]), "generator": tensor("input_ids", "INT32", list(range(300, 320)))}[model]
    inputs = [source, tensor("max_tokens", "INT32", [LONG["max_tokens"]]), tensor("ignore_eos", "BOOL", [True]), tensor("stream", "BOOL", [True]),
              tensor("session", "BYTES", [b"editor 7"])]
    stale = PlainStream(slow_server, model, inputs)
    responses = iter(stale)
    next(responses)
    with Client(slow_server.grpc_url) as client:
        newer = client.complete(PROMPT + "    for", max_tokens=5, ignore_eos=True, session="editor 7")
    assert newer.finish_reason == "length"
    last = [outputs(r) for r in responses][-1]
    assert last["finish_reason"] == [b"cancelled"] and last["num_output_tokens"][0] < LONG["max_tokens"]
    stale.close()


def test_before_the_first_token(start: Callable[..., TritonServer]) -> None:
    """One slot, taken: what waits ends when it is stale or too late, and the server says so to every kind of client."""
    server = start(slots=1, **SLOW)
    with Client(server.grpc_url) as client:
        running = client.stream(PROMPT, session="a", **LONG)
        next(running)
        ended: list[dict[str, Any]] = []
        stale = threading.Thread(target=lambda: ended.append(generate(server, text_input=PROMPT, max_tokens=5, session="b")))
        stale.start()
        wait_until(lambda: metrics(server)["waiting"] == 1, 3, "the first of session b waits")
        late = client.complete(PROMPT, max_tokens=5, deadline_ms=150)
        assert (late.finish_reason, late.text, late.num_output_tokens) == ("deadline", "", 0) and late.timings.queue_s >= 0.15
        survivor: list[Any] = []
        newer = threading.Thread(target=lambda: survivor.append(client.complete(PROMPT + "x", max_tokens=5, ignore_eos=True, session="b")))
        newer.start()
        stale.join(3)
        assert ended and (ended[0]["finish_reason"], ended[0]["text_output"], ended[0]["num_output_tokens"]) == ("cancelled", "", 0)
        again = client.complete(PROMPT, max_tokens=5, ignore_eos=True, session="a")  # frees the slot by its session
        newer.join(10)
        assert survivor[0].finish_reason == again.finish_reason == "length"
        assert again.num_cached_tokens == again.num_input_tokens - 1
        for _ in running:
            pass
        assert running.result.finish_reason == "cancelled"
    wait_until(lambda: (metrics(server)["finished_cancelled"], metrics(server)["finished_deadline"]) == (2, 1), 3, "the ends are counted")


@pytest.mark.parametrize("given, message", [
    (dict(session="x" * 257), "session has 257 bytes; at most 256 are accepted"), (dict(cache_salt="x" * 300), "cache_salt has 300 bytes; at most 256"),
    (dict(deadline_ms=-1), "deadline_ms is -1; it must be between 0 and")])
def test_bad_values(server: TritonServer, given: dict[str, Any], message: str) -> None:
    status, body = post(server, "/v2/models/ensemble/generate", {"text_input": PROMPT, "max_tokens": 1, **given})
    assert status >= 400 and message in json.loads(body)["error"]
