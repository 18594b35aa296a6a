"""The engine service with an engine and replies made here: pacing, merging, cancellation, draining, a reply that fails."""
from __future__ import annotations

import itertools
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator

import numpy as np
import pytest

from codefuse_triton import lifecycle, serve
from codefuse_triton.request import parse


class FakeOutbox:
    """Merges chunks of one uid, as the engine's does; a chunk here is its uid, its text and its end."""

    def __init__(self) -> None:
        self._arrived = threading.Condition()
        self._waiting: dict[int, SimpleNamespace] = {}
        self._index: dict[int, int] = {}
        self.polls = 0

    def put(self, uid: int, text: str, finish_reason: str = "", error: str = "", **fields: Any) -> None:
        with self._arrived:
            old = self._waiting.get(uid)
            self._waiting[uid] = SimpleNamespace(uid=uid, text=(old.text if old else "") + text, finish_reason=finish_reason, error=error, **fields)
            self._arrived.notify()

    def poll(self, timeout_s: float) -> list[SimpleNamespace]:
        with self._arrived:
            self.polls += 1
            self._arrived.wait_for(lambda: bool(self._waiting), timeout_s)
            chunks, self._waiting = list(self._waiting.values()), {}
            for c in chunks:
                c.index = self._index[c.uid] = self._index.get(c.uid, -1) + 1
            return chunks

    def close(self) -> None:
        pass


class FakeEngine:
    def __init__(self) -> None:
        self.config = {"eos_ids": [1], "vocab": 64}
        self.uids = itertools.count(1)
        self.submitted: dict[int, dict[str, Any]] = {}
        self.cancelled: list[int] = []
        self.error = ""

    def submit_many(self, ids: Any, count: int, *, outbox: FakeOutbox, **options: Any) -> list[int]:
        uids = [next(self.uids) for _ in range(count)]
        self.submitted.update(dict.fromkeys(uids, options))
        self.outbox = outbox
        return uids

    def submit(self, ids: Any, *, beam_count: int, **options: Any) -> int:  # with beams
        return self.submit_many(ids, beam_count, **options)[0]

    def cancel(self, uid: int) -> bool:
        self.cancelled.append(uid)
        self.outbox.put(uid, "", "cancelled")
        return True

    def stats(self) -> dict[str, Any]:
        return {"error": self.error}

    def close(self) -> None:
        for uid in self.submitted:
            if uid not in self.cancelled:
                self.outbox.put(uid, "", "cancelled")


class FakeReply:
    def __init__(self, fail: bool = False) -> None:
        self.sent: list[tuple[str, bytes, str]] = []
        self.of: list[int] = []  # the answer of each
        self.beats = 0
        self.gone = False
        self.fail = fail
        self.ended = threading.Event()

    def send(self, chunk: Any, serial: int, echo: bytes, error: str, sequence: int, last: bool) -> None:
        if self.fail:
            raise OSError("the client has gone")
        assert not self.ended.is_set() and (chunk.finish_reason or not last)
        self.sent.append((chunk.text, echo, error))
        self.of.append(sequence)
        if last:
            self.ended.set()

    def heartbeat(self, uid: int, serial: int) -> None:
        self.beats += 1

    def is_cancelled(self) -> bool:
        return self.gone


def request(heartbeat: bool = False, **options: Any) -> Any:
    tensors = {"input_ids": np.array([[5]], np.int32), "heartbeat": np.array([[heartbeat]]),
               "prompt_text": np.array([[b"echo"]], object)}
    return parse(tensors, {"exclude_input_in_output": False, **options})


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    monkeypatch.setattr(serve, "Outbox", FakeOutbox)
    services = []

    def make_service(**options: Any) -> tuple[FakeEngine, serve.Service]:
        engine = FakeEngine()
        services.append(serve.Service(engine, **options))
        return engine, services[-1]

    yield make_service
    for service in services:
        service.close()
        assert not service._sender.is_alive()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 3
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_first_chunk_at_once_and_the_echo_with_it(make: Any) -> None:
    engine, service = make(responses_per_s=1)
    reply = FakeReply()
    uid = service.submit(request(), reply)
    started = time.monotonic()
    engine.outbox.put(uid, "a")
    eventually(lambda: len(reply.sent) == 1)
    assert time.monotonic() - started < 0.5
    for text in "bcd":  # the sender pauses for a second: these travel together
        engine.outbox.put(uid, text)
        time.sleep(0.02)
    engine.outbox.put(uid, "e", "length")
    assert reply.ended.wait(3)
    assert reply.sent == [("a", b"echo", ""), ("bcde", b"", "")]


def test_a_failing_reply_does_not_silence_the_others(make: Any) -> None:
    engine, service = make()
    bad, good = FakeReply(fail=True), FakeReply()
    first, second = service.submit(request(), bad), service.submit(request(), good)
    engine.outbox.put(first, "x", "eos")
    engine.outbox.put(second, "y")
    engine.outbox.put(second, "z", "eos")
    assert good.ended.wait(3)
    assert "".join(text for text, _, _ in good.sent) == "yz"


def test_a_client_that_has_gone_is_cancelled_once(make: Any) -> None:
    engine, service = make()
    reply = FakeReply()
    uid = service.submit(request(), reply)
    reply.gone = True
    assert reply.ended.wait(3)
    service.cancel(uid)
    assert engine.cancelled == [uid]


def test_answers_are_told_apart_and_the_last_to_end_ends_the_request(make: Any) -> None:
    engine, service = make()
    reply = FakeReply()
    uid = service.submit(request(num_return_sequences=3, temperature=1), reply)
    for i, (text, end) in enumerate((("b", "eos"), ("c", ""), ("a", ""), ("A", "stop"))):
        engine.outbox.put(uid + (1, 2, 0, 0)[i], text, end)
        eventually(lambda: len(reply.sent) == i + 1)
    assert not reply.ended.is_set()
    engine.outbox.put(uid + 2, "C", "length")
    assert reply.ended.wait(3)
    assert reply.of == [1, 2, 0, 0, 2] and not service._live
    assert reply.sent == [("b", b"echo", ""), ("c", b"echo", ""), ("a", b"echo", ""), ("A", b"", ""), ("C", b"", "")]


@pytest.mark.parametrize("of", [0, 1, 2])
def test_cancelling_one_answer_cancels_all(make: Any, of: int) -> None:
    engine, service = make()
    reply, other = FakeReply(), FakeReply()
    uid = service.submit(request(num_return_sequences=3, temperature=1), reply)
    service.submit(request(), other)
    service.cancel(uid + of)
    assert reply.ended.wait(3) and sorted(reply.of) == [0, 1, 2]
    assert engine.cancelled == [uid, uid + 1, uid + 2] and not other.ended.is_set()


def test_a_client_that_goes_after_one_answer_is_seen(make: Any) -> None:
    engine, service = make()
    reply = FakeReply()
    uid = service.submit(request(num_return_sequences=3, temperature=1), reply)
    engine.outbox.put(uid, "first", "eos")
    while not reply.sent:
        time.sleep(0.01)
    reply.gone = True
    assert reply.ended.wait(3) and sorted(set(engine.cancelled) - {uid}) == [uid + 1, uid + 2]


def test_the_best_of_many(make: Any) -> None:
    engine, service = make()
    reply = FakeReply()
    uid = service.submit(request(num_return_sequences=2, best_of=4, temperature=1), reply)
    for i, (tokens, cum) in enumerate(((10, -20.0), (2, -1.0), (0, 0.0), (5, -1.0))):
        assert not reply.sent
        engine.outbox.put(uid + i, f"answer {i}", "length", num_output_tokens=tokens, cum_logprob=cum)
    assert reply.ended.wait(3)
    assert reply.sent == [("answer 3", b"echo", ""), ("answer 1", b"echo", "")] and reply.of == [0, 1]


def test_beams_are_answers(make: Any) -> None:
    engine, service = make()
    reply = FakeReply()
    uid = service.submit(request(num_return_sequences=2, beam_width=4), reply)
    engine.outbox.put(uid, "best", "eos")
    engine.outbox.put(uid + 1, "second", "length")
    assert reply.ended.wait(3)
    assert reply.sent == [("best", b"echo", ""), ("second", b"echo", "")] and reply.of == [0, 1]


def test_an_error_is_said_once(make: Any) -> None:
    engine, service = make()
    reply = FakeReply()
    uid = service.submit(request(num_return_sequences=3, temperature=1), reply)
    engine.outbox.put(uid, "a", "eos")
    for i in (1, 2):
        engine.outbox.put(uid + i, "", "error", error="CUDA error 700")
    assert reply.ended.wait(3)
    assert reply.sent == [("a", b"echo", ""), ("", b"echo", "CUDA error 700")] and not service._live


def test_heartbeats_only_where_asked_for_and_only_in_silence(make: Any) -> None:
    engine, service = make()
    silent, talking, plain = FakeReply(), FakeReply(), FakeReply()
    service.submit(request(heartbeat=True), silent)
    uid = service.submit(request(heartbeat=True), talking)
    service.submit(request(), plain)
    for _ in range(30):
        engine.outbox.put(uid, "t")
        time.sleep(0.02)
    assert 3 <= silent.beats <= 8 and talking.beats == plain.beats == 0


def test_end_tokens_add_to_or_replace_the_models(make: Any) -> None:
    engine, service = make()
    for options in (dict(), dict(end_id=7), dict(end_id=-1, stop_token_ids=[9])):
        service.submit(request(**options), FakeReply())
    assert [(engine.submitted[uid].get("eos_ids"), engine.submitted[uid]["stop_token_ids"]) for uid in (1, 2, 3)] == [(None, ()), ([7], ()), (None, (9,))]
    with pytest.raises(ValueError, match="end_id is 64; expected -1..63"):
        service.submit(request(end_id=64), FakeReply())


@pytest.fixture
def pid(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> int:
    monkeypatch.setattr(lifecycle.tempfile, "gettempdir", lambda: str(tmp_path))
    return os.getpid()


def test_cancels_forwarded_by_another_process(make: Any, pid: int, tmp_path: Path) -> None:
    engine, service = make(server_pid=pid)
    uids = [service.submit(request(), FakeReply()) for _ in range(3)]
    lifecycle.forward_cancel(pid, os.getpid(), uids[2])
    lifecycle.forward_cancel(pid, os.getpid(), uids[0])
    eventually(lambda: sorted(engine.cancelled) == [uids[0], uids[2]])
    lifecycle.forward_cancel(pid, 1, 5)  # no generator of this server
    eventually(lambda: not list(tmp_path.glob("*cancel*")))


def test_progress_is_any_number(pid: int) -> None:
    """Its bytes are no text, in whatever locale."""
    made = lifecycle.make_progress(pid, "generator")
    for serial in (0, 0xe7, 2**40 + 0xff80, 2**62):
        made[0] = serial
        assert lifecycle.read_progress(pid, "generator")[0] == serial
    lifecycle.put(pid, "failed", "caf\u00e9")
    assert lifecycle.get(pid, "failed") == "caf\u00e9"


def test_draining(make: Any, pid: int) -> None:
    engine, service = make(server_pid=pid)
    done, cut = FakeReply(), FakeReply()
    first, _ = service.submit(request(), done), service.submit(request(), cut)
    lifecycle.put(pid, "drain", "0.4")
    eventually(lambda: service._drain_deadline > 0)
    with pytest.raises(serve.Draining, match="shutting down"):
        service.submit(request(), FakeReply())
    assert lifecycle.generators(pid) == [pid]
    engine.outbox.put(first, "whole", "eos")
    assert cut.ended.wait(3)
    assert done.sent == [("whole", b"echo", "")]
    assert cut.sent == [("", b"echo", "the server is shutting down; the text is incomplete")]
    eventually(lambda: not lifecycle.generators(pid))
    lifecycle.clear(pid)
    assert lifecycle.get(pid, "drain") is None


def test_a_failed_device_is_reported(make: Any, pid: int) -> None:
    engine, service = make(server_pid=pid)
    engine.error = "CUDA error 700"
    eventually(lambda: lifecycle.get(pid, "failed") == "CUDA error 700")


def test_the_sender_waits_for_the_detokenizer(make: Any, pid: int) -> None:
    seen = lifecycle.make_progress(pid, "code")
    other = lifecycle.make_progress(pid, "other")
    engine, service = make(server_pid=pid, responses_per_s=10**6, name="code")
    reply = FakeReply()
    uid = service.submit(request(heartbeat=True), reply)
    eventually(lambda: service._seen is not None)
    seen[0] = other[0] = service._serial
    for _ in range(3 * serve.WINDOW):
        engine.outbox.put(uid, "t")
        time.sleep(0.01)
    assert len(reply.sent) == serve.WINDOW + 1  # then they travel together
    seen[0] = service._serial
    engine.outbox.put(uid, "t", "length")
    assert reply.ended.wait(1)
    assert sum(len(text) for text, _, _ in reply.sent) == 3 * serve.WINDOW + 1 and len(reply.sent) <= serve.WINDOW + 3
    lifecycle.clear(pid)


def test_a_detokenizer_that_does_not_move_stops_nothing(make: Any, pid: int) -> None:
    seen = lifecycle.make_progress(pid, "generator")
    seen[0] = 1 << 60  # by chunks of another version of the generator
    engine, service = make(server_pid=pid)
    reply = FakeReply()
    uid = service.submit(request(heartbeat=True), reply)
    eventually(lambda: service._seen is not None)
    for i in range(10):
        engine.outbox.put(uid, "t", "length" if i == 9 else "")
        time.sleep(0.02)
    assert reply.ended.wait(3)
    lifecycle.clear(pid)


def test_lifecycle_files_follow_no_link(pid: int, tmp_path: Any) -> None:
    victim = tmp_path / "victim"
    victim.write_text("kept")
    lifecycle.path(pid, "drain").symlink_to(victim)
    lifecycle.put(pid, "drain", "5")
    assert victim.read_text() == "kept" and lifecycle.get(pid, "drain") is None
