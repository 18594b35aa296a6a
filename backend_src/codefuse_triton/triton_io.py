"""The models that Triton's Python backend runs; the only importer of triton_python_backend_utils."""
from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from . import Engine, QueueFull, Vocab, contract, lifecycle
from .files import on_disk
from .prompt import Prompt, make_prompt
from .request import parse, parse_settings, parse_text
from .serve import SHUTTING_DOWN, Draining, Service


def _error(message: str, status: str) -> pb_utils.InferenceResponse:
    """status: the gRPC name; it is part of the text too, since an error on a stream carries no other."""
    # pb_utils is filled only after this module has been imported
    code = getattr(pb_utils.TritonError, "INVALID_ARG" if status == "INVALID_ARGUMENT" else status)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{message} [{status}]", code))


def _finish(sender: Any, response: pb_utils.InferenceResponse | None = None) -> None:
    final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
    if response is None:
        sender.send(flags=final)
    else:
        sender.send(response, flags=final)


def _log(message: str) -> None:
    """Into the server's log. Triton's Logger would abort the process where this file's path is not ASCII."""
    print(message, file=sys.stderr, flush=True)


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _tensor(name: str, value: Any, dtype: type = np.int32) -> pb_utils.Tensor:
    """One value as [1, 1]."""
    return pb_utils.Tensor(name, np.array([[value]], dtype=dtype))


def _text(name: str, value: bytes | str, shape: tuple[int, ...] = (1, 1)) -> pb_utils.Tensor:
    array = np.empty(shape, dtype=np.object_)
    array.fill(value if isinstance(value, bytes) else value.encode())
    return pb_utils.Tensor(name, array)


def _settings(model: str, args: dict[str, str]) -> dict[str, Any]:
    _check_numpy()
    parameters = json.loads(args["model_config"]).get("parameters", {})
    return parse_settings(model, {k: v["string_value"] for k, v in parameters.items()})


def _check_numpy() -> None:
    """Stubs older than 24.11 misread arrays of numpy >= 2; what tells an old one is a method that came with 25.02."""
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0" and not hasattr(pb_utils.InferenceResponse, "parameters"):
        raise RuntimeError(f"numpy {np.__version__} does not work with the Python stub of this tritonserver (older than "
                           "25.02), which needs numpy < 2: pip install 'numpy<2'")


def _resolved(path: Path) -> str:
    return os.path.realpath(on_disk(str(path))).decode(errors="surrogateescape")


def _tokenizer_dir(args: dict[str, str], settings: dict[str, Any]) -> str:
    return _resolved(Path(args["model_repository"]) / settings["tokenizer_dir"])


class TokenizerModel:
    def initialize(self, args: dict[str, str]) -> None:
        settings = _settings(contract.TOKENIZER, args)
        self._max_bytes = settings["max_input_bytes"]
        self._vocab = Vocab.load(_tokenizer_dir(args, settings))

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            given = {t.name(): t.as_numpy() for t in request.inputs()}
            prompt = self._prompt(given, json.loads(request.parameters() or "{}"))
        except ValueError as error:
            return _error(str(error), "INVALID_ARGUMENT")
        except Exception as error:  # the others of this execute() must be answered
            return _error(_shown(error), "INTERNAL")
        lists = {"input_ids": prompt.ids, "prefix_ids": prompt.typed_ids, "suffix_ids": prompt.suffix, "fim_template": prompt.template, "fim_end_ids": prompt.end_ids}
        return pb_utils.InferenceResponse([
            *(pb_utils.Tensor(name, np.array(ids, np.int32)[None]) for name, ids in lists.items()),
            _text("prefix_bytes", prompt.typed), _tensor("heartbeat", True, np.bool_)])

    def _prompt(self, given: dict[str, np.ndarray], parameters: dict[str, Any]) -> Prompt:
        if "text_input" not in given:
            raise ValueError("text_input is missing; it is the prompt, a string of shape [1, 1]")
        shape, values = given["text_input"].shape, given.pop("text_input").reshape(-1)
        if values.size != 1:
            raise ValueError(f"text_input has shape {list(shape)}; expected one value")
        text = values[0]
        options = parse_text(given, parameters)
        for name, value in (("text_input", text), ("suffix", options["suffix"])):
            size = len(value if isinstance(value, bytes) else value.encode())
            if size > self._max_bytes:
                raise ValueError(f"{name} has {size} bytes; at most {self._max_bytes} are accepted")
        prompt = make_prompt(self._vocab, text, **options)
        if not prompt.ids and not prompt.template:
            raise ValueError("text_input is empty; the prompt must have at least one token")
        return prompt


_UIDS = 2**40  # of one process; a uid on the wire says whose it is: another version, which may be on its way out, counts from 1 too


def _wire_uid(uid: int) -> int:
    return os.getpid() * _UIDS + uid


class _Sender:
    """The Reply of one request: chunks to tensors."""

    def __init__(self, sender: Any, log_probs: bool, top_log_probs: bool) -> None:
        self._sender = sender
        self._log_probs = log_probs
        self._top_log_probs = top_log_probs

    def is_cancelled(self) -> bool:
        return self._sender.is_cancelled()

    def heartbeat(self, uid: int, serial: int) -> None:
        self._sender.send(pb_utils.InferenceResponse([
            pb_utils.Tensor("output_ids", np.zeros((1, 0), np.int32)), _tensor("uid", _wire_uid(uid), np.int64),
            _tensor("serial", serial, np.int64), _tensor("chunk_index", -1)]))

    def send(self, chunk: Any, serial: int, echo: bytes, error: str, sequence: int, last: bool) -> None:
        tensors = [
            pb_utils.Tensor("output_ids", np.asarray(chunk.token_ids, np.int32)[None]), _tensor("uid", _wire_uid(chunk.uid), np.int64),
            _tensor("serial", serial, np.int64), _tensor("text_start", chunk.text_start), _tensor("text_bytes", chunk.text_bytes),
            _tensor("chunk_index", chunk.index), _tensor("sequence_index", sequence), _tensor("num_input_tokens", chunk.num_input_tokens),
            pb_utils.Tensor("num_truncated_tokens", np.array([chunk.num_truncated_tokens], np.int32)),
            _tensor("num_output_tokens", chunk.num_output_tokens), _tensor("num_cached_tokens", chunk.num_cached_tokens)]
        if self._log_probs:
            tensors += [_tensor("cum_log_probs", chunk.cum_logprob, np.float32),
                        pb_utils.Tensor("output_log_probs", np.asarray(chunk.logprobs, np.float32)[None])]
        if self._top_log_probs:
            tensors += [pb_utils.Tensor("top_token_ids", np.asarray(chunk.top_token_ids, np.int32).reshape(1, -1)),
                        pb_utils.Tensor("top_log_probs", np.asarray(chunk.top_logprobs, np.float32).reshape(1, -1))]
        if echo:
            tensors.append(_text("echo", echo))
        if chunk.finish_reason:
            timings = np.array([[chunk.queue_s, chunk.prefill_s, chunk.decode_s]], np.float32)
            tensors += [_text("finish_reason", chunk.finish_reason), _text("stop_reason", chunk.stop_reason),
                        _text("error", error), pb_utils.Tensor("timings", timings)]
        response = pb_utils.InferenceResponse(tensors)
        if last:
            _finish(self._sender, response)
        else:
            self._sender.send(response)


class _Metrics:
    """Engine.stats() in Triton's metrics endpoint as codefuse_NAME; only what changed is touched (18 us each)."""

    _COUNTERS = {"steps", "prefill_tokens", "decode_tokens", "cached_tokens", "wasted_rows", "preemptions", "evictions",
                 "submitted", "refused", "finished"}

    def __init__(self, model: str, version: str) -> None:
        # pid: a version loaded anew is for a moment there twice; Triton gives both the same metric for the same labels, and takes it from both
        self._model = {"model": model, "version": version, "pid": str(os.getpid())}
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, str], Any] = {}
        self._last: dict[tuple[str, str], float] = {}

    def update(self, stats: dict[str, Any]) -> None:
        for name, value in stats.items():
            if isinstance(value, dict):  # finished: by reason
                for reason, count in value.items():
                    self._put(name, {"reason": reason}, count)
            elif isinstance(value, (int, float)):
                self._put(name, {}, value)

    def close(self) -> None:
        """They go from the endpoint: Triton drops a metric with its last reference, and keeps those of an unloaded version otherwise."""
        self._metrics.clear()
        self._families.clear()

    def _put(self, name: str, labels: dict[str, str], value: float) -> None:
        key = name, labels.get("reason", "")
        old = self._last.get(key, 0)
        if key in self._metrics and old == value:
            return
        counter = name in self._COUNTERS
        if name not in self._families:
            kind = pb_utils.MetricFamily.COUNTER if counter else pb_utils.MetricFamily.GAUGE
            self._families[name] = pb_utils.MetricFamily(name=f"codefuse_{name}" + "_total" * counter,
                                                         description=f"Engine.stats()['{name}']", kind=kind)
        if key not in self._metrics:
            self._metrics[key] = self._families[name].Metric(labels={**self._model, **labels})
        if counter:
            self._metrics[key].increment(float(value - old))
        else:
            self._metrics[key].set(float(value))
        self._last[key] = value


class GeneratorModel:
    def initialize(self, args: dict[str, str]) -> None:
        settings = _settings(contract.GENERATOR, args)
        weights = _resolved(contract.weights_directory(Path(args["model_repository"]), args["model_version"], settings.pop("weights")))
        self._exclude_input = settings.pop("exclude_input_in_output") == "true"
        responses_per_s = settings.pop("responses_per_s")
        self._inputs = [t.name for t in contract.MODEL[contract.GENERATOR].inputs]
        self._engine = Engine(weights, **settings)
        _log(f"generator: {weights} on {self._engine.device}, {self._engine.dtype}, max_len {self._engine.max_len}")
        name = args["model_name"]
        self._metrics = _Metrics(name, args["model_version"])
        self._metrics.update(self._engine.stats())  # a server that is ready has all of them
        self._service = Service(self._engine, responses_per_s=responses_per_s, server_pid=os.getppid(), name=name, on_stats=self._metrics.update)

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            self._submit(request)

    def _submit(self, request: Any) -> None:
        sender = request.get_response_sender()
        try:
            given = {t.name(): t.as_numpy() for t in request.inputs()}
            if "stop_uid" in given:
                self._cancel(int(given["stop_uid"].reshape(-1)[0]))
                _finish(sender)
                return
            parameters = json.loads(request.parameters() or "{}")
            parsed = parse(given, parameters, exclude_input=self._exclude_input)
            self._service.submit(parsed, _Sender(sender, parsed.submit["logprobs"], parsed.submit["top_logprobs"] > 0))
        except ValueError as error:
            _finish(sender, _error(str(error), "INVALID_ARGUMENT"))
        except (QueueFull, Draining) as error:
            _finish(sender, _error(str(error), "UNAVAILABLE"))
        except Exception as error:  # the server must outlive a bug: answer this request
            _finish(sender, _error(_shown(error), "INTERNAL"))

    def _cancel(self, wire_uid: int) -> None:
        """The detokenizer's call reaches the newest version only."""
        pid, uid = divmod(wire_uid, _UIDS)
        if pid == os.getpid():
            self._service.cancel(uid)
        else:
            lifecycle.forward_cancel(os.getppid(), pid, uid)

    def finalize(self) -> None:
        self._service.close()
        self._metrics.close()
        ended = ", ".join(f"{count} {reason}" for reason, count in self._engine.stats()["finished"].items() if count)
        _log(f"generator: process {os.getpid()} goes; its requests ended: {ended or 'none came'}")


def _valid_utf8(text: bytes) -> bytes:
    """A model may emit bytes that are no text; Triton would copy them into JSON as they are."""
    try:
        text.decode()
        return text
    except UnicodeDecodeError:
        return text.decode(errors="replace").encode()


class DetokenizerModel:
    def initialize(self, args: dict[str, str]) -> None:
        settings = _settings(contract.DETOKENIZER, args)
        self._bytes = Vocab.load(_tokenizer_dir(args, settings)).token_bytes
        self._generator = settings["generator"]
        self._progress = lifecycle.make_progress(os.getppid(), self._generator)

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._answer(sender, {t.name(): t for t in request.inputs()})
            except Exception as error:  # the others of this execute() must be answered
                missing = isinstance(error, KeyError)
                message = f"{error.args[0]} is missing; expected a chunk of the generator" if missing else _shown(error)
                try:
                    _finish(sender, _error(message, "INVALID_ARGUMENT" if missing else "INTERNAL"))
                except Exception as closed:
                    _log(f"detokenizer: {message}; {_shown(closed)}")

    def _answer(self, sender: Any, chunk: dict[str, Any]) -> None:
        self._progress[0] = chunk["serial"].as_numpy().reshape(-1)[0]
        last = "finish_reason" in chunk
        if not last and sender.is_cancelled():
            self._stop(chunk["uid"])
        index = int(chunk["chunk_index"].as_numpy().reshape(-1)[0])
        if index < 0:  # a heartbeat
            _finish(sender)
            return
        error = chunk["error"].as_numpy().reshape(-1)[0].decode() if last else ""
        if error:
            _finish(sender, _error(error, "UNAVAILABLE" if error.startswith(SHUTTING_DOWN) else "INTERNAL"))
            return
        _finish(sender, pb_utils.InferenceResponse(self._outputs(chunk, index, last)))

    def _outputs(self, chunk: dict[str, Any], index: int, last: bool) -> list[Any]:
        ids = chunk["output_ids"].as_numpy().reshape(-1)
        start, size = (int(chunk[name].as_numpy().reshape(-1)[0]) for name in ("text_start", "text_bytes"))
        text = _valid_utf8(b"".join([self._text(i) for i in ids])[start:start + size])
        if "echo" in chunk:
            text = chunk["echo"].as_numpy().reshape(-1)[0] + text
        # [1], not [1, 1]: clients of tensorrtllm_backend read as_numpy("text_output")[0]
        outputs = [_text("text_output", text, (1,)), _tensor("chunk_index", index),
                   pb_utils.Tensor("sequence_index", chunk["sequence_index"].as_numpy()), _tensor("batch_index", 0)]
        outputs += [pb_utils.Tensor(t.name, chunk[t.name].as_numpy()) for t in contract.COUNTS if t.name in chunk]
        if "output_log_probs" in chunk:
            outputs.append(pb_utils.Tensor("output_token_ids", ids[None]))
        if "top_token_ids" in chunk:
            texts = [_valid_utf8(self._text(i)) for i in chunk["top_token_ids"].as_numpy().reshape(-1)]
            outputs.append(pb_utils.Tensor("top_tokens", np.array([texts], np.object_)))
        if last:
            outputs += [pb_utils.Tensor(t.name, chunk[t.name].as_numpy()) for t in contract.ENDING]
        return outputs

    def _text(self, token: int) -> bytes:
        return self._bytes[token] if token < len(self._bytes) else b""  # a model's vocabulary may be padded

    def _stop(self, uid: Any) -> None:
        """A step of a cancelled request: the generator's own request is not marked, so tell it."""
        call = pb_utils.InferenceRequest(model_name=self._generator, requested_output_names=[],
                                         inputs=[pb_utils.Tensor("stop_uid", uid.as_numpy())])
        for _ in call.exec(decoupled=True):
            pass
