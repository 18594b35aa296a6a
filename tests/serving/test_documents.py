"""What the documents show works as it is written there: every Python block, call and curl command of the README, the client's and docs/."""
from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from codefuse_triton_client import Client
from serving_helpers import PROMPT, ROOT, post

from codefuse_triton import Engine
from codefuse_triton.triton_server import TritonServer


def found(pattern: str, *names: str) -> list[str]:
    texts = [match for name in names for match in re.findall(pattern, (ROOT / name).read_text(), re.DOTALL | re.MULTILINE)]
    assert texts
    return texts


BLOCKS = found(r"```python\n(.*?)```", "README.md", "client/README.md")
CALLS = found(r"`(client\.complete[^`]*\))[^`]*`", "docs/sampling.md")
CURLS = found(r"^    (curl -sN? 127.0.0.1:8000/\S*/generate.*?\}')$", "README.md", "docs/sampling.md")


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_blocks(server: TritonServer, client: Client, weights: Path, block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(block.replace("127.0.0.1:8001", server.grpc_url).replace("model_repository/generator/1", str(weights)), {"client": client})
    if re.search(r"^ *print\(", block, re.MULTILINE):
        assert capsys.readouterr().out


@pytest.mark.parametrize("call", CALLS)
def test_calls(client: Client, weights: Path, call: str) -> None:
    """With the client and, by the names that docs/sampling.md says, with Engine."""
    assert eval(call, {"client": client, "p": PROMPT})
    engine_call = call.replace("client.complete_all(p, n=", "engine.generate_many(p, ").replace("client.complete(", "engine.generate(").replace("end_id=2", "eos_ids=[2]")
    with Engine(weights, device="cpu") as engine:
        assert eval(engine_call, {"engine": engine, "p": PROMPT})


@pytest.mark.parametrize("command", CURLS, ids=range(len(CURLS)))
def test_curl(server: TritonServer, command: str) -> None:
    body = re.search(r"-d '(.*)'$", command, re.DOTALL)
    path = re.search(r"127\.0\.0\.1:8000(/\S+)", command)
    assert body and path
    status, said = post(server, path[1], body[1])
    assert status == 200, said
    answers = [json.loads(line.removeprefix("data: ")) for line in said.decode().splitlines() if line]
    assert any(answer["text_output"] for answer in answers), said
