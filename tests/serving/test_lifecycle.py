"""Starting, refusing to start, overload, draining and stopping, with servers of the tests' own."""
from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Callable

import pytest
from codefuse_triton_client import Client, CompletionError
from serving_helpers import LONG, PROMPT, ROOT, SLOW, PlainStream, free_ports, make_repository, metrics, tensor, wait_until

from codefuse_triton.triton_server import StartError, TritonServer

Start = Callable[..., TritonServer]


def broken_copy(weights: Path, target: Path, breaking: Callable[[Path], None]) -> Path:
    shutil.copytree(weights, target)
    breaking(target)
    return target


def truncate(directory: Path) -> None:
    (file,) = directory.glob("*.safetensors")
    os.truncate(file, file.stat().st_size // 2)


def bad_config(directory: Path) -> None:
    file = directory / "config.json"
    file.write_text(file.read_text().replace('"layer"', '"batch"'))


def no_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.model").unlink()


def empty(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


def reason(server: TritonServer, model: str) -> str:
    """Why the model did not load."""
    with pytest.raises(StartError) as error:
        server.wait_ready(60)
    reasons = [part for part in str(error.value).split("; ") if f"{model}: " in part]
    assert reasons, str(error.value)
    return str(error.value)[str(error.value).index(reasons[0]):]


def test_broken_weights(start: Start, weights: Path, tmp_path: Path) -> None:
    """Side by side: a server that ends takes seconds, in which it does nothing."""
    cases = [(truncate, "generator", ".safetensors"), (bad_config, "generator", "norm"), (no_tokenizer, "tokenizer", "tokenizer"), (empty, "generator", "config.json")]
    servers = [start(ready=False, weights_dir=broken_copy(weights, tmp_path / breaking.__name__, breaking)) for breaking, _, _ in cases]
    for server, (_, model, said) in zip(servers, cases):
        assert said in reason(server, model)


def test_settings_are_checked(start: Start) -> None:
    cases = [(dict(slots="0"), "slots is '0'; it must be between 1 and"), (dict(device="tpu"), "tpu"), (dict(dtype="float16", device="cpu"), "float16"),
             (dict(weights="/nonexistent"), "/nonexistent")]
    servers = [start(ready=False, **settings) for settings, _ in cases]
    for server, (_, said) in zip(servers, cases):
        assert said in reason(server, "generator")


def test_settings_are_used(start: Start) -> None:
    server = start(slots=2, max_len=100, queue=1, exclude_input_in_output="false", prefill_tokens=16, threads=1, responses_per_s=10)
    values = metrics(server)
    assert (values["slots"], values["queue"]) == (2, 1)
    with Client(server.grpc_url) as client:
        assert client.complete(PROMPT, max_tokens=8).text.startswith(PROMPT)
        with pytest.raises(CompletionError, match="100"):
            client.complete(PROMPT, max_tokens=99)
        started = time.monotonic()
        chunks = list(client.stream(PROMPT, max_tokens=80))  # 10 responses a second: tokens travel together
        assert len(chunks) <= (time.monotonic() - started) * 10 + 2
        assert "".join(c.text for c in chunks) == client.complete(PROMPT, max_tokens=80).text


def test_overload(start: Start) -> None:
    """A full queue refuses at once and says so; what was accepted is served."""
    server = start(slots=1, queue=2, **SLOW)
    with Client(server.grpc_url) as client:
        first = client.stream(PROMPT, **LONG)
        next(first)
        waiting = [client.stream(PROMPT, max_tokens=4) for _ in range(2)]
        threads = [threading.Thread(target=lambda s=s: list(s)) for s in waiting]
        for thread in threads:
            thread.start()
        wait_until(lambda: metrics(server)["waiting"] == 2, 3, "two requests wait")
        with pytest.raises(CompletionError, match="queue") as error:
            client.complete(PROMPT, max_tokens=4)
        assert error.value.code == "UNAVAILABLE"
        first.close()
        for thread in threads:
            thread.join(20)
        assert [s.result.num_output_tokens for s in waiting] == [4, 4]


def test_port_in_use(start: Start, weights: Path, tmp_path: Path) -> None:
    server = start()
    other = TritonServer(server.repository, http_port=free_ports(1)[0], grpc_port=server.grpc_port, metrics_port=free_ports(1)[0])
    with pytest.raises(StartError, match=f"grpc port {server.grpc_port} .*GRPC_PORT="):
        other.start()


def test_drain_lets_requests_finish_and_refuses_new_ones(start: Start) -> None:
    server = start(**SLOW)
    pid = server.pid
    with Client(server.grpc_url) as client:
        running = client.stream(PROMPT, max_tokens=400, ignore_eos=True)
        next(running)
        idle = PlainStream(server, "ensemble", [tensor("text_input", "BYTES", [b"a"]), tensor("max_tokens", "INT32", [1])])
        list(idle)  # its stream stays open
        stopping = threading.Thread(target=server.stop, kwargs=dict(drain_s=30, grace_s=3))
        stopping.start()
        time.sleep(0.3)
        with pytest.raises(CompletionError, match="shutting down") as error:
            client.complete(PROMPT, max_tokens=1)
        assert error.value.code == "UNAVAILABLE"
        for _ in running:
            pass
        assert running.result.num_output_tokens == 400
        stopping.join(25)
        idle.close()
    assert not stopping.is_alive() and not Path(f"/proc/{pid}").exists()


def test_serve_tool_drains_on_sigterm(weights: Path, tmp_path: Path) -> None:
    """tools/serve.py: a stream that does not end in time gets a clear error; process, files and shared memory are gone."""
    repository = make_repository(tmp_path / "models", weights, **SLOW)
    http_port, grpc_port, metrics_port = free_ports(3)
    process = subprocess.Popen(
        [sys.executable, ROOT / "tools" / "serve.py", "--repository", repository, "--http-port", str(http_port), "--grpc-port",
         str(grpc_port), "--metrics-port", str(metrics_port), "--drain", "1", "--demo"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.extend(process.stdout))
    reader.start()
    try:
        wait_until(lambda: any("Ctrl-C" in line for line in output), 60, "the server is up")
        assert any("ready after" in line for line in output) and any("generate_stream" in line for line in output)
        assert any("tokens in" in line for line in output)  # the demo's statistics
        with Client(f"127.0.0.1:{grpc_port}") as client:
            stream = client.stream(PROMPT, **LONG)
            next(stream)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(CompletionError, match="shutting down; the text is incomplete") as error:
                for _ in stream:
                    pass
            assert error.value.code == "UNAVAILABLE"
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()
    assert "stopped" in "".join(output)
    assert not list(Path("/dev/shm").glob(f"codefuse-*-{process.pid}-*"))


def test_serve_tool_reports_a_port_in_use(weights: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = subprocess.run([sys.executable, ROOT / "tools" / "serve.py", "--http-port", str(port)], capture_output=True, text=True,
                                timeout=30)
    assert result.returncode == 1 and f"http port {port}" in result.stderr and "HTTP_PORT=" in result.stderr
