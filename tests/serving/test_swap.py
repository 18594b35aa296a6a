"""Named models side by side in one server, and generator versions swapped under load, twenty times, without anything left behind."""
from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from codefuse_triton_client import Client
from serving_helpers import LONG, PROMPT, ROOT, free_ports, metric_of, metrics_by_version, post, wait_until

from codefuse_triton import Engine, devices
from codefuse_triton.triton_server import TritonServer, _children, _is_stub

sys.path.insert(0, str(ROOT / "tools"))
import deploy as tool  # noqa: E402
import quantize  # noqa: E402

QUIET = dict(progress=contextlib.nullcontext(lambda n: None))
CYCLES, WARM = 20, 6  # the first ones fill the allocators


def make_server(repository: Path, *options: str) -> TritonServer:
    http_port, grpc_port, metrics_port = free_ports(3)
    return TritonServer(repository, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port, log=repository.with_suffix(".log"), options=options)


@pytest.fixture(scope="module")
def quantized(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("swap") / "q4"
    quantize.quantize(weights, path, "q4_g128", **QUIET)
    return path


def expected(weights: Path) -> str:
    with Engine(weights, device="cpu", threads=1) as engine:
        return engine.generate(PROMPT, max_tokens=40).text


def test_two_checkpoints_side_by_side(weights: Path, quantized: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    sources = {"plain": weights, "small-4.bit": quantized}
    for name, source in sources.items():
        tool.deploy(source, name, repository, settings={"device": "cpu", "threads": "1"})
    texts = {name: expected(source) for name, source in sources.items()}
    assert len(set(texts.values())) == 2
    with make_server(repository) as server:
        clients = {name: Client(server.grpc_url, model=name) for name in sources}
        streams = [(name, clients[name].stream(PROMPT, max_tokens=40)) for name in sources for _ in range(2)]
        for name, stream in streams:
            assert "".join(chunk.text for chunk in stream) == texts[name]
        for name in sources:  # whose client goes is told to its own generator
            wait_until(lambda: not any(metric_of(server, "running", f"{each}_generator") for each in sources), 5, "both are idle")
            stream = clients[name].stream(PROMPT, **LONG)
            next(stream)
            wait_until(lambda: metric_of(server, "running", f"{name}_generator") == 1, 5, "it runs")
            assert sum(metric_of(server, "running", f"{each}_generator") for each in sources) == 1
            stream.close()
            wait_until(lambda: metric_of(server, "running", f"{name}_generator") == 0, 5, "it has been cancelled")
        running = [clients[name].stream(PROMPT, max_tokens=60, ignore_eos=True) for name in sources]
        for stream in running:
            next(stream)
        stopping = threading.Thread(target=server.stop, kwargs=dict(drain_s=30))
        stopping.start()
        for stream in running:  # both are drained
            for _ in stream:
                pass
            assert stream.result.num_output_tokens == 60
        stopping.join(40)
        for client in clients.values():
            client.close()
    assert not stopping.is_alive()


def test_serve_tool_serves_a_named_model(weights: Path, tmp_path: Path) -> None:
    tool.deploy(weights, "named", tmp_path / "models", settings={"device": "cpu"})
    run = [sys.executable, str(ROOT / "tools" / "serve.py"), "--repository", str(tmp_path / "models"), "--demo", "--once"]
    for kind, port in zip(("http", "grpc", "metrics"), free_ports(3)):
        run += [f"--{kind}-port", str(port)]
    explicit = ["--", "--model-control-mode=explicit", "--load-model=named"]
    result = subprocess.run([*run, "--model", "named", *explicit], capture_output=True, text=True, timeout=90)
    assert result.returncode == 0 and "tokens in" in result.stdout and "/v2/models/named/generate" in result.stdout, result.stderr
    result = subprocess.run(run, capture_output=True, text=True, timeout=90)
    assert result.returncode == 1 and "no completion from model 'ensemble' (--model)" in result.stderr and "Traceback" not in result.stderr


def test_versions_served_in_place_one_after_the_other(weights: Path, quantized: Path, tmp_path: Path) -> None:
    """Each has its own weights and its own metrics; what an old one was doing when the new one came is told apart. Paths may have any character."""
    repository = tmp_path / "modèles"
    tool.deploy(shutil.copytree(weights, tmp_path / "poids é"), "m", repository, in_place=True, settings={"device": "cpu", "threads": "1"})
    texts = {"1": expected(weights), "2": expected(quantized)}
    with make_server(repository, "--model-control-mode=explicit", "--load-model=m") as server, Client(server.grpc_url, model="m") as client:
        for _ in range(2):
            assert client.complete(PROMPT, max_tokens=40).text == texts["1"]
        wait_until(lambda: metrics_by_version(server, "finished", "m_generator") == {"1": 2}, 5, "two have finished")
        old = client.stream(PROMPT, **LONG)
        next(old)
        tool.deploy(quantized, "m", repository, version=2, in_place=True)
        code, body = post(server, "/v2/repository/models/m_generator/load", {}, timeout_s=60)
        assert code == 200, body
        assert client.complete(PROMPT, max_tokens=40).text == texts["2"]
        wait_until(lambda: metrics_by_version(server, "running", "m_generator") == {"1": 1, "2": 0}, 5, "the old version has one request")
        assert metrics_by_version(server, "finished", "m_generator") == {"1": 2, "2": 1}
        assert metrics_by_version(server, "submitted", "m_generator") == {"1": 3, "2": 1}
        old.close()
        wait_until(lambda: versions(server) == {"2"} and len(stubs(server)) == 3, 20, "the old version has gone")
        assert set(metrics_by_version(server, "running", "m_generator")) == {"2"}


def test_a_version_is_loaded_anew(weights: Path, tmp_path: Path) -> None:
    """Two processes have the same version for a moment; the metrics are those of the one that stays."""
    repository = tmp_path / "models"
    tool.deploy(weights, "m", repository, in_place=True, settings={"device": "cpu", "threads": "1", "slots": "1"})
    config = repository / "m_generator" / "config.pbtxt"
    with make_server(repository, "--model-control-mode=explicit", "--load-model=m") as server, Client(server.grpc_url, model="m") as client:
        for slots in range(2, 8):
            old = client.stream(PROMPT, **LONG)
            next(old)
            text = config.read_text()
            config.write_text(text.replace(f'"slots", value: {{ string_value: "{slots - 1}"', f'"slots", value: {{ string_value: "{slots}"'))
            assert config.read_text() != text
            code, body = post(server, "/v2/repository/models/m_generator/load", {}, timeout_s=60)
            assert code == 200, body
            assert client.complete(PROMPT, max_tokens=4).num_output_tokens == 4
            old.close()
            wait_until(lambda: len(stubs(server)) == 3, 30, "the old process has gone")
            ends = re.findall(r"its requests ended: (.*)", server.log.read_text(errors="replace"))
            assert len(ends) == slots - 1 and "1 cancelled" in ends[-1], ends  # not what it would have said at its length
            client.complete(PROMPT, max_tokens=4)
            wait_until(lambda: metrics_by_version(server, "finished", "m_generator") == {"1": 2}, 5, "two have finished in the new one")
            assert metrics_by_version(server, "slots", "m_generator") == {"1": slots} and metrics_by_version(server, "running", "m_generator") == {"1": 0}


def status(pid: int, key: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key + ":")))


def stubs(server: TritonServer) -> list[int]:
    return [child for child in _children(server.pid) if _is_stub(child)]


def shared_memory(server: TritonServer) -> int:
    return len(list(Path("/dev/shm").glob(server._shm_prefix + "*")))


class Load(threading.Thread):
    """Short completions, one after the other; every one must succeed."""

    def __init__(self, server: TritonServer) -> None:
        super().__init__()
        self.server, self.texts, self.error, self.done = server, [], None, threading.Event()
        self.start()

    def run(self) -> None:
        try:
            with Client(self.server.grpc_url, model="m") as client:
                while not self.done.is_set():
                    self.texts.append(client.complete(PROMPT, max_tokens=40).text)
        except Exception as error:
            self.error = error


def swap(repository: Path, aside: Path, server: TritonServer) -> str:
    """Version 2 comes or goes; returns the version that is served afterwards."""
    there = repository / "m_generator" / "2"
    if there.exists():
        os.rename(there, aside)
    else:
        os.rename(aside, there)
    code, body = post(server, "/v2/repository/models/m_generator/load", {}, timeout_s=60)
    assert code == 200, body
    return "2" if there.exists() else "1"


def versions(server: TritonServer) -> set[str]:
    code, body = post(server, "/v2/repository/index", {"ready": True})
    assert code == 200, body
    return {m["version"] for m in json.loads(body) if m["name"] == "m_generator"}


def cycles(weights: Path, quantized: Path, tmp_path: Path, device: str, count: int, used: object) -> tuple[list[dict[str, int]], Load, int]:
    """Swaps versions `count` times under load; what is there after each: threads, shared memory, anonymous memory, and used()."""
    repository, aside = tmp_path / "models", tmp_path / "aside"
    tool.deploy(weights, "m", repository, settings={"device": device, "threads": "1", "kv_memory_mb": "256"})
    tool.deploy(quantized, "m", repository, version=2)
    os.rename(repository / "m_generator" / "2", aside)
    seen = []
    with make_server(repository, "--model-control-mode=explicit", "--load-model=m") as server:
        assert versions(server) == {"1"} and len(stubs(server)) == 3
        load = Load(server)
        try:
            for _ in range(count):
                version = swap(repository, aside, server)
                wait_until(lambda: versions(server) == {version} and len(stubs(server)) == 3, 20, f"version {version} alone is there")
                after = len(load.texts)
                wait_until(lambda: len(load.texts) > after + 1 or load.error, 20, "requests go on")
                assert load.error is None
                seen.append({"threads": status(server.pid, "Threads"), "regions": shared_memory(server), "anonymous_kb": status(server.pid, "RssAnon"),
                             "stubs_kb": sum(status(s, "RssAnon") for s in stubs(server)), "used": used()})
        finally:
            load.done.set()
            load.join(30)
        pid = server.pid
    return seen, load, pid


def test_generator_versions_are_swapped_under_load(weights: Path, quantized: Path, tmp_path: Path) -> None:
    seen, load, pid = cycles(weights, quantized, tmp_path, "cpu", CYCLES, lambda: 0)
    print("\n".join(map(str, seen)))
    assert load.error is None and set(load.texts) == {expected(weights), expected(quantized)}
    for key in ("threads", "regions"):
        assert max(s[key] for s in seen[WARM:]) <= max(s[key] for s in seen[:WARM]), key
    for key in ("anonymous_kb", "stubs_kb"):
        growth = min(s[key] for s in seen[-4:]) - max(s[key] for s in seen[:WARM])
        assert growth < (CYCLES - WARM) * 256, f"{key}: {growth} kB in {CYCLES - WARM} cycles"
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not any(name.startswith("cuda") for name in devices()[0]), reason=f"no CUDA device: {devices()[1]}")
def test_device_memory_comes_back(weights: Path, quantized: Path, tmp_path: Path) -> None:
    """By hand: nobody else may use the GPU meanwhile."""
    def used() -> int:
        query = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout)

    before = used()
    seen, load, _ = cycles(weights, quantized, tmp_path, "cuda:0", CYCLES, used)
    print("\n".join(map(str, seen)))
    assert load.error is None
    loaded = {parity: [s["used"] for s in seen[parity::2]] for parity in (0, 1)}  # of each version
    assert all(max(values) - min(values) <= 16 for values in loaded.values()), loaded  # MB
    assert used() - before <= 16
