"""Finding a tritonserver, and what is said when something it needs is missing."""
from __future__ import annotations

import os
import socket
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest

from codefuse_triton import triton_server
from codefuse_triton.triton_server import PYTHON, StartError, TritonServer, find_server, libpython_directory


@pytest.fixture
def no_server_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_server.shutil, "which", lambda name: None)
    monkeypatch.setattr(triton_server, "libpython_directory", lambda: Path("/somewhere"))


def install(root: Path, stub_python: str) -> Path:
    """tritonserver as in NVIDIA's image."""
    for file, content in (("bin/tritonserver", b"#!"), ("backends/python/triton_python_backend_stub", f"libpython{stub_python}.so.1.0".encode())):
        (root / file).parent.mkdir(parents=True)
        (root / file).write_bytes(content)
        (root / file).chmod(0o755)
    return root / "bin"


def test_the_server_on_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(install(tmp_path, PYTHON)), prepend=os.pathsep)
    monkeypatch.setattr(triton_server, "libpython_directory", lambda: Path("/somewhere"))
    found = find_server()
    assert found.binary == tmp_path / "bin" / "tritonserver" and not found.backend_files


def test_a_stub_for_another_python_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(install(tmp_path, "3.7")), prepend=os.pathsep)
    with pytest.raises(StartError, match=f"made for Python 3.7, this is Python {PYTHON}"):
        find_server()


def test_no_server(no_server_on_path: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_server.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StartError, match=r"pip install 'codefuse-triton\[server\]'"):
        find_server()


def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: str) -> None:
    (tmp_path / "pytriton/tritonserver/python_backend_stubs" / python).mkdir(parents=True)
    (tmp_path / "pytriton/tritonserver/python_backend_stubs" / python / "triton_python_backend_stub").touch()
    (tmp_path / "pytriton/tritonserver/backends/python").mkdir(parents=True)
    monkeypatch.setattr(triton_server.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "pytriton/__init__.py")))


def test_the_wheel_has_no_stub_for_this_python(no_server_on_path: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(tmp_path, monkeypatch, "3.7")
    with pytest.raises(StartError, match=f"no Python backend stub for Python {PYTHON}, only for 3.7"):
        find_server()


def test_numpy_2_with_the_wheel(no_server_on_path: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(tmp_path, monkeypatch, PYTHON)
    monkeypatch.setattr(numpy, "__version__", "2.3.1")
    with pytest.raises(StartError, match="numpy 2.3.1 .*pip install 'numpy<2'"):
        find_server()
    monkeypatch.setattr(numpy, "__version__", "1.26.4")
    assert find_server().stub.parent.name == PYTHON


def test_libpython(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = dict(sysconfig.get_config_vars(), LIBDIR=str(tmp_path), MULTIARCH="")
    monkeypatch.setattr(triton_server.sysconfig, "get_config_vars", lambda: variables)
    monkeypatch.setattr(triton_server.sys, "base_prefix", str(tmp_path))
    with pytest.raises(StartError, match=f"libpython{PYTHON}.so.1.0 is missing .*apt-get install libpython{PYTHON}"):
        libpython_directory()
    (tmp_path / f"libpython{PYTHON}.so.1.0").touch()
    assert libpython_directory() == tmp_path


def test_stale_shared_memory_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_server, "_SHM", tmp_path)
    dead, ours, foreign = (tmp_path / name for name in (
        triton_server._SHM_NAME.format(pid=4194999) + "abc", triton_server._SHM_NAME.format(pid=os.getpid()) + "abc", "codefuse-1-4194999-abc"))
    for region in (dead, ours, foreign):
        region.touch()
    triton_server._remove_stale_shared_memory()
    assert not dead.exists() and ours.exists() and foreign.exists()


def test_port_in_use_names_the_setting() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = TritonServer("models", http_port=taken.getsockname()[1])
        with pytest.raises(StartError, match="HTTP_PORT="):
            server._check_ports()
