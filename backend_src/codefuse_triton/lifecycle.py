"""How the processes around one tritonserver speak: small files named by the server's pid.

drain             made by whoever stops the server: how many seconds running requests may still take
generator-PID     there from when a generator's process takes requests until, after that, its last one has been answered
failed            made by a generator when its device has failed and nothing more can be served: the reason
cancel-PID        made by a generator's process that was told to cancel requests of another one, PID, whose version is on its way out: their uids
progress-NAME     made by the detokenizer of the generator NAME: the serial of the last chunk that it has seen, an int64 that the generator reads
"""
from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

_GENERATOR = "generator-"


def path(server_pid: int, kind: str) -> Path:
    return Path(tempfile.gettempdir()) / f"codefuse-triton-{server_pid}.{kind}"


def put(server_pid: int, kind: str, text: str = "") -> None:
    """Does nothing if the file exists; follows no link, since the directory may be open to everyone."""
    try:
        descriptor = os.open(path(server_pid, kind), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except OSError:
        return
    with os.fdopen(descriptor, "wb") as file:
        file.write(text.encode(errors="replace"))


def get(server_pid: int, kind: str) -> str | None:
    """None: no such file, or it is another user's."""
    try:
        descriptor = os.open(path(server_pid, kind), os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        return file.read().decode(errors="replace") if os.fstat(descriptor).st_uid in (0, os.getuid()) else None


def clear(server_pid: int) -> None:
    every = path(server_pid, "*")
    for file in every.parent.glob(every.name):
        file.unlink(missing_ok=True)


def register(server_pid: int) -> None:
    """Says that this process, a generator's, takes requests."""
    put(server_pid, f"{_GENERATOR}{os.getpid()}")


def unregister(server_pid: int) -> None:
    path(server_pid, f"{_GENERATOR}{os.getpid()}").unlink(missing_ok=True)


def generators(server_pid: int) -> list[int]:
    """The processes that take requests or have some to answer."""
    every = path(server_pid, f"{_GENERATOR}*")
    pids = [file.name.rpartition("-")[2] for file in every.parent.glob(every.name)]
    return [int(pid) for pid in pids if pid.isdigit() and Path(f"/proc/{pid}").exists()]


def forward_cancel(server_pid: int, pid: int, uid: int) -> None:
    """Tells the generator's process pid, if there is one, that the client of its request uid has gone."""
    if pid not in generators(server_pid):
        return
    try:
        descriptor = os.open(path(server_pid, f"cancel-{pid}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    except OSError:
        return
    with os.fdopen(descriptor, "wb") as file:
        file.write(f"{uid}\n".encode())


def forwarded_cancels(server_pid: int) -> list[int]:
    """The uids of this process's requests that others were told to cancel. One that comes meanwhile may be lost: it is told with every chunk."""
    kind = f"cancel-{os.getpid()}"
    text = get(server_pid, kind)
    if not text:
        return []
    path(server_pid, kind).unlink(missing_ok=True)
    return [int(line) for line in text.split() if line.isdigit()]


def make_progress(server_pid: int, generator: str) -> npt.NDArray[np.int64]:
    """[1], shared with read_progress(); shared with nobody where the file cannot be made."""
    file = path(server_pid, f"progress-{generator}")
    try:
        file.unlink(missing_ok=True)
        put(server_pid, f"progress-{generator}", "\0" * 8)
        return _map(file, mmap.ACCESS_WRITE)
    except OSError:
        return np.zeros(1, np.int64)


def read_progress(server_pid: int, generator: str) -> npt.NDArray[np.int64] | None:
    """None: there is none yet."""
    kind = f"progress-{generator}"
    try:
        return _map(path(server_pid, kind), mmap.ACCESS_READ) if get(server_pid, kind) else None
    except OSError:
        return None


def _map(file: Path, access: int) -> npt.NDArray[np.int64]:
    descriptor = os.open(file, (os.O_RDWR if access == mmap.ACCESS_WRITE else os.O_RDONLY) | os.O_NOFOLLOW)
    try:
        return np.frombuffer(mmap.mmap(descriptor, 8, access=access), np.int64)
    finally:
        os.close(descriptor)
