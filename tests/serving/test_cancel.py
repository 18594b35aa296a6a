"""A client that cancels or goes away frees its slot: every way to go, through the ensemble and the direct generator."""
from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from codefuse_triton_client import AsyncClient, Client, CompletionError
from serving_helpers import LONG, PROMPT, PlainStream, metrics, tensor, wait_busy, wait_idle, wait_until

from codefuse_triton.triton_server import TritonServer

STREAM_INPUTS = [tensor("max_tokens", "INT32", [LONG["max_tokens"]]), tensor("ignore_eos", "BOOL", [True])]
SOURCE = {"ensemble": tensor("text_input", "BYTES", [PROMPT.encode()]), "generator": tensor("input_ids", "INT32", list(range(300, 320)))}


@pytest.fixture
def server(slow_server: TritonServer) -> TritonServer:
    return slow_server


@pytest.fixture(autouse=True)
def counted(server: TritonServer) -> Any:
    """Each test cancels what it starts, and the server says so."""
    before = metrics(server).get("finished_cancelled", 0)
    yield
    wait_until(lambda: metrics(server).get("finished_cancelled", 0) > before, 2, "a request ended as cancelled")


def long_stream(server: TritonServer, model: str, stream: bool = True) -> PlainStream:
    return PlainStream(server, model, [SOURCE[model], *STREAM_INPUTS, tensor("stream", "BOOL", [stream])])


@pytest.mark.parametrize("model", ["ensemble", "generator"])
@pytest.mark.parametrize("stream", [True, False])
def test_plain_tritonclient_cancels(server: TritonServer, model: str, stream: bool) -> None:
    call = long_stream(server, model, stream)
    if stream:
        next(iter(call))
    wait_busy(server)
    call.cancel()
    assert wait_idle(server) < 1


def test_break_from_our_stream(server: TritonServer, client: Client) -> None:
    for chunk in client.stream(PROMPT, **LONG):
        if chunk.index == 3:
            break
    assert wait_idle(server) < 1


def test_close_with_and_timeout(server: TritonServer, client: Client) -> None:
    with client.stream(PROMPT, **LONG) as stream:
        next(stream)
    assert wait_idle(server) < 1
    with pytest.raises(CompletionError) as error:
        client.complete(PROMPT, timeout_s=0.5, **LONG)
    assert error.value.code == "DEADLINE_EXCEEDED"
    assert wait_idle(server) < 1


@pytest.mark.parametrize("how", ["aclose", "task", "break"])
def test_asyncio(server: TritonServer, how: str) -> None:
    async def run() -> None:
        async with AsyncClient(server.grpc_url) as client:
            if how == "task":
                task = asyncio.create_task(client.complete(PROMPT, **LONG))
                await asyncio.sleep(0.3)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            elif how == "aclose":
                stream = client.stream(PROMPT, **LONG)
                await stream.__anext__()
                await stream.aclose()
            else:
                async for _ in client.stream(PROMPT, **LONG):
                    break
            assert await asyncio.to_thread(wait_idle, server) < 1

    asyncio.run(run())


def test_death_of_the_client_process(server: TritonServer) -> None:
    program = ("import sys; from codefuse_triton_client import Client\n"
               f"for c in Client({server.grpc_url!r}).stream({PROMPT!r}, **{LONG!r}): print(c.text, flush=True)")
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    assert wait_idle(server) < 1


def test_http_close(server: TritonServer) -> None:
    body = json.dumps({"text_input": PROMPT, "stream": True, **LONG})
    connection = socket.create_connection((server.host, server.http_port))
    connection.sendall(f"POST /v2/models/ensemble/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    connection.recv(4096)
    connection.close()
    assert wait_idle(server) < 1


@pytest.mark.parametrize("model", ["ensemble", "generator"])
def test_before_the_first_token(server: TritonServer, client: Client, model: str) -> None:
    """All slots are taken: the request waits in the queue, and still leaves it when its client does."""
    slots = int(metrics(server)["slots"])
    others = [client.stream(PROMPT, **LONG) for _ in range(slots)]
    for stream in others:
        next(stream)
    waiting = long_stream(server, model)
    wait_until(lambda: metrics(server)["waiting"] == 1, 3, "the request waits")
    waiting.cancel()
    assert wait_until(lambda: metrics(server)["waiting"] == 0, 3, "the request has left the queue") < 1.5
    assert metrics(server)["running"] == slots
    for stream in others:
        stream.close()
    wait_idle(server)


def test_others_go_on(server: TritonServer, client: Client) -> None:
    """Requests beside cancelled ones get the text that they get alone."""
    expected = client.complete(PROMPT, max_tokens=60).text
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append("".join(c.text for c in client.stream(PROMPT, max_tokens=60))))
               for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        with client.stream(PROMPT, **LONG) as stream:
            next(stream)
        time.sleep(0.05)
    assert texts == [expected] * 3
