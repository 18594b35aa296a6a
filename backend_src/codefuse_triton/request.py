"""A generator request: tensors, request parameters and sampling_parameters JSON to the keywords of Engine.submit.

Every refusal is a ValueError that names the field, the value and the limit.
"""
from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass
from typing import Any, Mapping, Sequence

import numpy as np

from . import contract
from .contract import MAX_BAD_WORDS, MAX_STOP_BYTES, OPTION_BY_JSON, OPTION_BY_NAME, Option
from .prompt import Prompt

# request parameters that Triton or a proxy adds
_FOREIGN_PREFIXES = ("triton_", "x-", "sequence_")
_FOREIGN = {"priority", "timeout", "binary_data_output", "headers", "traceparent", "tracestate", "id"}
_WEIGHT = Option("weight", "FP32", "", low=-float(np.finfo(np.float32).max), high=float(np.finfo(np.float32).max))
_REAL_TENSORS = {"input_ids", "prompt_text", "heartbeat", "sampling_parameters", "text_input", *(t.name for t in contract.PROMPT)}


@dataclass(frozen=True)
class Request:
    prompt: Prompt
    submit: dict[str, Any]  # keywords of Engine.submit
    end_id: int  # -1: the model's end tokens
    count: int  # answers to return
    best_of: int  # answers to generate, not less than count
    echo: bytes  # the prompt, when it is to be part of the text
    heartbeat: bool


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _boolean(value: Any, where: str) -> bool:
    if isinstance(value, bool):
        return bool(value)
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, str) and value in (0, 1):
        return bool(value)
    raise ValueError(f"{where} is {_shown(value)}; expected true or false")


def _number(option: Option, value: Any, where: str) -> int | float:
    integer = option.type != "FP32"
    kind = "an integer" if integer else "a number"
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{where} is {_shown(value)}; expected {kind}")
    try:
        number = int(value) if integer and not isinstance(value, float) else float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{where} is {_shown(value)}; expected {kind}") from None
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(f"{where} is {_shown(value)}; expected a finite number")
    if integer and number != int(number):
        raise ValueError(f"{where} is {_shown(value)}; expected an integer")
    number = int(number) if integer else float(number)
    if option.low is not None and number < option.low or option.high is not None and number > option.high:
        limit = f"at least {option.low}" if option.high is None else f"between {option.low} and {option.high}"
        raise ValueError(f"{where} is {_shown(value)}; it must be {limit}")
    return number


def _string(value: Any, where: str) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is not UTF-8: {error}") from None
    if isinstance(value, str):
        return value
    raise ValueError(f"{where} is {_shown(value)}; expected a string")


def _scalar(option: Option, value: Any, where: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if option.type == "BOOL":
        return _boolean(value, where)
    if option.type == "STRING":
        text = _string(value, where)
        if option.high is not None and len(text.encode()) > option.high:
            raise ValueError(f"{where} has {len(text.encode())} bytes; at most {option.high} are accepted")
        return text
    if isinstance(value, bytes):
        value = _string(value, where)
    return _number(option, value, where)


def convert(option: Option, value: Any, where: str) -> Any:
    """One value, or for a list option a tuple of values, checked against the option's range."""
    if option.dims == 1:
        result = _scalar(option, value, where)
    else:
        if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, np.ndarray)):
            value = [value]
        result = tuple(_scalar(option, v, where) for v in value)
        if option.type == "STRING" and option.name != "embedding_bias_words":
            result = tuple(v for v in result if v)  # an empty string is how clients fill a tensor they must send
    if option.neutral and result not in option.neutral:
        raise ValueError(f"{where} is {_shown(result)}; this server does not implement it yet, only "
                         f"{' or '.join(_shown(n) for n in option.neutral)} is accepted")
    if option.choices:
        for value in result if option.dims != 1 else (result,):
            if value not in option.choices:
                raise ValueError(f"{where} is {_shown(value)}; it must be one of {', '.join(c for c in option.choices if c)}")
    if option.name in ("stop_words", "bad_words"):
        if option.name == "bad_words" and len(result) > MAX_BAD_WORDS:
            raise ValueError(f"{where} has {len(result)} strings; at most {MAX_BAD_WORDS} are accepted")
        for word in result:
            if len(word.encode()) > MAX_STOP_BYTES:
                raise ValueError(f"{where} has a string of {len(word.encode())} bytes; at most {MAX_STOP_BYTES} are accepted")
    return result


def _bias_by_id(value: Any, where: str) -> tuple[tuple[int, float], ...]:
    """A JSON object, or one as text; None, empty: none."""
    if isinstance(value, (str, bytes)):
        text = _string(value, where)
        try:
            value = json.loads(text) if text.strip() else {}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {_shown(value)}; expected a JSON object, token id to number")
    key = Option("token", "INT32", "", low=0, high=contract.INT32_MAX)
    return tuple(sorted((int(_number(key, k, f"a token of {where}")), float(_number(_WEIGHT, v, f"{where}[{k}]"))) for k, v in value.items()))


def _bias(by_id: tuple[tuple[int, float], ...], words: tuple[str, ...], weights: tuple[float, ...]) -> dict[int | str, float]:
    """Both kinds as Engine.submit takes them; a word given twice has the sum of its weights."""
    bias: dict[int | str, float] = dict(by_id)
    if not any(words) and not any(weights):  # how clients fill tensors that they must send
        return bias
    if len(words) != len(weights):
        raise ValueError(f"embedding_bias_words has {len(words)} strings and embedding_bias_weights {len(weights)} values; one for each is expected")
    for word, weight in zip(words, weights):
        if word:
            bias[word] = bias.get(word, 0.0) + weight
    return bias


class _Options:
    """Options by canonical name; the same one given twice must be equal."""

    def __init__(self) -> None:
        self.values: dict[str, tuple[Any, str]] = {}

    def put(self, option: Option, value: Any, where: str) -> None:
        value = _bias_by_id(value, where) if option.name == "logit_bias" else convert(option, value, where)
        if option.name in self.values:
            old, old_where = self.values[option.name]
            same = np.float32(old) == np.float32(value) if option.type == "FP32" and option.dims == 1 else old == value
            if not same:
                raise ValueError(f"{old_where} is {_shown(old)} and {where} is {_shown(value)}; give one of them")
        else:
            self.values[option.name] = (value, where)

    def get(self, name: str) -> Any:
        return self.values[name][0] if name in self.values else OPTION_BY_NAME[name].default

    def __contains__(self, name: str) -> bool:
        return name in self.values


def _unknown(name: str, where: str, known: Sequence[str]) -> ValueError:
    close = difflib.get_close_matches(name, known, 1)
    return ValueError(f"{where} {name!r} is unknown" + (f"; did you mean {close[0]!r}?" if close else ""))


def _read_json(text: str, options: _Options) -> None:
    where = "sampling_parameters"
    if not text.strip():
        return
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{where} is {_shown(given)}; expected a JSON object")
    for name, value in given.items():
        if value is None:
            continue
        if name in contract.JSON_IGNORED:
            lowered = value.lower() if isinstance(value, str) else value
            accepted = contract.JSON_IGNORED[name]
            if lowered not in accepted and lowered not in tuple(str(a).lower() for a in accepted):
                raise ValueError(f"{where}.{name} is {_shown(value)}; accepted: null"
                                 + "".join(f", {json.dumps(a)}" for a in accepted))
            continue
        if name == "logprobs" and not isinstance(value, bool):  # vLLM: how many alternatives beside the sampled token
            options.put(OPTION_BY_NAME["num_log_probs"], value, f"{where}.logprobs")
            value = True
        option = OPTION_BY_JSON.get(name)
        if option is None:
            raise _unknown(name, where, (*OPTION_BY_JSON, *contract.JSON_IGNORED))
        options.put(option, value, f"{where}.{name}")


def _read_parameters(parameters: Mapping[str, Any], options: _Options) -> None:
    for name, value in parameters.items():
        if name in OPTION_BY_NAME:
            options.put(OPTION_BY_NAME[name], value, f"parameter {name}")
        elif name == "sampling_parameters":
            _read_json(_string(value, name), options)
        elif name in _REAL_TENSORS:
            raise ValueError(f"{name} is a tensor; it cannot be a request parameter")
        elif name not in _FOREIGN and not name.startswith(_FOREIGN_PREFIXES):
            raise _unknown(name, "parameter", tuple(OPTION_BY_NAME))


def _check_beams(options: _Options) -> None:
    """Beams are not sampled: what clients send without meaning it is let through, the rest refused."""
    for name, accepted in (("temperature", (0, 1)), ("top_k", (-1, 0, 1)), ("top_p", (0, 1)), ("min_p", (0,)), ("num_log_probs", (0,))):
        value = options.get(name)
        if value is not None and value not in accepted:
            raise ValueError(f"{name} is {_shown(value)}; with beam_width {options.get('beam_width')} it must be "
                             f"{' or '.join(_shown(a) for a in accepted)}")


def _read(tensors: Mapping[str, np.ndarray], parameters: Mapping[str, Any]) -> _Options:
    options = _Options()
    for name, array in tensors.items():
        option = OPTION_BY_NAME.get(name)
        if option is None:
            continue
        flat = array.reshape(-1)
        if option.dims == 1 and flat.size != 1:
            raise ValueError(f"{name} has shape {list(array.shape)}; expected one value")
        options.put(option, flat[0] if option.dims == 1 else flat, name)
    if "sampling_parameters" in tensors:
        _read_json(_string(tensors["sampling_parameters"].reshape(-1)[0], "sampling_parameters"), options)
    _read_parameters(parameters, options)
    return options


def parse_text(tensors: Mapping[str, np.ndarray], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the tokenizer, as keywords of make_prompt."""
    options = _read(tensors, parameters)
    return {name: options.get(name) for name in ("token_healing", "suffix", "fim_mode")}


def _prompt(tensors: Mapping[str, np.ndarray]) -> Prompt:
    def ids(name: str) -> list[int]:
        return tensors[name].reshape(-1).tolist() if name in tensors else []

    typed = tensors["prefix_bytes"].reshape(-1)[0] if "prefix_bytes" in tensors else b""
    return Prompt(ids("input_ids"), typed if isinstance(typed, bytes) else str(typed).encode(), ids("prefix_ids"), ids("suffix_ids"),
                  ids("fim_template"), ids("fim_end_ids"))


def parse(tensors: Mapping[str, np.ndarray], parameters: Mapping[str, Any], *, exclude_input: bool = True) -> Request:
    """tensors: by name, any shape with one batch row. exclude_input: the default of exclude_input_in_output."""
    options = _read(tensors, parameters)
    prompt = _prompt(tensors)
    if not prompt.ids and not prompt.template:
        raise ValueError("input_ids is missing or empty; the prompt must have at least one token")
    submit = {o.submit: options.get(o.name) for o in contract.OPTIONS if o.submit}
    if "fim_template" not in tensors:  # not from the tokenizer
        submit.update((name, options.get(name)) for name in ("suffix", "fim_mode") if options.get(name))
    if submit["beam_width"] > 1:
        _check_beams(options)
        submit["temperature"], submit["top_k"], submit["top_p"] = 0.0, 0, 1.0
    elif "temperature" not in options:
        samples = submit["top_k"] > 1 or 0 < submit["top_p"] < 1 or submit["min_p"] > 0
        submit["temperature"] = 1.0 if samples else 0.0
    submit["logit_bias"] = _bias(submit["logit_bias"] or (), options.get("embedding_bias_words"), options.get("embedding_bias_weights"))
    submit["logprobs"] = submit["logprobs"] or submit["top_logprobs"] > 0
    submit["top_k"] = max(submit["top_k"], 0)
    if submit["top_p"] == 0:
        submit["top_k"], submit["top_p"] = 1, 1.0
    if submit["min_tokens"] > submit["max_tokens"]:
        raise ValueError(f"min_length is {submit['min_tokens']}; it must not exceed max_tokens ({submit['max_tokens']})")
    count, best_of = options.get("num_return_sequences"), options.get("best_of")
    best_of = count if best_of is None else best_of
    if best_of < count:
        raise ValueError(f"best_of is {best_of}; it must be at least num_return_sequences ({count})")
    if best_of > count and submit["stream"]:
        raise ValueError(f"best_of is {best_of}; with stream it must be num_return_sequences ({count}): the best are known only at the end")
    if submit["beam_width"] > 1:
        if best_of > count or count > submit["beam_width"]:
            raise ValueError(f"{'best_of' if best_of > count else 'num_return_sequences'} is {best_of}; with beam_width {submit['beam_width']} it "
                             f"must be at most {count if best_of > count else submit['beam_width']}")
        submit["beam_count"] = count
    elif best_of > 1 and submit["temperature"] == 0:
        raise ValueError(f"{'best_of' if best_of > count else 'num_return_sequences'} is {best_of}; with temperature 0 all answers are the "
                         "same, so it must be 1")
    exclude = options.get("exclude_input_in_output")
    echo = not (exclude_input if exclude is None else exclude)
    submit["include_typed"] = submit["include_typed"] and not echo  # the echo has them
    text = tensors["prompt_text"].reshape(-1)[0] if "prompt_text" in tensors else b""
    beat = tensors.get("heartbeat")
    return Request(prompt, submit, options.get("end_id"), count, best_of,
                   (text if isinstance(text, bytes) else str(text).encode()) if echo else b"",
                   beat is not None and bool(beat.reshape(-1)[0]))


def parse_settings(model: str, given: Mapping[str, str]) -> dict[str, Any]:
    """A model's config.pbtxt parameters, checked, with defaults filled in. An empty string is the default."""
    known = {s.name: s for s in contract.MODEL[model].settings}
    for name in given:
        if name not in known:
            raise _unknown(name, f"{model}/config.pbtxt: parameter", tuple(known))
    values: dict[str, Any] = {}
    for name, setting in known.items():
        text = given.get(name, "").strip() or setting.default
        where = f"{model}/config.pbtxt: parameter {name}"
        if setting.choices and text not in setting.choices:
            raise ValueError(f"{where} is {text!r}; it must be one of {', '.join(setting.choices)}")
        if setting.type is int:
            option = Option(name, "INT64", "", low=setting.low, high=setting.high)
            values[name] = _number(option, text, where)
        else:
            values[name] = text
    return values
