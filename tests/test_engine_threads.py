"""The engine under many threads, waits without the GIL, interrupts, the end of the process."""
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from codefuse_triton import Outbox
from fake_model import expected, fake_engine

PROMPT = [5, 6, 7]


def test_many_python_threads():
    with fake_engine(slots=8, queue=64, pages=24, max_len=200, depth=2) as e:
        failures = []

        def work(n):
            try:
                for i in range(25):
                    seed = n * 1000 + i
                    prompt = [1 + (n + i) % 60] * (1 + (7 * i + n) % 90)
                    want, finish = expected(prompt, 40, seed)
                    if i % 3 == 0:
                        chunks = list(e.stream(prompt, max_tokens=40, seed=seed))
                        got, end = [t for c in chunks for t in c.token_ids.tolist()], chunks[-1].finish_reason
                    elif i % 7 == 0:
                        with e.stream(prompt, max_tokens=40, seed=seed) as stream:
                            got, end = next(stream).token_ids.tolist(), finish
                        want = want[: len(got)]
                    else:
                        r = e.generate(prompt, max_tokens=40, seed=seed)
                        got, end = r.token_ids.tolist(), r.finish_reason
                    if (got, end) != (want, finish):
                        failures.append((prompt, seed))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
        assert not failures and not any(t.is_alive() for t in threads)


def test_waiting_holds_no_gil():
    with fake_engine(step_us=200_000) as e:
        done = threading.Event()
        thread = threading.Thread(target=lambda: (e.generate(PROMPT, max_tokens=2, ignore_eos=True), done.set()))
        start, count = time.monotonic(), 0
        thread.start()
        while not done.is_set():
            count += 1
            time.sleep(0.001)
        assert count > 100 and time.monotonic() - start >= 0.4
        thread.join()


def test_outbox_poll_and_close():
    box = Outbox()
    start = time.monotonic()
    assert box.poll(0) == [] and box.poll(0.15) == [] and 0.15 <= time.monotonic() - start < 1
    result = []
    thread = threading.Thread(target=lambda: result.append(box.poll()))
    thread.start()
    time.sleep(0.05)
    assert thread.is_alive() and not box.closed
    box.close()
    thread.join(2)
    assert result == [[]] and box.closed and box.poll() == []


def test_ctrl_c_interrupts_a_wait():
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Outbox().poll(30)
    assert time.monotonic() - start < 2


def test_process_ends_with_a_running_engine():
    code = """
from fake_model import fake_engine
from codefuse_triton import Outbox
e, box = fake_engine(step_us=1000, max_len=4096, pages=200), Outbox()
e.submit([1], outbox=box, max_tokens=4000, ignore_eos=True)
s = e.stream([1], max_tokens=4000, ignore_eos=True)
next(s)
"""
    r = subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(__file__), capture_output=True, timeout=20, text=True)
    assert (r.returncode, r.stderr) == (0, "")
