"""What goes over the wire: options to a ModelInferRequest, responses to chunks and a result. No I/O."""
from __future__ import annotations

import json
import re
import struct
import time
from dataclasses import dataclass, field
from typing import Any, Mapping, Sequence

import grpc
import numpy as np
from tritonclient.grpc import service_pb2

CHANNEL_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1),
                   ("grpc.primary_user_agent", "codefuse-triton-client")]
_CODE = re.compile(r" \[([A-Z_]+)\]$")  # an error on a stream carries no status: the server's models put it into the text
# (the header triton_grpc_error would make Triton send a status, but 24.10 may crash on it)

# keyword -> tensor, Triton type
OPTIONS = {
    "max_tokens": ("max_tokens", "INT32"), "min_tokens": ("min_tokens", "INT32"), "temperature": ("temperature", "FP32"),
    "top_k": ("top_k", "INT32"), "top_p": ("top_p", "FP32"), "min_p": ("min_p", "FP32"), "seed": ("random_seed", "UINT64"),
    "n": ("num_return_sequences", "INT32"), "best_of": ("best_of", "INT32"),
    "beam_width": ("beam_width", "INT32"), "length_penalty": ("length_penalty", "FP32"),
    "beam_diversity_rate": ("beam_search_diversity_rate", "FP32"), "early_stopping": ("early_stopping", "BOOL"),
    "repetition_penalty": ("repetition_penalty", "FP32"), "presence_penalty": ("presence_penalty", "FP32"),
    "frequency_penalty": ("frequency_penalty", "FP32"), "logit_bias": ("logit_bias", "BYTES"), "bad_words": ("bad_words", "BYTES"),
    "stop": ("stop_words", "BYTES"), "include_stop": ("include_stop", "BOOL"), "stop_at": ("stop_at", "BYTES"),
    "max_time_ms": ("max_time_ms", "INT32"), "token_healing": ("token_healing", "BOOL"), "include_typed": ("include_typed", "BOOL"),
    "suffix": ("suffix", "BYTES"), "fim_mode": ("fim_mode", "BYTES"), "end_id": ("end_id", "INT32"),
    "stop_token_ids": ("stop_token_ids", "INT32"), "ignore_eos": ("ignore_eos", "BOOL"),
    "exclude_input": ("exclude_input_in_output", "BOOL"), "logprobs": ("return_log_probs", "BOOL"),
    "top_logprobs": ("num_log_probs", "INT32"), "session": ("session", "BYTES"), "deadline_ms": ("deadline_ms", "INT32"),
    "cache_salt": ("cache_salt", "BYTES"),
    "sampling_parameters": ("sampling_parameters", "BYTES"),
}
_NUMPY = {"INT32": np.int32, "FP32": np.float32, "UINT64": np.uint64, "BOOL": np.bool_, "INT64": np.int64}


class CompletionError(RuntimeError):
    """The request failed. code: the gRPC status name, or UNKNOWN."""

    def __init__(self, message: str, code: str = "UNKNOWN") -> None:
        super().__init__(message)
        self.code = code


class InvalidRequest(CompletionError, ValueError):
    """The server refused the request; the message names field, value and limit."""


@dataclass(frozen=True)
class TopToken:
    """One of the most likely tokens in the place of a token of the text."""
    id: int
    text: str  # empty: a special token
    log_prob: float


@dataclass(frozen=True)
class Chunk:
    text: str
    index: int
    num_output_tokens: int  # so far
    finish_reason: str = ""  # last chunk of an answer: eos, stop, length, time, cancelled or deadline
    log_probs: tuple[float, ...] = ()  # of token_ids, with logprobs or top_logprobs
    token_ids: tuple[int, ...] = ()
    top: tuple[tuple[TopToken, ...], ...] = ()  # for each of token_ids, the likeliest first, with top_logprobs
    sequence_index: int = 0  # which answer, of n


@dataclass(frozen=True)
class Timings:
    queue_s: float = 0.0  # the server's three
    prefill_s: float = 0.0
    decode_s: float = 0.0
    first_chunk_s: float = 0.0  # seen here, from the call on
    total_s: float = 0.0


@dataclass(frozen=True)
class Result:
    text: str
    finish_reason: str
    stop_reason: str = ""  # the stop string that ended the text, or "stop_at:" and the name of what did
    num_input_tokens: int = 0
    num_truncated_tokens: tuple[int, ...] = (0, 0)  # with suffix: that the prompt and the suffix lost to fit
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    cum_log_prob: float = 0.0
    log_probs: tuple[float, ...] = ()  # of token_ids, with logprobs or top_logprobs
    token_ids: tuple[int, ...] = ()
    top: tuple[tuple[TopToken, ...], ...] = ()  # for each of token_ids
    timings: Timings = field(default_factory=Timings)


def _bytes_tensor(values: Sequence[str | bytes]) -> bytes:
    encoded = [v.encode() if isinstance(v, str) else bytes(v) for v in values]
    return b"".join(struct.pack("<I", len(v)) + v for v in encoded)


def _read_bytes_tensor(raw: bytes) -> list[bytes]:
    values, at = [], 0
    while at < len(raw):
        size = struct.unpack_from("<I", raw, at)[0]
        values.append(raw[at + 4:at + 4 + size])
        at += 4 + size
    return values


def _array(name: str, kind: str, values: Sequence[Any]) -> np.ndarray:
    """A value that the type cannot hold is refused here: it would arrive as another one."""
    dtype = np.dtype(_NUMPY[kind])
    for value in values:
        if kind == "BOOL":
            expected = "" if isinstance(value, (bool, np.bool_)) else "true or false"
        elif isinstance(value, (bool, str, bytes)) or not isinstance(value, (int, float, np.integer, np.floating)):
            expected = "a number"
        elif kind == "FP32":
            expected = ""
        else:
            limit = np.iinfo(dtype)
            expected = "" if limit.min <= value <= limit.max and int(value) == value else (
                f"an integer between {limit.min} and {limit.max}")
        if expected:
            raise InvalidRequest(f"{name} is {value!r}; expected {expected}", "INVALID_ARGUMENT")
    return np.array(values, dtype)


def make_request(model: str, prompt: str | bytes, *, stream: bool, request_id: str = "",
                 options: Mapping[str, Any]) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)

    def add(name: str, kind: str, values: Sequence[Any]) -> None:
        request.inputs.add(name=name, datatype=kind, shape=[1, len(values)])
        raw = _bytes_tensor(values) if kind == "BYTES" else _array(name, kind, values).tobytes()
        request.raw_input_contents.append(raw)

    add("text_input", "BYTES", [prompt])
    add("stream", "BOOL", [stream])
    for keyword, value in options.items():
        if keyword not in OPTIONS:
            raise TypeError(f"unknown option {keyword!r}; known: {', '.join(OPTIONS)}")
        if value is None:
            continue
        if isinstance(value, Mapping):  # logit_bias
            value = json.dumps(dict(value))
        single = isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, np.ndarray))
        values = [value] if single else list(value)
        if values:
            add(*OPTIONS[keyword], values)
    return request


def _error(message: str, code: str = "UNKNOWN") -> CompletionError:
    match = _CODE.search(message)
    if match:
        message, code = message[:match.start()], match.group(1)
    message = re.sub(r"^in ensemble '[^']*', ", "", message)
    return InvalidRequest(message, code) if code == "INVALID_ARGUMENT" else CompletionError(message, code)


def error_from_status(error: grpc.RpcError) -> CompletionError:
    code = error.code()
    return _error(error.details() or str(error), code.name if code is not None else "UNKNOWN")


class _Sequence:
    """What has come of one answer."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.chunks: list[Chunk] = []
        self.result: Result | None = None


class Progress:
    """Collects the responses of one request, checks their order, makes the results."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._sequences: dict[int, _Sequence] = {}
        self._final = False
        self.error: CompletionError | None = None

    def take(self, response: service_pb2.ModelStreamInferResponse) -> Chunk | None:
        """None: nothing to show (a final flag, an error)."""
        if self.error is not None:
            return None
        if response.error_message:
            self.error = _error(response.error_message)
            return None
        infer = response.infer_response
        self._final = self._final or infer.parameters["triton_final_response"].bool_param
        if not infer.outputs:
            return None
        values = {o.name: (o.datatype, raw) for o, raw in zip(infer.outputs, infer.raw_output_contents)}

        def read(name: str, default: Any) -> Any:
            if name not in values:
                return default
            kind, raw = values[name]
            if kind == "BYTES":
                return [text.decode(errors="replace") for text in _read_bytes_tensor(raw)]
            return np.frombuffer(raw, _NUMPY[kind]).tolist()

        number = read("sequence_index", [0])[0]
        sequence = self._sequences.setdefault(number, _Sequence())
        now = time.monotonic() - self._started
        sequence.first = now if sequence.first is None else sequence.first
        index = read("chunk_index", [len(sequence.chunks)])[0]
        if index != len(sequence.chunks):
            raise CompletionError(f"chunk {index} came where chunk {len(sequence.chunks)} was expected", "DATA_LOSS")
        ids = tuple(read("output_token_ids", []))
        tops = [TopToken(*t) for t in zip(read("top_token_ids", []), read("top_tokens", []), read("top_log_probs", []))]
        each = len(tops) // max(len(ids), 1)
        chunk = Chunk(read("text_output", [""])[0], index, read("num_output_tokens", [0])[0], read("finish_reason", [""])[0],
                      tuple(read("output_log_probs", [])), ids, tuple(tuple(tops[i * each:(i + 1) * each]) for i in range(len(ids) * (each > 0))),
                      number)
        sequence.chunks.append(chunk)
        if chunk.finish_reason:
            sequence.result = Result(
                "".join(c.text for c in sequence.chunks), chunk.finish_reason, read("stop_reason", [""])[0], read("num_input_tokens", [0])[0],
                tuple(read("num_truncated_tokens", [0, 0])),
                chunk.num_output_tokens, read("num_cached_tokens", [0])[0], read("cum_log_probs", [0.0])[0],
                tuple(p for c in sequence.chunks for p in c.log_probs), tuple(i for c in sequence.chunks for i in c.token_ids),
                tuple(t for c in sequence.chunks for t in c.top), Timings(*read("timings", [0.0] * 3), sequence.first, now))
        return chunk

    @property
    def finished(self) -> bool:
        """The server has said its last word."""
        return self._final or self.error is not None

    def end(self) -> list[Result]:
        """At the end of the stream: the answers in order. An error is raised here, not when it comes: Triton keeps the memory of a
        request whose stream is cancelled after its last response, so every stream is read to its end."""
        if self.error is not None:
            raise self.error
        results = [self._sequences[i].result for i in sorted(self._sequences)]
        if not results or None in results:
            raise CompletionError("the stream ended before the text was finished", "UNAVAILABLE")
        return [r for r in results if r is not None]
