"""Find, start, watch, drain and stop a tritonserver process."""
from __future__ import annotations

import ctypes
import http.client
import importlib.util
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Sequence

from . import lifecycle

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_SHM = Path("/dev/shm")
_PID_NAMESPACE = os.stat("/proc/self/ns/pid").st_ino  # containers may share /dev/shm
_SHM_NAME = f"codefuse-{_PID_NAMESPACE}-{{pid}}-"  # pid: of the process that starts the server
_FLUSH_S = 0.3  # the last chunks pass the detokenizer and the network


class StartError(RuntimeError):
    """The server could not be started; the message says why and what to do."""


@dataclass(frozen=True)
class Installation:
    binary: Path
    stub: Path  # triton_python_backend_stub of this interpreter's version
    backend_files: tuple[Path, ...]  # of the Python backend, where a backend directory must be put together
    libraries: tuple[Path, ...]  # for LD_LIBRARY_PATH


def find_server() -> Installation:
    """The tritonserver on PATH, else the one of the nvidia-pytriton wheel."""
    on_path = shutil.which("tritonserver")
    if on_path:
        binary = Path(on_path).resolve()
        stub = binary.parent.parent / "backends" / "python" / "triton_python_backend_stub"
        if not stub.exists():
            raise StartError(f"{binary} has no Python backend: {stub} is missing")
        version = re.search(rb"libpython(3\.\d+)\.so", stub.read_bytes())
        if version and version.group(1).decode() != PYTHON:
            raise StartError(f"{stub} is made for Python {version.group(1).decode()}, this is Python {PYTHON}: use that "
                             "Python, or take this tritonserver off PATH to use the nvidia-pytriton wheel's")
        return Installation(binary, stub, (), (libpython_directory(),))
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.origin:
        raise StartError("no tritonserver on PATH and no nvidia-pytriton wheel: pip install 'codefuse-triton[server]', "
                         "or run inside NVIDIA's tritonserver image")
    package = Path(spec.origin).parent
    root = package / "tritonserver"
    stub = root / "python_backend_stubs" / PYTHON / "triton_python_backend_stub"
    if not stub.exists():
        found = sorted((p.name for p in (root / "python_backend_stubs").iterdir()), key=lambda v: int(v.split(".")[1]))
        raise StartError(f"nvidia-pytriton has no Python backend stub for Python {PYTHON}, only for {', '.join(found)}")
    import numpy
    if int(numpy.__version__.split(".")[0]) >= 2:
        raise StartError(f"numpy {numpy.__version__} does not work with the Python stub of nvidia-pytriton 0.7 "
                         "(strings would be read as garbage): pip install 'numpy<2'")
    files = tuple(p for p in (root / "backends" / "python").iterdir() if p.is_file())
    return Installation(root / "bin" / "tritonserver", stub, files,
                        (libpython_directory(), package.parent / "nvidia_pytriton.libs"))


def libpython_directory() -> Path:
    """Where this interpreter's libpython3.X.so.1.0 is: the stub must not pick up another one."""
    name = f"libpython{PYTHON}.so.1.0"
    variables = sysconfig.get_config_vars()
    libdir, multiarch = variables.get("LIBDIR") or "/usr/lib", variables.get("MULTIARCH") or ""
    places = [Path(libdir), Path(libdir) / multiarch, Path(sys.base_prefix) / "lib", Path(sys.base_prefix) / "lib" / multiarch,
              Path(sys.base_prefix) / "lib64"]
    for place in places:
        if (place / name).exists():
            return place
    raise StartError(f"{name} is missing (looked in {', '.join(dict.fromkeys(map(str, places)))}): Triton's Python backend "
                     f"needs the shared library of Python {PYTHON}. Debian and Ubuntu: apt-get install libpython{PYTHON}; "
                     "pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared pyenv install")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _children(pid: int) -> list[int]:
    try:
        return [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    except OSError:
        return []


def _is_stub(pid: int) -> bool:
    try:
        return b"triton_python_backend_stub" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _remove_shared_memory(name_start: str) -> None:
    for region in _SHM.glob(name_start + "*"):
        region.unlink(missing_ok=True)


def _remove_stale_shared_memory() -> None:
    """Regions of servers whose starter died without stopping them."""
    for region in _SHM.glob(_SHM_NAME.format(pid="*") + "*"):
        pid = region.name.split("-")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            region.unlink(missing_ok=True)


class TritonServer:
    """with TritonServer(repository) as server: ...  starts, waits until every model is ready, drains and stops."""

    def __init__(self, repository: Path | str, *, host: str = "127.0.0.1", http_port: int = 8000, grpc_port: int = 8001,
                 metrics_port: int = 8002, log: Path | str | None = None, options: Sequence[str] = ()) -> None:
        """log: where the server's output goes, by default a file in a directory of ours that stop() removes."""
        self.repository = Path(repository)
        self.host, self.http_port, self.grpc_port, self.metrics_port = host, http_port, grpc_port, metrics_port
        self._options = tuple(options)
        self._log = Path(log) if log else None
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: Path | None = None
        self._shm_prefix = _SHM_NAME.format(pid=os.getpid()) + secrets.token_hex(4)

    @property
    def http_url(self) -> str:
        return f"{self.host}:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        return f"{self.host}:{self.grpc_port}"

    @property
    def metrics_url(self) -> str:
        return f"http://{self.host}:{self.metrics_port}/metrics"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError("the server has not been started")
        return self._process.pid

    @property
    def log(self) -> Path:
        if self._log is None:
            raise RuntimeError("the server has not been started")
        return self._log

    def __enter__(self) -> TritonServer:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop(drain_s=0)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        installation = find_server()
        if not self.repository.is_dir():
            raise StartError(f"repository {self.repository}: no such directory; expected a Triton model repository")
        self._check_ports()
        _remove_stale_shared_memory()
        self._directory = Path(tempfile.mkdtemp(prefix="codefuse-triton-"))
        repository = self.repository.resolve()
        if not str(repository).isascii():  # the Python in Triton's stub finds no model.py there
            (self._directory / "models").symlink_to(repository)
            repository = self._directory / "models"
        command = [str(installation.binary), f"--model-repository={repository}", "--disable-auto-complete-config",
                   f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}", "--exit-timeout-secs=5"]
        for kind in ("http", "grpc", "metrics"):
            command += [f"--{kind}-address={self.host}", f"--{kind}-port={getattr(self, kind + '_port')}"]
        if not Path("/dev/nvidiactl").exists():
            command.append("--allow-gpu-metrics=false")
        if installation.backend_files:
            command.append(f"--backend-directory={self._backend_directory(installation)}")
        environment = dict(os.environ)
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment.get('PATH', '')}"  # the stub's sys.path: its python3
        inherited = environment.get("LD_LIBRARY_PATH")
        environment["LD_LIBRARY_PATH"] = ":".join([*map(str, installation.libraries)] + ([inherited] if inherited else []))
        self._log = self._log or self._directory / "tritonserver.log"
        try:
            log = open(self._log, "wb")
        except OSError as error:
            raise StartError(f"log {self._log} cannot be written: {error.strerror}") from None
        with log:
            # a session of its own: Ctrl-C reaches us, and we drain before the server hears of it
            self._process = subprocess.Popen(command + list(self._options), env=environment, stdin=subprocess.DEVNULL,
                                             stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                                             preexec_fn=_die_with_parent)
        lifecycle.clear(self.pid)

    def _check_ports(self) -> None:
        taken: dict[int, str] = {}
        for kind in ("http", "grpc", "metrics"):
            port = getattr(self, f"{kind}_port")
            if port in taken:
                raise StartError(f"{kind} port {port} is the {taken[port]} port too: choose another")
            taken[port] = kind
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((self.host, port))
                except OSError as error:
                    raise StartError(f"{kind} port {port} on {self.host} cannot be used ({error.strerror}): choose another, "
                                     f"for example {kind.upper()}_PORT={port + 1000}") from None

    def _backend_directory(self, installation: Installation) -> Path:
        directory = self._directory / "backends" / "python"
        directory.mkdir(parents=True)
        for file in installation.backend_files:
            (directory / file.name).symlink_to(file)
        stub = directory / installation.stub.name
        if os.access(installation.stub, os.X_OK):
            stub.symlink_to(installation.stub)
        else:
            shutil.copyfile(installation.stub, stub)
            stub.chmod(0o755)
        return directory.parent

    def wait_ready(self, timeout_s: float = 300, waiting: Callable[[float], None] = lambda seconds: None) -> None:
        """Until every model is ready. waiting(seconds so far) is called a few times a second."""
        started = time.monotonic()
        while not self.is_ready():
            seconds = time.monotonic() - started
            if self._process.poll() is not None:
                raise StartError(f"tritonserver ended with exit code {self._process.returncode}: {self.failures()}")
            if seconds > timeout_s:
                raise StartError(f"tritonserver was not ready after {timeout_s:.0f} s; its log: {self.log}")
            waiting(seconds)
            time.sleep(0.1)

    def is_ready(self) -> bool:
        connection = http.client.HTTPConnection(self.host, self.http_port, timeout=2)
        try:
            connection.request("GET", "/v2/health/ready")
            if connection.getresponse().status != 200:
                return False
            socket.create_connection((self.host, self.metrics_port), timeout=2).close()  # it opens last
            return True
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def failures(self) -> str:
        """Why models did not load, from the log; its last lines if it does not say."""
        if not self.log.is_file():  # a terminal or a pipe, such as /dev/stdout
            return f"the log went to {self.log}"
        text = self.log.read_text(errors="replace")
        reasons = re.findall(r"failed to load (?:model )?'([^']+)'(?: version \d+)?: (.*)", text)
        if reasons:
            return "; ".join(f"{model}: {reason.split(chr(92) + 'n' + chr(92) + 'nAt:')[0]}" for model, reason in reasons)
        return "\n".join(text.splitlines()[-15:])

    def poll(self) -> str | None:
        """None while the server works; else why it does not."""
        if self._process.poll() is not None:
            return f"tritonserver ended with exit code {self._process.returncode}"
        failed = lifecycle.get(self.pid, "failed")
        return None if failed is None else f"the engine has failed: {failed}"

    def stop(self, drain_s: float = 5.0, grace_s: float = 8.0) -> None:
        """Takes no new requests, lets running ones finish for drain_s, ends the rest with an error, then the server."""
        if self._process is not None:
            stubs = [child for child in _children(self.pid) if _is_stub(child)]
            if self._process.poll() is None:
                self._drain(drain_s)
                self._process.send_signal(signal.SIGTERM)
                try:
                    self._process.wait(grace_s)
                except subprocess.TimeoutExpired:  # an open stream holds it, even an idle one
                    self._process.kill()
                    self._process.wait()
            for stub in stubs:
                if _is_stub(stub):
                    os.kill(stub, signal.SIGKILL)
            lifecycle.clear(self.pid)
            _remove_shared_memory(self._shm_prefix)
            self._process = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _drain(self, drain_s: float) -> None:
        if not self.is_ready():
            return
        lifecycle.put(self.pid, "drain", str(drain_s))
        deadline = time.monotonic() + drain_s + 3
        while time.monotonic() < deadline and self._process.poll() is None:
            if not lifecycle.generators(self.pid):
                time.sleep(_FLUSH_S)
                return
            time.sleep(0.02)
