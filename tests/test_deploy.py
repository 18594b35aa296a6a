"""tools/deploy.py: what it lays out, what it refuses, and that a run that fails or is killed changes nothing."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import convert  # noqa: E402
import deploy as tool  # noqa: E402
from checkpoint import CheckpointError  # noqa: E402
from codefuse_triton import Engine, contract  # noqa: E402

DEMO = ROOT / "tools" / "demo" / "checkpoint"
QUIET = dict(progress=contextlib.nullcontext(lambda n: None))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("deploy") / "weights"
    convert.convert(DEMO, path, **QUIET)
    return path


def tree(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file()}


def settings(directory: Path) -> dict[str, str]:
    return dict(re.findall(r'key: "(\w+)", value: \{ string_value: "([^"]*)"', (directory / "config.pbtxt").read_text()))


def test_a_named_model(weights, tmp_path):
    repository = tmp_path / "models"
    names = tool.deploy(weights, "code-7b", repository, settings={"slots": "3"})
    assert sorted(p.name for p in repository.iterdir()) == sorted(names.values()) == ["code-7b", "code-7b_detokenizer", "code-7b_generator", "code-7b_tokenizer"]
    text_format = pytest.importorskip("google.protobuf.text_format")
    model_config = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    configs = {n: text_format.Parse((repository / n / "config.pbtxt").read_text(), model_config.ModelConfig()) for n in names.values()}
    assert all(config.name == n for n, config in configs.items())
    assert [s.model_name for s in configs["code-7b"].ensemble_scheduling.step] == ["code-7b_tokenizer", "code-7b_generator", "code-7b_detokenizer"]
    assert settings(repository / "code-7b_generator")["slots"] == "3" and settings(repository / "code-7b_generator")["weights"] == ""
    assert settings(repository / "code-7b_detokenizer") == {"tokenizer_dir": "../code-7b_generator/1", "generator": "code-7b_generator"}
    assert settings(repository / "code-7b_tokenizer")["tokenizer_dir"] == "../code-7b_generator/1"
    for part, directory in names.items():
        assert part == contract.ENSEMBLE or (repository / directory / "1" / "model.py").read_text() == (tool.MODELS / part / "1" / "model.py").read_text()
    with Engine(repository / "code-7b_generator" / "1", device="cpu", threads=1) as engine:
        assert engine.generate("def f", max_tokens=3).num_output_tokens == 3
    assert [p.name for p in tmp_path.iterdir()] == ["models"]


def test_from_a_checkpoint_and_in_place(weights, tmp_path):
    repository = tmp_path / "models"
    tool.deploy(DEMO, "plain", repository, **QUIET)
    assert {k: v for k, v in tree(repository / "plain_generator" / "1").items() if k != "model.py"} == tree(weights)
    tool.deploy(DEMO, "wide", repository, dtype="f32", **QUIET)
    assert sum(f.stat().st_size for f in (repository / "wide_generator").rglob("*.safetensors")) > 1.9 * sum(f.stat().st_size for f in weights.glob("*.safetensors"))
    tool.deploy(weights, "there", repository, in_place=True)
    assert served(repository / "there_generator", "1") == weights and settings(repository / "there_generator")["weights"] == ""
    assert sorted(p.name for p in (repository / "there_generator" / "1").iterdir()) == ["model.py", "weights"]
    assert settings(repository / "there_tokenizer")["tokenizer_dir"] == settings(repository / "there_detokenizer")["tokenizer_dir"] == str(weights)


def served(generator: Path, version: str) -> Path:
    """The weights directory that GeneratorModel loads."""
    return contract.weights_directory(generator, version, settings(generator)["weights"]).resolve()


def test_versions_in_place(weights, tmp_path):
    """Each serves its own weights, wherever the others have theirs."""
    repository, other = tmp_path / "models", tmp_path / "other"
    shutil.copytree(weights, other)
    tool.deploy(weights, "m", repository, in_place=True)
    tool.deploy(other, "m", repository, version=2, in_place=True)
    tool.deploy(other, "m", repository, version=3)
    tool.deploy(weights, "n", repository)
    tool.deploy(other, "n", repository, version=2, in_place=True)
    generator = repository / "m_generator"
    assert [served(generator, v) for v in "123"] == [weights, other, generator / "3"]
    assert [served(repository / "n_generator", v) for v in "12"] == [repository / "n_generator" / "1", other]
    with Engine(served(generator, "2"), device="cpu", threads=1) as engine:
        assert engine.generate("def f", max_tokens=3).num_output_tokens == 3
    (other / "tokenizer.model").write_bytes((other / "tokenizer.model").read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="tokenizer.model differs from that of m_tokenizer"):
        tool.deploy(other, "m", repository, version=4, in_place=True)
    shutil.rmtree(repository / "m_generator")
    assert (weights / "config.json").is_file()


def test_paths_with_any_character(weights, tmp_path):
    text_format = pytest.importorskip("google.protobuf.text_format")
    model_config = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    odd, repository = tmp_path / 'a "b" \\n \n é', tmp_path / "models"
    shutil.copytree(weights, odd)
    tool.deploy(odd, "m", repository, in_place=True)
    tool.deploy(odd, "m", repository, version=2)  # finds the tokenizer of the first
    config = text_format.Parse((repository / "m_tokenizer" / "config.pbtxt").read_text(), model_config.ModelConfig())
    assert config.parameters["tokenizer_dir"].string_value == str(odd)
    assert served(repository / "m_generator", "1") == odd


def test_a_version_beside_a_weights_setting_is_refused(weights, tmp_path):
    """All versions would serve what it names."""
    repository = tmp_path / "models"
    tool.deploy(weights, "m", repository)
    config = repository / "m_generator" / "config.pbtxt"
    config.write_text(config.read_text().replace('key: "weights", value: { string_value: "" }', f'key: "weights", value: {{ string_value: "{weights}" }}'))
    assert served(repository / "m_generator", "1") == weights
    before = tree(repository)
    with pytest.raises(CheckpointError, match=re.escape(f"m_generator/config.pbtxt sets weights to '{weights}', which all versions would serve")):
        tool.deploy(DEMO, "m", repository, version=2, dtype="f32", **QUIET)
    assert tree(repository) == before


def test_versions_of_a_generator(weights, tmp_path):
    repository = tmp_path / "models"
    tool.deploy(weights, "m", repository)
    before = tree(repository)
    tool.deploy(DEMO, "m", repository, version=2, dtype="f32", **QUIET)
    after = tree(repository)
    assert before.items() <= after.items() and all(k.startswith("m_generator/2/") for k in after.keys() - before.keys())
    other = tmp_path / "other"
    shutil.copytree(weights, other)
    (other / "tokenizer.model").write_bytes((other / "tokenizer.model").read_bytes() + b"\0")
    for arguments, message in [(dict(version=2), "m_generator.* version 2 already; replace it with --replace, or add a version"),
                               (dict(version=3, settings={"slots": "2"}), "settings belong to all versions of m_generator")]:
        with pytest.raises(CheckpointError, match=message):
            tool.deploy(weights, "m", repository, **arguments)
    with pytest.raises(CheckpointError, match="tokenizer.model differs from that of m_tokenizer"):
        tool.deploy(other, "m", repository, version=3)
    assert tree(repository) == after


@pytest.mark.parametrize("arguments, message", [
    (dict(name="../x"), "name is '../x'"), (dict(name=""), "name is ''"), (dict(name="a b"), "name is 'a b'"), (dict(version=0), "version is 0"),
    (dict(dtype="q9"), "dtype is 'q9'; expected auto, f32"), (dict(dtype="f16"), "is a weights directory, which is taken as it is"),
    (dict(settings={"slot": "1"}), "'slot' is unknown; did you mean 'slots'"), (dict(settings={"slots": "0"}), "slots is '0'"),
    (dict(settings={"weights": "/x"}), "setting weights"),
    (dict(source=DEMO, in_place=True), "cannot be served in place"), (dict(source=Path("/nonexistent")), "/nonexistent"),
], ids=str)
def test_refusals(weights, tmp_path, arguments, message):
    arguments = {"source": weights, "name": "m", **arguments}
    with pytest.raises(ValueError, match=re.escape(message)):
        tool.deploy(arguments.pop("source"), arguments.pop("name"), tmp_path / "models", **arguments)
    assert not tree(tmp_path) and not list(tmp_path.glob(".*"))


def test_what_is_there_stays(weights, tmp_path):
    repository = tmp_path / "models"
    tool.deploy(weights, "m", repository)
    before = tree(repository)
    with pytest.raises(CheckpointError, match="already; replace it with --replace"):
        tool.deploy(weights, "m", repository)
    (repository / "m_tokenizer").rename(tmp_path / "aside")
    with pytest.raises(CheckpointError, match="but no m_tokenizer; replace it with --replace$"):
        tool.deploy(weights, "m", repository)
    (tmp_path / "aside").rename(repository / "m_tokenizer")
    (repository / "own_generator").mkdir()
    (repository / "own_generator" / "config.pbtxt").write_text('name: "own_generator"')
    with pytest.raises(CheckpointError, match="own_generator is not a model of this tool"):
        tool.deploy(weights, "own", repository, replace=True)
    shutil.rmtree(repository / "own_generator")
    for damaged in ("tensor", "tokenizer"):
        bad = tmp_path / damaged
        shutil.copytree(weights, bad)
        if damaged == "tensor":
            file, = bad.glob("*.safetensors")
            raw = bytearray(file.read_bytes())
            raw[-5] ^= 1
            file.write_bytes(raw)
        else:
            config = json.loads((bad / "config.json").read_text())
            (bad / "config.json").write_text(json.dumps({**config, "tokenizer_files": []}))
        for in_place in (False, True):
            with pytest.raises(CheckpointError, match="is damaged: tensor lm_head.weight" if damaged == "tensor" else "has no tokenizer files"):
                tool.deploy(bad, "m", repository, replace=True, in_place=in_place)
    assert tree(repository) == before
    tool.deploy(weights, "m", repository, replace=True, settings={"slots": "5"})
    assert settings(repository / "m_generator")["slots"] == "5" and tree(repository).keys() == before.keys()


def test_an_error_while_installing_undoes_it(weights, tmp_path, monkeypatch):
    repository = tmp_path / "models"
    tool.deploy(weights, "m", repository)
    before, real, calls = tree(repository), os.rename, []

    def rename(a, b):
        calls.append(b)
        if len(calls) == 6:  # the third model's place
            raise OSError("disk on fire")
        real(a, b)

    monkeypatch.setattr(tool.os, "rename", rename)
    with pytest.raises(OSError, match="disk on fire"):
        tool.deploy(weights, "m", repository, replace=True, settings={"slots": "5"})
    assert tree(repository) == before and [p.name for p in tmp_path.iterdir()] == ["models"]


@pytest.mark.parametrize("at", [1, 2, 5, 7, 8])
def test_a_killed_run_is_undone_by_the_next(weights, tmp_path, at):
    repository = tmp_path / "models"
    tool.deploy(weights, "m", repository)
    before = tree(repository)
    script = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "tools")!r})
import deploy
from pathlib import Path
real, calls = os.rename, []
def rename(a, b):
    calls.append(b)
    if len(calls) == {at}:
        os._exit(9)
    real(a, b)
deploy.os.rename = rename
deploy.deploy(Path({str(weights)!r}), "m", Path({str(repository)!r}), replace=True, settings={{"slots": "5"}})
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == 9
    with pytest.raises(CheckpointError, match="has no tokenizer files"):  # any later run; this one fails after it has put things in order
        empty = tmp_path / "empty"
        convert.write_random("gptneox-tiny", empty, "f16", 0, on_disk=False)
        tool.deploy(empty, "m", repository, replace=True)
    assert tree(repository) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "models"]


def test_as_a_program(weights, tmp_path):
    run = [sys.executable, str(ROOT / "tools" / "deploy.py"), str(weights), "m", "--repository", str(tmp_path / "models"), "--set", "slots=2", "--set", "device=cpu"]
    result = subprocess.run(run, capture_output=True, text=True)
    assert result.returncode == 0 and "m_generator" in result.stdout, result.stderr
    again = subprocess.run(run, capture_output=True, text=True)
    assert again.returncode == 1 and "already; replace it with --replace" in again.stderr and "Traceback" not in again.stderr
    wrong = subprocess.run([*run, "--set", "slots"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "expected SETTING=VALUE" in wrong.stderr
    assert np.all([p.name.startswith("m") for p in (tmp_path / "models").iterdir()])
