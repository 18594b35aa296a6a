"""What goes over the wire: options to a ModelInferRequest, responses to chunks and a result. No I/O."""
from __future__ import annotations

import json
import re
import struct
import time
from dataclasses import dataclass, field
from typing import Any, Mapping, NamedTuple, Sequence

import grpc
import numpy as np
from tritonclient.grpc import service_pb2

CHANNEL_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1),
                   ("grpc.primary_user_agent", "codefuse-triton-client")]
_CODE = re.compile(r" \[([A-Z_]+)\]$")  # an error on a stream carries no status: the server's models put it into the text
# (the header triton_grpc_error would make Triton send a status, but 24.10 may crash on it)


class Option(NamedTuple):
    tensor: str
    type: str  # of Triton
    help: str
    many: bool = False  # takes a list


OPTIONS = {  # by keyword
    "max_tokens": Option("max_tokens", "INT32", "most tokens to generate"),
    "min_tokens": Option("min_tokens", "INT32", "tokens before an end token or a stop string counts"),
    "temperature": Option("temperature", "FP32", "0: greedy, the default"),
    "top_k": Option("top_k", "INT32", "keep the k most likely tokens"),
    "top_p": Option("top_p", "FP32", "keep the most likely tokens that hold this probability"),
    "min_p": Option("min_p", "FP32", "keep tokens at least this fraction as likely as the most likely one"),
    "seed": Option("random_seed", "UINT64", "the same seed gives the same text"),
    "n": Option("num_return_sequences", "INT32", "answers"),
    "best_of": Option("best_of", "INT32", "so many are generated and the n best returned; not streamed"),
    "beam_width": Option("beam_width", "INT32", "beam search with so many beams"),
    "length_penalty": Option("length_penalty", "FP32", "with beams: log-probability / tokens ^ this is a text's score"),
    "beam_diversity_rate": Option("beam_search_diversity_rate", "FP32", "with beams: times a token's rank in its beam, added to its score"),
    "early_stopping": Option("early_stopping", "BOOL", "with beams: end with beam_width finished texts"),
    "repetition_penalty": Option("repetition_penalty", "FP32", "against tokens of prompt and text; 1: off"),
    "presence_penalty": Option("presence_penalty", "FP32", "against tokens that the text has"),
    "frequency_penalty": Option("frequency_penalty", "FP32", "against tokens, as often as the text has them"),
    "logit_bias": Option("logit_bias", "BYTES", "what is added to logits: token ids to numbers, as a JSON object"),
    "bias_words": Option("embedding_bias_words", "BYTES", "texts whose tokens get the bias_weights of the same place", many=True),
    "bias_weights": Option("embedding_bias_weights", "FP32", "one for each of bias_words", many=True),
    "bad_words": Option("bad_words", "BYTES", "strings that the text will not contain", many=True),
    "stop": Option("stop_words", "BYTES", "strings before which the text ends", many=True),
    "include_stop": Option("include_stop", "BOOL", "leave the stop string in the text"),
    "stop_at": Option("stop_at", "BYTES", "end where code is complete: line, block, bracket, suffix or repetition", many=True),
    "max_time_ms": Option("max_time_ms", "INT32", "the text ends so long after the request came"),
    "token_healing": Option("token_healing", "BOOL", "continue the prompt's last byte, the default; else its last token"),
    "include_typed": Option("include_typed", "BOOL", "begin with the end of the prompt that was spelled again"),
    "suffix": Option("suffix", "BYTES", "the text behind the cursor: fill in between"),
    "fim_mode": Option("fim_mode", "BYTES", "with suffix, the order that the model reads: psm or spm"),
    "end_id": Option("end_id", "INT32", "the end token, in place of the model's"),
    "stop_token_ids": Option("stop_token_ids", "INT32", "further end tokens", many=True),
    "ignore_eos": Option("ignore_eos", "BOOL", "go on after the end token"),
    "exclude_input": Option("exclude_input_in_output", "BOOL", "leave the prompt out of the text"),
    "logprobs": Option("return_log_probs", "BOOL", "report the tokens and their log-probabilities"),
    "top_logprobs": Option("num_log_probs", "INT32", "so many of the most likely tokens in the place of each"),
    "session": Option("session", "BYTES", "cancel the request before this one of the same session"),
    "deadline_ms": Option("deadline_ms", "INT32", "give up when the first token has not come by then"),
    "cache_salt": Option("cache_salt", "BYTES", "reuse computed prompts only of requests with the same one"),
    "sampling_parameters": Option("sampling_parameters", "BYTES", "options under vLLM's names, as a JSON object"),
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


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 200:  # Python may refuse to write it
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _utf8(name: str, value: Any) -> bytes:
    """bytes as they are: what is in them is the server's to judge."""
    if isinstance(value, str):
        try:
            return value.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"{name} has a lone surrogate at character {error.start}; expected text", "INVALID_ARGUMENT") from None
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise InvalidRequest(f"{name} is {_shown(value)}; expected text", "INVALID_ARGUMENT")
    return bytes(value)


def _bytes_tensor(name: str, values: Sequence[Any]) -> bytes:
    encoded = [_utf8(name, v) for v in values]
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
            limit = float(np.finfo(dtype).max)
            expected = f"a number between {-limit:g} and {limit:g}" if limit < abs(value) < float("inf") else ""
        else:
            limit = np.iinfo(dtype)
            expected = "" if limit.min <= value <= limit.max and int(value) == value else (
                f"an integer between {limit.min} and {limit.max}")
        if expected:
            raise InvalidRequest(f"{name} is {_shown(value)}; expected {expected}", "INVALID_ARGUMENT")
    return np.array(values, dtype)


def make_request(model: str, prompt: str | bytes, *, stream: bool, request_id: str = "",
                 options: Mapping[str, Any]) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name=_utf8("model", model), id=_utf8("request_id", request_id))

    def add(name: str, kind: str, values: Sequence[Any]) -> None:
        request.inputs.add(name=name, datatype=kind, shape=[1, len(values)])
        raw = _bytes_tensor(name, values) if kind == "BYTES" else _array(name, kind, values).tobytes()
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
        option = OPTIONS[keyword]
        single = isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, np.ndarray))
        values = [value] if single else list(value)
        if len(values) > 1 and not option.many:
            raise InvalidRequest(f"{keyword} has {len(values)} values; expected one", "INVALID_ARGUMENT")
        if values:
            add(option.tensor, option.type, values)
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
