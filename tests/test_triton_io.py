"""The Triton models with a stand-in for Triton's module: a request that fails is answered by its own error, those beside it are not touched."""
from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Iterator

import numpy as np
import pytest

pytest.importorskip("tokenizers")
from test_vocab import byte_level  # noqa: E402

FINAL = 1


class TritonError(Exception):
    INVALID_ARG, UNAVAILABLE, INTERNAL = range(3)

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class Response:
    def __init__(self, tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self.tensors, self.error = {t.name(): t.as_numpy() for t in tensors or []}, error


class Request:
    def __init__(self, parameters: str = "", sends: bool = True, **tensors: Any) -> None:
        self._parameters, self._sends = parameters, sends
        self._inputs = [Tensor(name, value if isinstance(value, np.ndarray) else np.array([[value]], object if isinstance(value, bytes) else np.int64))
                        for name, value in tensors.items()]
        self.sent: list[tuple[Response | None, int]] = []

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def parameters(self) -> str:
        return self._parameters

    def get_response_sender(self) -> Request:
        return self

    def is_cancelled(self) -> bool:
        return False

    def send(self, response: Response | None = None, flags: int = 0) -> None:
        if not self._sends:
            raise RuntimeError("the response sender has been closed")
        self.sent.append((response, flags))


@pytest.fixture
def triton_io(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    fake = SimpleNamespace(TritonError=TritonError, Tensor=Tensor, InferenceResponse=Response, TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake)
    monkeypatch.delitem(sys.modules, "codefuse_triton.triton_io", raising=False)
    yield importlib.import_module("codefuse_triton.triton_io")
    sys.modules.pop("codefuse_triton.triton_io")


def initialized(model: Any, directory: Path) -> Any:
    model.initialize({"model_repository": str(directory), "model_version": "1", "model_name": "m",
                      "model_config": json.dumps({"parameters": {"tokenizer_dir": {"string_value": str(directory)}}})})
    return model


def test_tokenizer(triton_io: ModuleType, tmp_path: Path) -> None:
    byte_level(tmp_path)
    model = initialized(triton_io.TokenizerModel(), tmp_path)
    encode = model._vocab._encode

    def failing(text: str) -> list[int]:
        if "boom" in text:
            raise RuntimeError("out of luck")
        return encode(text)

    model._vocab._encode = failing
    requests = [Request(text_input=b"import os"), Request(text_input=b"boom"), Request(text_input=b"a", parameters="{"), Request(text_input=b"\xff"),
                Request(text_input=np.zeros((1, 0), object)), Request(text_input=b"import sys")]
    first, boom, parameters, no_text, nothing, last = model.execute(requests)
    assert first.error is None and last.error is None and last.tensors["input_ids"].size
    assert str(boom.error) == "RuntimeError: out of luck [INTERNAL]" and boom.error.code == TritonError.INTERNAL
    assert "[INVALID_ARGUMENT]" in str(parameters.error) and "not UTF-8" in str(no_text.error)
    assert str(nothing.error) == "text_input has shape [1, 0]; expected one value [INVALID_ARGUMENT]"


def chunk(**changes: Any) -> dict[str, Any]:
    whole = dict(output_ids=np.array([[5]], np.int32), uid=1, serial=7, text_start=0, text_bytes=1, chunk_index=0, sequence_index=0)
    return {name: value for name, value in {**whole, **changes}.items() if value is not None}


def test_detokenizer(triton_io: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(triton_io.lifecycle.tempfile, "gettempdir", lambda: str(tmp_path))
    byte_level(tmp_path)
    model = initialized(triton_io.DetokenizerModel(), tmp_path)
    good, missing, wrong, deaf, last = (Request(**chunk()), Request(**chunk(serial=None)), Request(**chunk(output_ids=np.array([["x"]], object))),
                                        Request(sends=False, **chunk()), Request(**chunk(serial=8)))
    model.execute([good, missing, wrong, deaf, last])
    for request in (good, last):
        (response, flags), = request.sent
        assert response.error is None and flags == FINAL and response.tensors["text_output"].shape == (1,)
    (response, flags), = missing.sent
    assert str(response.error) == "serial is missing; expected a chunk of the generator [INVALID_ARGUMENT]" and flags == FINAL
    (response, flags), = wrong.sent
    assert str(response.error).endswith("[INTERNAL]") and flags == FINAL
    assert capsys.readouterr().err == "detokenizer: RuntimeError: the response sender has been closed; RuntimeError: the response sender has been closed\n"
