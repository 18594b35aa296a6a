"""How the processes around one tritonserver speak: small files named by the server's pid.

drain    made by whoever stops the server: how many seconds running requests may still take
drained  made by the generator when, after that, its last request has been answered
failed   made by the generator when its device has failed and nothing more can be served: the reason
progress made by the detokenizer: the serial of the last chunk that it has seen, an int64 that the generator reads
"""
from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

KINDS = ("drain", "drained", "failed", "progress")


def path(server_pid: int, kind: str) -> Path:
    return Path(tempfile.gettempdir()) / f"codefuse-triton-{server_pid}.{kind}"


def put(server_pid: int, kind: str, text: str = "") -> None:
    """Does nothing if the file exists; follows no link, since the directory may be open to everyone."""
    try:
        descriptor = os.open(path(server_pid, kind), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except OSError:
        return
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def get(server_pid: int, kind: str) -> str | None:
    """None: no such file, or it is another user's."""
    try:
        descriptor = os.open(path(server_pid, kind), os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    with os.fdopen(descriptor) as file:
        return file.read() if os.fstat(descriptor).st_uid in (0, os.getuid()) else None


def clear(server_pid: int) -> None:
    for kind in KINDS:
        path(server_pid, kind).unlink(missing_ok=True)


def make_progress(server_pid: int) -> npt.NDArray[np.int64]:
    """[1], shared with read_progress(); shared with nobody where the file cannot be made."""
    file = path(server_pid, "progress")
    try:
        file.unlink(missing_ok=True)
        put(server_pid, "progress", "\0" * 8)
        return _map(file, mmap.ACCESS_WRITE)
    except OSError:
        return np.zeros(1, np.int64)


def read_progress(server_pid: int) -> npt.NDArray[np.int64] | None:
    """None: there is none yet."""
    try:
        return _map(path(server_pid, "progress"), mmap.ACCESS_READ) if get(server_pid, "progress") else None
    except OSError:
        return None


def _map(file: Path, access: int) -> npt.NDArray[np.int64]:
    descriptor = os.open(file, (os.O_RDWR if access == mmap.ACCESS_WRITE else os.O_RDONLY) | os.O_NOFOLLOW)
    try:
        return np.frombuffer(mmap.mmap(descriptor, 8, access=access), np.int64)
    finally:
        os.close(descriptor)
