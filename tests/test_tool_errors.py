"""Every program in tools/: bad input ends with one line that names field, value and limit and with exit code 1 or 2, never with a traceback."""
from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
convert = importlib.import_module("convert")

DEMO = str(ROOT / "tools" / "demo" / "checkpoint")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths that the arguments below name in braces."""
    path = tmp_path_factory.mktemp("tools")
    convert.convert(Path(DEMO), path / "weights", progress=contextlib.nullcontext(lambda n: None))
    convert.write_random("gptneox-tiny", path / "random", "f16", 0, on_disk=False)
    (path / "latin1.txt").write_bytes(b"caf\xe9\n" * 9)
    (path / "short.jsonl").write_text('{"text": "a"}\n')
    (path / "list.jsonl").write_text('[1]\n"x"\n')
    (path / "broken").mkdir()
    (path / "broken" / "config.json").write_text("{")
    (path / "latin1").mkdir()
    (path / "latin1" / "config.json").write_bytes(b'{"a": "\xe9"}')
    (path / "foreign").mkdir()
    (path / "foreign" / "letter.safetensors").write_text("dear")
    (path / "file").write_text("x")
    return {"demo": DEMO, "random": str(path / "random"), "at": str(path), "out": str(path / "out")}


CALLS = [  # program, arguments, what the message says
    ("convert", "", "required: target"),
    ("convert", "{demo}", "give a checkpoint directory and the target"),
    ("convert", "{at}/none {out}", "none"),
    ("convert", "{at}/file {out}", "file"),
    ("convert", "{at}/broken {out}", "not valid JSON"),
    ("convert", "{at}/latin1 {out}", "not valid JSON"),
    ("convert", "{demo} {at}/foreign", "foreign holds letter.safetensors"),
    ("convert", "{demo} {at}/file", "file exists and is not a directory"),
    ("convert", "{demo} {at}/file/x", "file"),
    ("convert", "{demo} {out} --dtype q8", "--dtype: invalid choice: 'q8'"),
    ("convert", "--random gptneox-tiny", "target"),
    ("convert", "--random gptneox-9b {out}", "invalid choice: 'gptneox-9b'"),
    ("convert", "{out} --random gptneox-tiny --seed 99999999999999999999", "--seed: 99999999999999999999; expected 0 to"),
    ("convert", "{out} --random gptneox-tiny --seed -1", "--seed: -1; expected 0 to"),
    ("quantize", "{demo} {out} --format q9", "--format: invalid choice: 'q9'"),
    ("quantize", "{demo} {out} --format q8_row --device tpu", "device is 'tpu'; expected"),
    ("quantize", "{demo} {out} --format q8_row --device cuda:77", "device is 'cuda:77'"),
    ("quantize", "{demo} {out} --format q8_row --method gptq --no-evaluate --device tpu", "device is 'tpu'"),
    ("quantize", "{demo} {out} --format q8_row --max-loss nan", "--max-loss: nan; expected a number of 0 or more"),
    ("quantize", "{demo} {out} --format q8_row --max-loss -1", "--max-loss: -1; expected"),
    ("quantize", "{demo} {out} --format q8_row --evaluate {at}/none", "none: no such file"),
    ("quantize", "{demo} {out} --format q8_row --evaluate {at}/latin1.txt", "latin1.txt: not UTF-8 text"),
    ("quantize", "{demo} {out} --format q8_row --evaluate {at}/short.jsonl", "expected at least 512"),
    ("quantize", "{demo} {out} --format q8_row --evaluate {at}/list.jsonl", "list.jsonl: holds no text"),
    ("quantize", "{demo} {out} --format q8_row --evaluate-tokens 3", "--evaluate-tokens: 3; expected 512 to"),
    ("quantize", "{demo} {demo} --format q8_row", "name another directory"),
    ("quantize", "{random} {out} --format q8_row --no-evaluate", "made at load"),
    ("quantize", "{at}/none {out} --format q8_row", "none"),
    ("evaluate", "{demo} {at}/none", "none"),
    ("evaluate", "{demo} {demo} --device tpu", "--device: device is 'tpu'; expected"),
    ("evaluate", "{random} {random}", "neither tokenizer.json nor tokenizer.model"),
    ("evaluate", "{demo} {demo} --tokens 5", "--tokens: 5; expected 512 to"),
    ("inspect_weights", "{at}/none", "none"),
    ("inspect_weights", "{at}/file", "file"),
    ("inspect_weights", "{at}/broken", "not valid JSON"),
    ("inspect_weights", "{demo}", "config.json"),
    ("deploy", "{at}/none m --repository {out}", "none: no such directory"),
    ("deploy", "{demo} m --repository {at}/file", "file"),
    ("deploy", "{demo} m --repository {out} --set slots=x", "slots is 'x'"),
    ("deploy", "{at}/broken m --repository {out}", "not valid JSON"),
    ("bench_engine", "{at}/none", "none"),
    ("bench_engine", "{random} --device tpu", "device is 'tpu'"),
    ("bench_engine", "{random} --shapes 3x4", "--shapes: shape is '3x4'; expected"),
    ("bench_engine", "{random} --shapes 0/4", "--shapes: shape is '0/4'; expected"),
    ("bench_engine", "{random} --streams a", "--streams: 'a'; expected an integer"),
    ("bench_engine", "{random} --streams 1,65", "--streams: 65; expected 1 to 64"),
    ("bench_engine", "{random} --dtype int3", "--dtype: invalid choice: 'int3'"),
    ("bench_engine", "{random} --threads -1", "--threads: -1; expected 0 to 1024"),
    ("bench_engine", "{random} --seed -1", "--seed: -1; expected 0 to"),
    ("bench_engine", "{random} --json {at}/none/x.json", "--json|x.json: there is no directory"),
    ("bench_engine", "--random gptneox-9b", "preset is 'gptneox-9b'"),
    ("bench_engine", "--random gptneox-tiny --format q9", "format is 'q9'"),
    ("bench_kernels", "--device cuda:77", "device is 'cuda:77', but only"),
    ("bench_kernels", "--device cpu --preset gptneox-9b", "preset is 'gptneox-9b'"),
    ("bench_kernels", "--device cpu --preset gptneox-tiny --formats q9", "format is 'q9'"),
    ("bench_kernels", "--device cpu --rows 0", "rows"),
    ("bench_kernels", "--device cpu --repeats 0", "--repeats: 0; expected 1 to"),
    ("bench_kernels", "--device cpu --json {at}/none/x.json", "--json|x.json: there is no directory"),
    ("bench_load", "{at}/none", "none"),
    ("bench_load", "{random} --device tpu --repeats 1", "device is 'tpu'"),
    ("bench_load", "--random gptneox-tiny --write {at}/none/x --format q9", "format is 'q9'"),
    ("bench_load", "{random} --json {at}/none/x.json", "--json|x.json: there is no directory"),
    ("bench_keystrokes", "{at}/none", "none"),
    ("bench_keystrokes", "{random}", "neither tokenizer.json nor tokenizer.model"),
    ("bench_keystrokes", "{at}/weights --device tpu", "device is 'tpu'"),
    ("bench_keystrokes", "{at}/weights --slots 0", "--slots: 0; expected 1 to 64"),
    ("bench_keystrokes", "{at}/weights --seconds nan", "--seconds: nan; expected a number above 0"),
    ("bench_keystrokes", "{at}/weights --seed -1", "--seed: -1; expected"),
    ("bench_keystrokes", "{at}/weights --json {at}", "--json|is a directory"),
    ("evaluate_healing", "{at}/none", "none"),
    ("evaluate_healing", "{at}/weights --text {at}/none", "none"),
    ("evaluate_healing", "{at}/weights --text {at}/latin1.txt", "latin1.txt"),
    ("evaluate_healing", "{at}/weights --text {at}/list.jsonl", "list.jsonl: holds no text"),
    ("evaluate_healing", "{at}/weights --lines 0", "--lines: 0; expected 1 to"),
    ("evaluate_healing", "{at}/weights --context 0", "--context: 0; expected 1 to"),
    ("evaluate_healing", "{at}/weights --device tpu", "device is 'tpu'"),
    ("serve", "--repository {at}/none", "none: no such directory"),
    ("serve", "--repository {at}/file", "file: no such directory"),
    ("serve", "--http-port 70000", "--http-port: 70000; expected 1 to 65535"),
    ("serve", "--drain -1", "--drain: -1; expected a number of 0 or more"),
    ("serve", "--load-timeout nan", "--load-timeout: nan; expected"),
    ("serve", "--log {at}/none/log", "none/log cannot be written"),
    ("serve", "--http-port 8001", "grpc port 8001 is the http port too"),
    ("serve", "--host nowhere.invalid", "nowhere.invalid"),
    ("serve", "-- model", "model; expected an option of tritonserver"),
]


def test_no_perf_analyzer(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert importlib.import_module("perf_analyzer").main() == 1
    assert "pip install 'tritonclient==2.51.0'" in capfd.readouterr().err


@pytest.mark.parametrize("export, own_code, code", [('{"a": [1, 2]}', 0, 0), ('{"a": [1, ', 0, 1), ("", 0, 1), ('{"a": [1, ', 7, 7)])
@pytest.mark.parametrize("option", ["--profile-export-file {}", "--profile-export-file={}"])
def test_an_export_that_is_not_whole(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, export: str, own_code: int, code: int,
                                     option: str) -> None:
    file, binary = tmp_path / "export.json", tmp_path / "perf_analyzer"
    binary.write_text(f"#!/bin/sh\nprintf '%s' '{export}' > {file}\nexit {own_code}\n")
    binary.chmod(0o755)
    tool = importlib.import_module("perf_analyzer")
    monkeypatch.setattr(tool, "find_binary", lambda: binary)
    monkeypatch.setattr(sys, "argv", ["perf_analyzer.py", "-m", "ensemble", *option.format(file).split()])
    assert tool.main() == code
    assert ("export.json is not whole" in capfd.readouterr().err) == (code == 1)


@pytest.mark.parametrize("program, arguments, said", CALLS, ids=[f"{p} {a}" for p, a, _ in CALLS])
def test_one_line(made: dict[str, str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, program: str, arguments: str, said: str) -> None:
    monkeypatch.setattr(sys, "argv", [program])
    main = importlib.import_module(program).main
    try:
        code = main(arguments.format(**made).split())
    except SystemExit as exit:  # of argparse
        code = exit.code
    error = capfd.readouterr().err.strip().splitlines()
    assert code in (1, 2) and error, error
    assert error[-1].startswith(f"{program}: ") and all(part in error[-1] for part in said.split("|")), error
    assert not (Path(made["at"]) / "out").exists()
