"""The engine as a service: submit from any thread, one sender thread, cancellation, draining.

A reply is where a request's chunks go. Only the sender thread touches a reply after submit() has returned.
"""
from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Protocol

import numpy as np
import numpy.typing as npt

from . import Engine, Outbox, lifecycle
from .request import Request
from .result import best

log = logging.getLogger(__name__)
LOOK_S = 0.1  # between looks at is_cancelled, the drain file and the statistics
HEARTBEAT_S = 0.1  # a request that asks for it gets an empty chunk after so long without one,
HEARTBEATS_PER_S = 200  # or later when many do
WINDOW = 4  # chunks that the detokenizer may be behind when more are fetched; without a limit they would pile up before it,
STALL_S = 0.25  # and a cancellation behind them. It counts as gone when it does not move for so long.
SHUTTING_DOWN = "the server is shutting down"


class Reply(Protocol):
    # sequence: which answer the chunk belongs to; last: of all chunks of the request
    def send(self, chunk: Any, serial: int, echo: bytes, error: str, sequence: int, last: bool) -> None: ...

    def heartbeat(self, uid: int, serial: int) -> None: ...

    def is_cancelled(self) -> bool: ...


class Draining(RuntimeError):
    """The server takes no new requests."""


@dataclass(eq=False)
class _Live:
    reply: Reply
    echo: bytes  # sent with the first chunk of every answer
    heartbeat: bool  # behind it is the detokenizer
    last_send: float
    count: int  # answers to be sent
    sequences: dict[int, int] = field(default_factory=dict)  # uid -> index, of all that are generated
    open: int = 0  # that have not ended
    ended: list[Any] = field(default_factory=list)  # their chunks, where the best are chosen
    cancelled: bool = False
    error: str = ""  # why it was cancelled, if not by its client


class Service:
    """server_pid: whose lifecycle files to watch, 0: none. name: the model's. on_stats is called by the sender with Engine.stats()."""

    def __init__(self, engine: Engine, *, responses_per_s: int = 1500, server_pid: int = 0, name: str = "generator",
                 on_stats: Callable[[dict[str, Any]], None] = lambda stats: None) -> None:
        self._engine = engine
        self._gap_s = 1.0 / responses_per_s
        self._server_pid = server_pid
        self._name = name
        self._on_stats = on_stats
        self._drain_deadline = 0.0  # monotonic; 0: not draining
        self._lock = threading.Lock()  # submitting and registering are one step for the sender
        self._live: dict[int, _Live] = {}  # by the uid of each of its sequences
        self._outbox = Outbox()
        self._closing = False
        # of the last chunk that went to the detokenizer; versions of one model, one being unloaded, share that: each knows its own
        self._serial = self._first = os.getpid() << 40
        self._written_off = self._first  # up to this one they are not waited for
        self._seen: npt.NDArray[np.int64] | None = None  # [1] the serial of the last one that it has seen
        if server_pid:
            lifecycle.register(server_pid)
        self._sender = threading.Thread(target=self._run, name="sender", daemon=True)
        self._sender.start()

    def submit(self, request: Request, reply: Reply) -> int:
        """The uid of the first answer; cancel() takes that of any. ValueError, QueueFull, DeviceError, Draining: the reply has not been used."""
        options = dict(request.submit)
        if request.end_id >= 0:
            if request.end_id >= self._engine.config["vocab"]:
                raise ValueError(f"end_id is {request.end_id}; expected -1..{self._engine.config['vocab'] - 1}")
            options["eos_ids"] = [request.end_id]
        with self._lock:
            if self._drain_deadline or self._closing:
                raise Draining(f"{SHUTTING_DOWN}; send the request to another one")
            if options["beam_width"] > 1:
                first = self._engine.submit(request.prompt, outbox=self._outbox, **options)
                uids = list(range(first, first + request.count))
            else:
                uids = self._engine.submit_many(request.prompt, request.best_of, outbox=self._outbox, **options)
            live = _Live(reply, request.echo, request.heartbeat, time.monotonic(), request.count,
                         {uid: i for i, uid in enumerate(uids)}, len(uids))
            self._live.update(dict.fromkeys(uids, live))
        return uids[0]

    def cancel(self, uid: int, error: str = "") -> None:
        with self._lock:
            live = self._live.get(uid)
            if live is None or live.cancelled:
                return
            live.cancelled, live.error = True, error
        for each in live.sequences:
            self._engine.cancel(each)

    def close(self) -> None:
        """Every request is answered, running ones with finish_reason cancelled."""
        self._closing = True
        self._engine.close()
        self._sender.join(timeout=10)
        self._outbox.close()
        if self._server_pid:
            lifecycle.unregister(self._server_pid)

    def _run(self) -> None:
        next_look = 0.0
        while not (self._closing and not self._live):
            chunks = self._outbox.poll(LOOK_S / 2)
            started = time.monotonic()
            for chunk in chunks:
                self._survive(self._send, chunk)
            if started >= next_look:
                next_look = started + LOOK_S
                self._survive(self._look, started)
            # Triton has no back-pressure: pace the sends; what arrives meanwhile is merged in the outbox
            pause = len(chunks) * self._gap_s - (time.monotonic() - started)
            if pause > 0:
                time.sleep(pause)
            if self._seen is not None:
                self._wait_for_detokenizer()

    def _wait_for_detokenizer(self) -> None:
        seen, moved = self._first, time.monotonic()
        while self._serial - max(seen, self._written_off) > WINDOW:
            now = int(self._seen[0])
            if now != seen and self._first <= now <= self._serial:
                seen, moved = now, time.monotonic()
            elif time.monotonic() - moved > STALL_S:  # chunks of a vanished client may be lost on the way
                self._written_off = self._serial
                self._seen = None  # or the detokenizer was loaded anew: look for its file again
                return
            else:
                time.sleep(0.0005)

    def _next_serial(self, live: _Live) -> int:
        self._serial += live.heartbeat
        return self._serial if live.heartbeat else 0

    def _survive(self, step: Callable[[Any], None], argument: Any) -> None:
        try:
            step(argument)
        except Exception:  # one reply's trouble must not silence the others
            log.exception("sender: %s failed", step.__name__)

    def _send(self, chunk: Any) -> None:
        with self._lock:
            live = self._live.get(chunk.uid)
            if live is None:  # of a request that was refused as a whole, or has failed
                return
            error = live.error if chunk.finish_reason == "cancelled" else chunk.error
            if chunk.finish_reason:
                del self._live[chunk.uid]
                live.open -= 1
            if error:  # said once, for all answers
                for uid in live.sequences:
                    self._live.pop(uid, None)
        if error or len(live.sequences) == live.count:
            self._reply(live, chunk, error, live.sequences[chunk.uid], bool(error) or live.open == 0)
            return
        live.ended.append(chunk)  # the best are not streamed: it is all of an answer
        if live.open == 0:
            for i, each in enumerate(best(live.ended, live.count)):
                self._reply(live, each, "", i, i == live.count - 1)

    def _reply(self, live: _Live, chunk: Any, error: str, sequence: int, last: bool) -> None:
        live.last_send = time.monotonic()
        live.reply.send(chunk, self._next_serial(live), live.echo if chunk.index == 0 else b"", error, sequence, last)

    def _look(self, now: float) -> None:
        with self._lock:
            live = {entry: uid for uid, entry in self._live.items() if not entry.cancelled}  # with an answer that has not ended
        beat_s = max(HEARTBEAT_S, sum(entry.heartbeat for entry in live) / HEARTBEATS_PER_S)
        for entry, uid in live.items():
            if entry.reply.is_cancelled():
                self.cancel(uid)
            elif entry.heartbeat and now - entry.last_send >= beat_s:
                entry.last_send = now
                entry.reply.heartbeat(uid, self._next_serial(entry))
        stats = self._engine.stats()
        self._on_stats(stats)
        if self._server_pid:
            if self._seen is None:
                self._seen = lifecycle.read_progress(self._server_pid, self._name)
            if stats.get("error"):
                lifecycle.put(self._server_pid, "failed", str(stats["error"]))
            for uid in lifecycle.forwarded_cancels(self._server_pid):
                self.cancel(uid)
            self._drain(now)

    def _drain(self, now: float) -> None:
        if not self._drain_deadline:
            text = lifecycle.get(self._server_pid, "drain")
            if not text:  # absent, or being written
                return
            with self._lock:
                self._drain_deadline = now + float(text)
        with self._lock:
            uids = list(self._live)
        if not uids:
            lifecycle.unregister(self._server_pid)
        elif now >= self._drain_deadline:
            for uid in uids:
                self.cancel(uid, f"{SHUTTING_DOWN}; the text is incomplete")
