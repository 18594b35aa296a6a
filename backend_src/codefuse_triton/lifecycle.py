"""How the process that started tritonserver and the generator inside it speak: three files named by the server's pid.

drain    made by whoever stops the server: how many seconds running requests may still take
drained  made by the generator when, after that, its last request has been answered
failed   made by the generator when its device has failed and nothing more can be served: the reason
"""
from __future__ import annotations

import os
import tempfile
from pathlib import Path

KINDS = ("drain", "drained", "failed")


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
