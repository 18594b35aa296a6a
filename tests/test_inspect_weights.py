"""tools/inspect_weights.py: what it says of good, damaged and foreign directories."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import convert  # noqa: E402
import inspect_weights as tool  # noqa: E402
import quantize  # noqa: E402
from checkpoint import CheckpointError  # noqa: E402

DEMO = ROOT / "tools" / "demo" / "checkpoint"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    path = tmp_path_factory.mktemp("inspect") / "q4"
    quantize.quantize(DEMO, path, "q4_g128", progress=contextlib.nullcontext(lambda n: None))
    return path


@pytest.fixture
def copy(quantized, tmp_path):
    shutil.copytree(quantized, tmp_path / "w")
    return tmp_path / "w"


def test_kinds_formats_and_bytes(quantized):
    r = tool.inspect(quantized)
    rows = {k["tensor"]: (k["format"], k["count"], k["stored_shape"], k["bytes"]) for k in r["tensors"]}
    assert rows["layers.*.qkv.weight"] == ("q4_g128", 5, [1152, 192], 5 * 1152 * (192 + 3 * (2 + 1)))
    assert rows["lm_head.weight"] == ("q8_row", 1, [4096, 384], 4096 * (384 + 4))
    assert rows["embed.weight"] == ("f16", 1, [4096, 384], 2 * 4096 * 384)
    file, = quantized.glob("*.safetensors")
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert r["bytes"] == file.stat().st_size - header
    assert r["ok"] and [f["state"] for f in r["files"]] == ["ok"] and r["model"]["formats"]["matrices"] == "q4_g128"
    assert r["source"] == "checkpoint" and "tokenizer.model" in r["tokenizer_files"]


def run(*arguments):
    return subprocess.run([sys.executable, str(ROOT / "tools" / "inspect_weights.py"), *map(str, arguments)], capture_output=True, text=True)


def test_as_a_program(quantized, copy):
    text = run(quantized)
    assert text.returncode == 0, text.stderr
    assert "gpt_neox, from checkpoint" in text.stdout and "layers.*.mlp_up.weight" in text.stdout and "  ok" in text.stdout
    assert json.loads(run("--json", quantized).stdout) == tool.inspect(quantized)
    file, = copy.glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    damaged = run(copy)
    assert damaged.returncode == 1 and "damaged: tensor lm_head.scale: checksum" in damaged.stdout and "is damaged" in damaged.stderr
    assert run("--no-checksums", copy).returncode == 0 and "unchecked" in run("--no-checksums", copy).stdout
    missing = run(copy / "nothing")
    assert missing.returncode == 1 and "no such directory" in missing.stderr and "Traceback" not in missing.stderr


def test_damage(copy):
    def state():
        r = tool.inspect(copy)
        assert not r["ok"]
        return next(f"{f['state']}: {f['why']}" for f in r["files"] if f["state"] != "ok")

    file, = copy.glob("*.safetensors")
    raw = file.read_bytes()
    file.write_bytes(raw[:-100])
    assert state() == f"damaged: has {len(raw) - 100} bytes; expected {len(raw)}: truncated"
    file.write_bytes(raw.replace(b"layers.3.qkv", b"layers.3.qqq"))
    assert state().startswith("damaged: checksum ")
    file.write_bytes(b"\0" * len(raw))
    assert state().startswith("damaged: checksum ")
    file.write_bytes(raw)
    shutil.copy(file, copy / "other.safetensors")
    assert state() == "damaged: not one of the files of config.json"
    (copy / "other.safetensors").unlink()
    file.unlink()
    assert state() == "damaged: missing"


def test_random_weights(tmp_path):
    convert.write_random("gptneox-tiny", tmp_path / "w", "q8_row", 3, on_disk=False)
    r = tool.inspect(tmp_path / "w")
    assert r["ok"] and r["random"] == {"seed": 3, "format": "q8_row"} and "made at load from seed 3" in tool.as_text(r)


def test_what_is_not_a_weights_directory(copy):
    with pytest.raises(CheckpointError, match="that of a Hugging Face checkpoint; tools/convert.py"):
        tool.inspect(DEMO)
    config = json.loads((copy / "config.json").read_text())
    for change, message in [({"format_version": 9}, "format_version is 9; expected 1"), ({"files": [{"name": 3}]}, r"files\[0\].name is 3; expected str"),
                            ({"files": ["x"]}, r"files\[0\].name is 'x'; expected str")]:
        (copy / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=message):
            tool.inspect(copy)
