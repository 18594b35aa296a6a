"""Model repositories, servers, metrics and plain tritonclient requests for the serving tests."""
from __future__ import annotations

import http.client
import json
import queue
import re
import shutil
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import tritonclient.grpc as triton_grpc

from codefuse_triton.triton_server import TritonServer

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "def read_lines(path):\n"
SLOW = dict(device="cpu", threads=1)  # settings with which
LONG = dict(max_tokens=2000, ignore_eos=True)  # is many seconds of tokens on any machine: what ends earlier was ended
NUMPY = {"BOOL": np.bool_, "INT32": np.int32, "FP32": np.float32, "UINT64": np.uint64, "INT64": np.int64}


def make_repository(path: Path, weights_dir: Path, **settings: Any) -> Path:
    """A copy of model_repository/ whose generator has these settings and the weights of weights_dir."""
    for model in ("tokenizer", "generator", "detokenizer", "ensemble"):
        source = ROOT / "model_repository" / model
        (path / model / "1").mkdir(parents=True)
        text = (source / "config.pbtxt").read_text()
        for name, value in (settings.items() if model == "generator" else ()):
            text, count = re.subn(rf'(key: "{name}", value: {{ string_value: )"[^"]*"', rf'\1"{value}"', text)
            assert count == 1, name
        (path / model / "config.pbtxt").write_text(text)
        if model != "ensemble":
            shutil.copy(source / "1" / "model.py", path / model / "1")
    for file in weights_dir.iterdir():
        (path / "generator" / "1" / file.name).symlink_to(file)
    return path


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def make_server(repository: Path) -> TritonServer:
    http_port, grpc_port, metrics_port = free_ports(3)
    return TritonServer(repository, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port,
                        log=repository.with_suffix(".log"))


def _samples(server: TritonServer) -> Iterator[tuple[str, dict[str, str], float]]:
    """(name, labels, value) of the codefuse_ metrics."""
    for line in urllib.request.urlopen(server.metrics_url, timeout=5).read().decode().splitlines():
        match = re.match(r"codefuse_(\w+?)(?:_total)?(?:\{([^}]*)\})? (\S+)$", line)
        if match:
            yield match[1], dict(re.findall(r'(\w+)="([^"]*)"', match[2] or "")), float(match[3])


def metrics(server: TritonServer) -> dict[str, float]:
    """The codefuse_ metrics of the server's one generator; finished requests as finished_REASON."""
    return {f"{name}_{labels['reason']}" if "reason" in labels else name: value for name, labels, value in _samples(server)}


def metric_of(server: TritonServer, name: str, model: str) -> float:
    """0 until the model has said it."""
    return next((value for n, labels, value in _samples(server) if (n, labels.get("model")) == (name, model)), 0.0)


def metrics_by_version(server: TritonServer, name: str, model: str) -> dict[str, float]:
    """The values of a metric of the model, summed over its other labels."""
    values: dict[str, float] = {}
    for n, labels, value in _samples(server):
        if (n, labels.get("model")) == (name, model):
            values[labels["version"]] = values.get(labels["version"], 0.0) + value
    return values


def busy(server: TritonServer) -> float:
    values = metrics(server)
    return values["running"] + values["waiting"]


def wait_until(condition: Any, timeout_s: float, what: str) -> float:
    """Seconds until condition() was true."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > timeout_s:
            raise AssertionError(f"after {timeout_s} s still not: {what}")
        time.sleep(0.02)
    return time.monotonic() - started


def wait_idle(server: TritonServer, timeout_s: float = 5.0) -> float:
    return wait_until(lambda: busy(server) == 0, timeout_s, "no request runs or waits")


def wait_busy(server: TritonServer, count: int = 1) -> None:
    wait_until(lambda: busy(server) >= count, 10, f"{count} requests run or wait")


def tensor(name: str, kind: str, values: Any, shape: list[int] | None = None) -> triton_grpc.InferInput:
    array = np.array(values, dtype=np.object_ if kind == "BYTES" else NUMPY[kind]).reshape(shape or [1, -1])
    result = triton_grpc.InferInput(name, list(array.shape), kind)
    result.set_data_from_numpy(array)
    return result


class PlainStream:
    """A stream as tensorrtllm_backend's own clients open it: tritonclient with a callback."""

    def __init__(self, server: TritonServer, model: str, inputs: list[triton_grpc.InferInput], **options: Any) -> None:
        self._client = triton_grpc.InferenceServerClient(server.grpc_url)
        self._responses: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client.start_stream(callback=lambda result, error: self._responses.put((result, error)))
        self._client.async_stream_infer(model, inputs, enable_empty_final_response=True, **options)

    def __iter__(self) -> Iterator[Any]:
        """Results until the final flag; raises InferenceServerException."""
        while True:
            result, error = self._responses.get(timeout=60)
            if error is not None:
                raise error
            response = result.get_response()
            if response.outputs:
                yield result
            if response.parameters["triton_final_response"].bool_param:
                return

    def cancel(self) -> None:
        self._client.stop_stream(cancel_requests=True)
        self._client.close()

    def close(self) -> None:
        self._client.stop_stream()
        self._client.close()


def post(server: TritonServer, path: str, body: Any, timeout_s: float = 60) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(server.host, server.http_port, timeout=timeout_s)
    try:
        connection.request("POST", path, body if isinstance(body, (bytes, str)) else json.dumps(body))
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def generate(server: TritonServer, **fields: Any) -> dict[str, Any]:
    status, body = post(server, "/v2/models/ensemble/generate", fields)
    assert status == 200, body
    return json.loads(body)


def generate_stream(server: TritonServer, **fields: Any) -> list[dict[str, Any]]:
    status, body = post(server, "/v2/models/ensemble/generate_stream", {"stream": True, **fields})
    assert status == 200, body
    return [json.loads(line[len(b"data: "):]) for line in body.splitlines() if line.startswith(b"data: ")]
