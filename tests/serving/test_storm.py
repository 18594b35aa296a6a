"""Many clients that complete, cancel, err and vanish at once: the server stays whole and leaves nothing behind."""
from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
from typing import Callable

from codefuse_triton_client import AsyncClient, Client, CompletionError, InvalidRequest
from serving_helpers import LONG, PROMPT, generate, metrics, wait_idle

from codefuse_triton.triton_server import TritonServer

SECONDS = 8


def test_storm(start: Callable[..., TritonServer]) -> None:
    server = start(slots=2, queue=6)  # fewer than there are clients
    expected = generate(server, text_input=PROMPT, max_tokens=24)["text_output"]
    deadline = time.monotonic() + SECONDS
    failures: list[str] = []
    done = {"completed": 0, "cancelled": 0, "refused": 0, "overloaded": 0}

    def check(text: str) -> None:
        done["completed"] += 1
        if text != expected:
            failures.append(text)

    def one(client: Client, rng: random.Random) -> None:
        kind = rng.randrange(5)
        if kind == 0:
            check(client.complete(PROMPT, max_tokens=24).text)
        elif kind == 1:
            check("".join(chunk.text for chunk in client.stream(PROMPT, max_tokens=24)))
        elif kind == 2:
            with client.stream(PROMPT, **LONG) as stream:
                for _ in range(rng.randrange(4)):
                    next(stream)
                time.sleep(rng.random() * 0.05)
            done["cancelled"] += 1
        elif kind == 3:
            body = json.dumps({"text_input": PROMPT, "stream": True, **LONG})
            with socket.create_connection((server.host, server.http_port), timeout=30) as connection:
                connection.sendall(f"POST /v2/models/ensemble/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}"
                                   .encode())
                connection.recv(100)
            done["cancelled"] += 1
        else:
            try:
                client.complete(PROMPT, temperature=-1.0)
                failures.append("a bad request was accepted")
            except InvalidRequest:
                done["refused"] += 1

    def run(seed: int) -> None:
        rng = random.Random(seed)
        with Client(server.grpc_url) as client:
            while time.monotonic() < deadline:
                try:
                    one(client, rng)
                except CompletionError as error:
                    if error.code != "UNAVAILABLE" or "queue" not in str(error):
                        failures.append(repr(error))
                    done["overloaded"] += 1

    async def run_asyncio() -> None:
        async with AsyncClient(server.grpc_url) as client:
            while time.monotonic() < deadline:
                tasks = [asyncio.create_task(client.complete(PROMPT, max_tokens=24)) for _ in range(3)]
                await asyncio.sleep(0.1)
                tasks[0].cancel()
                for result in await asyncio.gather(*tasks, return_exceptions=True):
                    if isinstance(result, CompletionError):
                        done["overloaded"] += 1
                    elif not isinstance(result, BaseException):
                        check(result.text)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(10)]
    threads.append(threading.Thread(target=lambda: asyncio.run(run_asyncio())))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[:3]
    assert min(done.values()) > 0, done
    wait_idle(server, 5)
    values = metrics(server)
    assert values["free_pages"] == values["pages"]
    assert generate(server, text_input=PROMPT, max_tokens=24)["text_output"] == expected
    assert server.poll() is None


def test_every_ending_lets_the_models_unload(start: Callable[..., TritonServer]) -> None:
    """A request that Triton still holds keeps its model from unloading. (Under the storm above 24.10 itself loses some.)"""
    server = start(slots=1, queue=8)
    with Client(server.grpc_url) as client:
        for seconds in (0, 0.005, 0.05, 0.3):
            client.complete(PROMPT, max_tokens=4)
            list(client.stream(PROMPT, max_tokens=4))
            with client.stream(PROMPT, **LONG):
                time.sleep(seconds)
            wait_idle(server)
            with client.stream(PROMPT, **LONG) as stream, client.stream(PROMPT, **LONG) as waiting:
                next(stream)
                time.sleep(seconds)
                waiting.close()
            wait_idle(server)
            try:
                client.complete(PROMPT, temperature=-1.0)
            except InvalidRequest:
                pass
    server.stop()
    log = server.log.read_text()
    assert "Exit timeout expired" not in log and log.count("successfully unloaded") == 4
