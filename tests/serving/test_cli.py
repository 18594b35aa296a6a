"""codefuse-client and perf_analyzer as a person runs them."""
from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from codefuse_triton_client import Client
from serving_helpers import LONG, PROMPT, ROOT, free_ports, wait_busy, wait_idle

from codefuse_triton.triton_server import TritonServer


def cli(server: TritonServer, *args: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "codefuse_triton_client.cli", "--url", server.grpc_url, *args], capture_output=True,
                          timeout=60, **options)


def test_prompt_as_argument_and_standard_input(server: TritonServer, client: Client) -> None:
    text = client.complete(PROMPT, max_tokens=12).text
    assert cli(server, PROMPT, "--max-tokens", "12").stdout.decode() == text + "\n"
    assert cli(server, PROMPT, "--max-tokens", "12", "--no-stream", "--echo").stdout.decode() == PROMPT + text + "\n"
    assert cli(server, "--max-tokens", "12", input=PROMPT.encode()).stdout.decode() == text + "\n"
    assert cli(server, "-", "--max-tokens", "12", input=PROMPT.encode()).stdout.decode() == text + "\n"


def test_stats(server: TritonServer) -> None:
    result = cli(server, PROMPT, "--max-tokens", "12", "--stats")
    assert result.returncode == 0
    assert "12 out" in result.stderr.decode() and "tokens/s" in result.stderr.decode() and "ended by length" in result.stderr.decode()


def test_several_answers_and_log_probs(server: TritonServer, client: Client) -> None:
    options = dict(n=2, temperature=0.8, seed=3, max_tokens=6, top_logprobs=2, bad_words=["self"])
    expected = client.complete_all(PROMPT, **options)
    arguments = "--n 2 --temperature 0.8 --seed 3 --max-tokens 6 --top-logprobs 2 --bad-words self".split()
    result = cli(server, PROMPT, *arguments)
    assert result.stdout.decode() == "".join(f"--- answer {i}\n{r.text}\n" for i, r in enumerate(expected))
    assert len(result.stderr.splitlines()) == sum(r.num_output_tokens for r in expected)
    answers = [json.loads(line) for line in cli(server, PROMPT, *arguments, "--json").stdout.splitlines()]
    assert [(a["text"], tuple(a["token_ids"])) for a in answers] == [(r.text, r.token_ids) for r in expected]


def test_prompts_that_are_not_utf8(server: TritonServer) -> None:
    result = cli(server, input=b"caf\xe9")
    assert result.returncode == 1 and b"INVALID_ARGUMENT: prompt is not UTF-8: byte 0xe9 at offset 3" in result.stderr and b"Traceback" not in result.stderr


def test_errors(server: TritonServer) -> None:
    result = cli(server, PROMPT, "--temperature", "-1")
    assert result.returncode == 1 and b"INVALID_ARGUMENT" in result.stderr and b"temperature is -1.0" in result.stderr
    result = subprocess.run([sys.executable, "-m", "codefuse_triton_client.cli", "--url", f"127.0.0.1:{free_ports(1)[0]}", "x"],
                            capture_output=True, timeout=60)
    assert result.returncode == 1 and b"UNAVAILABLE" in result.stderr and b"Traceback" not in result.stderr


def test_ctrl_c_cancels(slow_server: TritonServer) -> None:
    process = subprocess.Popen([sys.executable, "-m", "codefuse_triton_client.cli", "--url", slow_server.grpc_url, PROMPT, "--max-tokens",
                                str(LONG["max_tokens"]), "--ignore-eos"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_busy(slow_server)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130 and b"Traceback" not in errors
    assert wait_idle(slow_server) < 1


def test_perf_analyzer_streams(server: TritonServer, tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from perf_analyzer import find_binary
    finally:
        sys.path.pop(0)
    try:
        find_binary()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    data, export = tmp_path / "input.json", tmp_path / "export.json"
    data.write_text(json.dumps({"data": [{"text_input": [PROMPT], "max_tokens": [20], "stream": [True], "ignore_eos": [True]}]}))
    for _ in range(2):  # its own flaw may end an export; the tool says so
        result = subprocess.run(
            [sys.executable, ROOT / "tools" / "perf_analyzer.py", "-m", "ensemble", "-u", server.grpc_url, "-i", "grpc", "--streaming",
             "--async", "--input-data", data, "--concurrency-range", "1:2", "--measurement-interval", "1500", "--max-trials", "4",
             "--stability-percentage", "80", "--profile-export-file", export], capture_output=True, text=True, timeout=120)
        if "is not whole" not in result.stderr:
            break
    assert result.returncode == 0, result.stdout + result.stderr
    experiments = json.loads(export.read_text())["experiments"]
    assert [e["experiment"]["value"] for e in experiments] == [1, 2]
    requests = [r for e in experiments for r in e["requests"]]
    assert len(requests) > 5
    complete = [r for r in requests if len(r["response_timestamps"]) > 1]  # the window may cut the last one
    assert len(complete) >= len(requests) - 4 and all(r["response_timestamps"] == sorted(r["response_timestamps"]) for r in complete)
