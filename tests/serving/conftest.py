from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Callable, Iterator

import pytest
from codefuse_triton_client import Client
from serving_helpers import ROOT, SLOW, make_repository, make_server, wait_idle

from codefuse_triton.triton_server import StartError, TritonServer, find_server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    try:
        find_server()
    except StartError as error:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=str(error)))


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, converted."""
    path = tmp_path_factory.mktemp("demo") / "weights"
    subprocess.run([sys.executable, ROOT / "tools" / "convert.py", ROOT / "tools" / "demo" / "checkpoint", path], check=True,
                   stdout=subprocess.DEVNULL)
    return path


@contextlib.contextmanager
def session_server(repository: Path) -> Iterator[TritonServer]:
    server = make_server(repository)
    try:
        server.start()
        server.wait_ready()
        yield server
    finally:
        server.stop(drain_s=0, grace_s=1)  # streams whose clients went in every way hold it longer


@pytest.fixture(scope="session")
def shared_server(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with session_server(make_repository(tmp_path_factory.mktemp("shared") / "models", weights)) as server:
        yield server


@pytest.fixture
def server(shared_server: TritonServer) -> Iterator[TritonServer]:
    """One server for all tests; a test must leave it idle."""
    yield shared_server
    wait_idle(shared_server)


@pytest.fixture(scope="session")
def shared_slow_server(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with session_server(make_repository(tmp_path_factory.mktemp("slow") / "models", weights, **SLOW)) as server:
        yield server


@pytest.fixture
def slow_server(shared_slow_server: TritonServer) -> Iterator[TritonServer]:
    """Another one, for what has to be there for a while; the first may compute on a GPU."""
    yield shared_slow_server
    wait_idle(shared_slow_server)


@pytest.fixture
def client(server: TritonServer) -> Iterator[Client]:
    with Client(server.grpc_url) as client:
        yield client


@pytest.fixture
def start(weights: Path, tmp_path: Path) -> Iterator[Callable[..., TritonServer]]:
    """start(slots=1, ...): a server of this test alone, stopped after it; ready=False does not wait for the models."""
    servers: list[TritonServer] = []

    def start_server(ready: bool = True, weights_dir: Path = weights, **settings: object) -> TritonServer:
        server = make_server(make_repository(tmp_path / f"models{len(servers)}", weights_dir, **settings))
        servers.append(server)
        server.start()
        if ready:
            server.wait_ready()
        return server

    yield start_server
    for server in servers:
        server.stop(drain_s=0, grace_s=1)
