"""Every tensor, request option and model setting, in one table.

The config.pbtxt files are written from it (`python -m codefuse_triton.contract model_repository`), requests are
parsed by it (request.py), and the documentation is tested against it.
"""
from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import on_disk

GENERATOR, TOKENIZER, DETOKENIZER, ENSEMBLE = "generator", "tokenizer", "detokenizer", "ensemble"
MAX_BATCH = 1  # tensors carry a leading 1; a client's batch is several requests
# The tokenizer spells that 1 out in its dims instead: the Python backend turns a request without any input away
# with an unclear message when max_batch_size is not 0, and a forgotten text_input is just that.


@dataclass(frozen=True)
class Option:
    """One thing that a request may say: as a tensor, as a request parameter, or inside sampling_parameters."""
    name: str
    type: str  # STRING INT32 UINT64 FP32 BOOL
    doc: str
    dims: int = 1  # 1, or -1: a list
    default: Any = None  # None: not given
    low: float | None = None
    high: float | None = None  # of a STRING: bytes
    alias: str = ""  # a second tensor and parameter name
    json: str = ""  # its name in sampling_parameters where that is another one
    choices: tuple[str, ...] = ()  # of a STRING
    neutral: tuple = ()  # the only values accepted until the engine implements it; () and "" always are
    submit: str = ""  # the Engine.submit keyword


@dataclass(frozen=True)
class Tensor:
    name: str
    type: str
    dims: int
    doc: str


@dataclass(frozen=True)
class Setting:
    """A `parameters` entry of a config.pbtxt."""
    name: str
    default: str
    doc: str
    type: type = str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    name: str
    doc: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    decoupled: bool = True
    settings: tuple[Setting, ...] = ()
    max_batch_size: int = MAX_BATCH


TEXT_INPUT = Tensor("text_input", "STRING", 1, "the prompt (the only required input)")
SAMPLING_PARAMETERS = Tensor("sampling_parameters", "STRING", 1, "a JSON object of options under vLLM's names")
INT32_MAX = 2**31 - 1

OPTIONS = (
    Option("max_tokens", "INT32", "most tokens to generate", default=128, low=1, high=INT32_MAX, submit="max_tokens"),
    Option("min_length", "INT32", "tokens that come before an end token may; stop strings found in them do not count", default=0, low=0, high=INT32_MAX,
           alias="min_tokens", submit="min_tokens"),
    Option("temperature", "FP32", "0: greedy; not given: 1 if top_k > 1, 0 < top_p < 1 or min_p > 0 is given, else 0",
           low=0, high=1e4, submit="temperature"),
    Option("top_k", "INT32", "keep the k most likely tokens; 0 (or -1): all", default=0, low=-1, high=INT32_MAX,
           submit="top_k"),
    Option("top_p", "FP32", "keep the most likely tokens that hold this probability; 0: only the most likely one",
           default=1.0, low=0, high=1, submit="top_p"),
    Option("min_p", "FP32", "keep tokens at least this fraction as likely as the most likely one", default=0.0, low=0,
           high=1, submit="min_p"),
    Option("random_seed", "UINT64", "the same seed gives the same text; not given: a fresh one", low=0, high=2**64 - 1,
           alias="seed", submit="seed"),
    Option("repetition_penalty", "FP32", "divides the logits of tokens of prompt and text if positive, else multiplies them; 1: off",
           default=1.0, low=0.01, high=100, submit="repetition_penalty"),
    Option("presence_penalty", "FP32", "subtracted from the logits of tokens that the text has", default=0.0, low=-100, high=100,
           submit="presence_penalty"),
    Option("frequency_penalty", "FP32", "the same, as often as the text has them", default=0.0, low=-100, high=100,
           submit="frequency_penalty"),
    Option("logit_bias", "STRING", "a JSON object: token id to the number that is added to its logit", submit="logit_bias"),
    Option("embedding_bias_words", "STRING", "texts whose tokens get the weight of the same place added to their logits", dims=-1, default=()),
    Option("embedding_bias_weights", "FP32", "one for each of embedding_bias_words", dims=-1, default=()),
    Option("bad_words", "STRING", "strings that the text will not contain, wherever tokens begin and end, nor complete where the "
           "prompt ends in the beginning of one", dims=-1, default=(), submit="bad_words"),
    Option("num_return_sequences", "INT32", "answers to the prompt, told apart by sequence_index; the i-th, from 0, is what random_seed + i "
           "gives alone", default=1, low=1, high=64, json="n"),
    Option("best_of", "INT32", "so many are generated, the num_return_sequences with the highest mean log-probability of a token returned, "
           "best first; not with stream; not given: num_return_sequences", low=1, high=64),
    Option("beam_width", "INT32", "beam search with so many beams; its num_return_sequences best texts come at the end, best first; not with sampling "
           "or num_log_probs", default=1, low=1, high=64, submit="beam_width"),
    Option("length_penalty", "FP32", "with beams: a text's score is its log-probability / tokens ^ length_penalty", default=1.0, low=-100, high=100,
           alias="len_penalty", submit="length_penalty"),
    Option("beam_search_diversity_rate", "FP32", "with beams: times a token's rank among those of its beam, added to its score; below 0 siblings are "
           "held back", default=0.0, low=-1e4, high=1e4, submit="beam_diversity_rate"),
    Option("early_stopping", "BOOL", "with beams: end with beam_width finished texts even if another could become better", default=False,
           submit="early_stopping"),
    Option("stop_words", "STRING", "strings that end the text, found in the text itself; one that names a special token makes it an end token", dims=-1, default=(),
           json="stop", submit="stop"),
    Option("include_stop", "BOOL", "leave the stop string in the text", default=False,
           json="include_stop_str_in_output", submit="include_stop"),
    Option("stop_at", "STRING", "further ends of the text, where code is complete: line (before the next line end), block (behind the indented "
           "block that the cursor is in or opens), bracket (before the one that closes what is open at the cursor), suffix (before the text "
           "repeats what stands behind the cursor), repetition (when nothing else comes any more)", dims=-1, default=(),
           choices=("line", "block", "bracket", "suffix", "repetition"), submit="stop_at"),
    Option("end_id", "INT32", "the end token, in place of the model's; -1: the model's", default=-1, low=-1,
           high=INT32_MAX),
    Option("stop_token_ids", "INT32", "further end tokens; ignore_eos does not ignore them", dims=-1, default=(), low=0, high=INT32_MAX,
           submit="stop_token_ids"),
    Option("ignore_eos", "BOOL", "go on after the end token, the model's or end_id", default=False, submit="ignore_eos"),
    Option("max_time_ms", "INT32", "the text ends so long after the request came, with finish_reason time; 0: no limit", default=0, low=0,
           high=INT32_MAX, submit="max_time_ms"),
    Option("token_healing", "BOOL", "the prompt may end anywhere: the text continues its last byte, however tokens divide it; false: its last token",
           default=True),
    Option("include_typed", "BOOL", "text_output begins with the end of the prompt that was spelled again to continue it", default=False,
           submit="include_typed"),
    Option("suffix", "STRING", "the text behind the cursor: the model fills in between; what does not fit is cut off text_input's beginning and suffix's end",
           default=""),
    Option("fim_mode", "STRING", "with suffix, the order that the model reads: psm (prefix, suffix) or spm; empty: psm", default="",
           choices=("", "psm", "spm")),
    Option("stream", "BOOL", "send text as it comes; else one response", default=False, submit="stream"),
    Option("exclude_input_in_output", "BOOL", "leave the prompt out of text_output; the default is a model setting"),
    Option("return_log_probs", "BOOL", "report the new tokens and their log-probabilities; true with num_log_probs", default=False, json="logprobs",
           submit="logprobs"),
    Option("num_log_probs", "INT32", "how many of the most likely tokens to report in the place of each new one", default=0, low=0,
           high=20, json="top_logprobs", submit="top_logprobs"),
    Option("pad_id", "INT32", "accepted; nothing is padded"),
    Option("session", "STRING", "not empty: cancels the request before it of the same session, wherever that is", default="", high=256,
           submit="session"),
    Option("deadline_ms", "INT32", "end the request when its first token has not come so many milliseconds after it arrived; 0: never",
           default=0, low=0, high=INT32_MAX, submit="deadline_ms"),
    Option("cache_salt", "STRING", "requests of different salts reuse nothing of each other's prompts", default="", high=256,
           submit="cache_salt"),
    Option("prediction", "STRING", "only empty", neutral=("",)),
)
OPTION_BY_NAME = {name: o for o in OPTIONS for name in (o.name, o.alias) if name}
OPTION_BY_JSON = {name: o for o in OPTIONS for name in (o.json or o.name, o.alias) if name}
MAX_BAD_WORDS, MAX_STOP_BYTES = 64, 1024  # bytes of one string, of bad_words too

# vLLM's names that change nothing here, with the values that are accepted (None always is)
JSON_IGNORED = {
    "use_beam_search": (False,), "detokenize": (True,),
    "skip_special_tokens": (True,), "spaces_between_special_tokens": (True, False), "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
}

_OPTION_TENSORS = tuple(Tensor(name, o.type, o.dims, o.doc if name == o.name else f"the same as {o.name}")
                        for o in OPTIONS for name in (o.name, o.alias) if name) + (SAMPLING_PARAMETERS,)
_TEXT_OPTIONS = tuple(t for t in _OPTION_TENSORS if t.name in ("token_healing", "suffix", "fim_mode", SAMPLING_PARAMETERS.name))
COUNTS = (
    Tensor("num_input_tokens", "INT32", 1, "tokens of the prompt"),
    Tensor("num_truncated_tokens", "INT32", 2, "with suffix: tokens that text_input and suffix lost to fit"),
    Tensor("num_output_tokens", "INT32", 1, "tokens of new text so far"),
    Tensor("num_cached_tokens", "INT32", 1, "tokens of the prompt that were not computed again"),
    Tensor("cum_log_probs", "FP32", 1, "sum of the log-probabilities so far (return_log_probs)"),
    Tensor("output_log_probs", "FP32", -1, "log-probability of each new token (return_log_probs)"),
    Tensor("top_token_ids", "INT32", -1, "the num_log_probs most likely tokens in the place of each new token, the likeliest first"),
    Tensor("top_log_probs", "FP32", -1, "their log-probabilities"),
)
ENDING = (
    Tensor("finish_reason", "STRING", 1, "last response of an answer: eos, stop, length, time, cancelled, deadline or error"),
    Tensor("stop_reason", "STRING", 1, "last response: the stop string that ended the text, or stop_at: and the name of what did"),
    Tensor("timings", "FP32", 3, "last response: seconds queued, in the prompt, generating"),
)
TOKENS = (
    Tensor("output_token_ids", "INT32", -1, "the new tokens (return_log_probs)"),
    Tensor("top_tokens", "STRING", -1, "the texts of top_token_ids; those of special tokens are empty"),
)
_CHUNK_INDEX = Tensor("chunk_index", "INT32", 1, "0, 1, 2 .. within an answer")
_SEQUENCE_INDEX = Tensor("sequence_index", "INT32", 1, "which of the num_return_sequences answers")
INPUT_IDS = Tensor("input_ids", "INT32", -1, "the prompt's tokens")
HEARTBEAT = Tensor("heartbeat", "BOOL", 1, "send an empty chunk (chunk_index -1) now and then while there is no text: "
                   "the detokenizer sees a client that has gone only when a chunk passes")
# what the tokenizer makes of the text options; the last two are empty without a suffix
PROMPT = (
    Tensor("prefix_bytes", "STRING", 1, "the end of the prompt in bytes, behind input_ids: the text continues them"),
    Tensor("prefix_ids", "INT32", -1, "the tokens of prefix_bytes as the prompt's last ones, counted as such; may be missing"),
    Tensor("suffix_ids", "INT32", -1, "tokens behind the cursor"),
    Tensor("fim_template", "INT32", -1, "of fill in the middle: tokens, -1 for input_ids, -2 for suffix_ids"),
    Tensor("fim_end_ids", "INT32", -1, "tokens that end the middle"),
)
_CHUNK = (
    Tensor("output_ids", "INT32", -1, "new tokens"),
    Tensor("uid", "INT64", 1, "the engine's name of the request, for stop_uid"),
    Tensor("text_start", "INT32", 1, "first byte of the new text in the bytes of output_ids"),
    Tensor("text_bytes", "INT32", 1, "bytes of new text"),
    _CHUNK_INDEX,
    _SEQUENCE_INDEX,
    Tensor("serial", "INT64", 1, "number of the chunk among all that go to the detokenizer, which reports how far it is"),
    Tensor("echo", "STRING", 1, "first chunk: the prompt, when it is to be part of the text"),
    Tensor("error", "STRING", 1, "last chunk: what went wrong after the first chunk"),
) + ENDING + COUNTS

_TOKENIZER_DIR = Setting("tokenizer_dir", "../generator/1",
                         "directory of the tokenizer files, absolute or relative to this model's directory")

MODELS = (
    Model(TOKENIZER, "Prompt text to token ids. Refuses a request without text_input.", (TEXT_INPUT,) + _TEXT_OPTIONS,
          (INPUT_IDS,) + PROMPT + (HEARTBEAT,), decoupled=False, max_batch_size=0, settings=(
              _TOKENIZER_DIR,
              Setting("max_input_bytes", "4194304", "longest text_input, and suffix", int, 1, 2**30))),
    Model(GENERATOR, "Token ids to token chunks: submits to the engine and returns at once; one thread sends.",
          (INPUT_IDS,) + _OPTION_TENSORS + (
              *PROMPT, Tensor("prompt_text", "STRING", 1, "the prompt as text, to be echoed"), HEARTBEAT,
              Tensor("stop_uid", "INT64", 1, "cancel this uid; given alone, answered by the final flag only")),
          _CHUNK, settings=(
              Setting("weights", "", "weights directory (tools/convert.py writes one) of all versions, absolute or relative to this model's "
                      "directory; empty: each version's own, its directory or what the link weights in it leads to"),
              Setting("device", "auto", "auto (cuda if there is one, else cpu), cpu, cuda or cuda:N"),
              Setting("dtype", "auto", "of activations and KV cache; auto: the checkpoint's on cuda, float32 on cpu",
                      choices=("auto", "float32", "float16", "bfloat16")),
              Setting("tensor_parallel", "1", "GPUs that share the weights: device and those after it, up to 8, which must have access to each other's memory", int, 1, 64),
              Setting("slots", "16", "requests computed at the same time", int, 1, 64),
              Setting("kv_memory_mb", "0", "KV cache in MiB, of each GPU; 0: decided from slots and max_len or from free memory", int,
                      0, 2**24),
              Setting("queue", "256", "requests that may wait; one more is refused", int, 1, 2**20),
              Setting("max_len", "0", "longest prompt + text in tokens; 0: the model's", int, 0, 2**24),
              Setting("prefill_tokens", "512", "most prompt tokens computed in one step", int, 1, 2**20),
              Setting("prefix_cache", "on", "reuse of what requests with the same beginning have computed; on: where that changes no bit of a "
                      "result; generated: also, as a prompt's, of generated text, which on a GPU is rounded differently; off",
                      choices=("on", "generated", "off")),
              Setting("threads", "0", "CPU threads; 0: all cores", int, 0, 1024),
              Setting("exclude_input_in_output", "true", "default of the request option of that name",
                      choices=("true", "false")),
              Setting("responses_per_s", "1500", "responses sent per second over all streams; beyond it tokens travel "
                      "together (Triton itself has no back-pressure)", int, 1, 10**6))),
    Model(DETOKENIZER, "Token chunks to text, a pure function of one chunk; an in-band error becomes an error.",
          _CHUNK, (Tensor("text_output", "STRING", 1, "new text; its concatenation is the whole text"), _CHUNK_INDEX,
                   _SEQUENCE_INDEX, Tensor("batch_index", "INT32", 1, "0")) + ENDING + COUNTS + TOKENS,
          settings=(_TOKENIZER_DIR, Setting("generator", GENERATOR, "the model that is told of a request whose client has gone"))),
)
MODEL = {m.name: m for m in MODELS}
MODEL[ENSEMBLE] = Model(ENSEMBLE, "Text to text: tokenizer, generator, detokenizer.", (TEXT_INPUT,) + _OPTION_TENSORS,
                        MODEL[DETOKENIZER].outputs)


def _tensor_list(kind: str, tensors: tuple[Tensor, ...], batched: bool) -> list[str]:
    row = "" if batched else f"{MAX_BATCH}, "
    optional = ", optional: true" if kind == "input" else ""
    lines = [f'  {{ name: "{t.name}", data_type: TYPE_{t.type}, dims: [ {row}{t.dims} ]{optional} }}' for t in tensors]
    return [f"{kind} ["] + [line + "," for line in lines[:-1]] + [lines[-1], "]"]


def _step(name: str, inputs: dict[str, str], outputs: dict[str, str]) -> list[str]:
    lines = ["    {", f'      model_name: "{name}"', "      model_version: -1"]
    for kind, mapping in (("input_map", inputs), ("output_map", outputs)):
        lines += [f'      {kind} {{ key: "{key}", value: "{value}" }}' for key, value in mapping.items()]
    return lines + ["    }"]


def _ensemble_steps(names: Mapping[str, str]) -> list[str]:
    """A value is a name of the ensemble's; names with a dot are its inner tensors."""
    made = {t.name: f"tokenizer.{t.name}" for t in MODEL[TOKENIZER].outputs}
    generator_inputs = {**made, "prompt_text": TEXT_INPUT.name}
    generator_inputs.update({t.name: t.name for t in _OPTION_TENSORS})
    chunk = {t.name: f"generator.{t.name}" for t in _CHUNK}
    steps = [_step(names[TOKENIZER], {t.name: t.name for t in MODEL[TOKENIZER].inputs}, made),
             _step(names[GENERATOR], generator_inputs, chunk),
             _step(names[DETOKENIZER], chunk, {t.name: t.name for t in MODEL[DETOKENIZER].outputs})]
    body = [line + ("," if i + 1 < len(steps) and line == "    }" else "") for i, s in enumerate(steps) for line in s]
    return ["ensemble_scheduling {", "  step ["] + body + ["  ]", "}"]


NAMES = {name: name for name in MODEL}
WRITTEN_FROM = "# Written from backend_src/codefuse_triton/contract.py; only parameters are meant to be edited."


def quoted(text: str) -> str:
    """A string of protobuf's text format."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def unquoted(text: str) -> str:
    """What quoted() was given."""
    return re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], text[1:-1])


def config_pbtxt(name: str, names: Mapping[str, str] = NAMES, settings: Mapping[str, str] = {}) -> str:
    """The config.pbtxt of MODEL[name]. names: what the four models are called; settings: those with another value than the default."""
    model = MODEL[name]
    lines = [f"# {model.doc}", WRITTEN_FROM,
             f'name: "{names[name]}"', f'{"platform" if name == ENSEMBLE else "backend"}: "{"ensemble" if name == ENSEMBLE else "python"}"',
             f"max_batch_size: {model.max_batch_size}"]
    if model.decoupled and name != ENSEMBLE:
        lines.append("model_transaction_policy { decoupled: true }")
    lines += _tensor_list("input", model.inputs, model.max_batch_size > 0)
    lines += _tensor_list("output", model.outputs, model.max_batch_size > 0)
    if name == ENSEMBLE:
        return "\n".join(lines + _ensemble_steps(names)) + "\n"
    lines.append("instance_group [ { count: 1, kind: KIND_CPU } ]")  # one: it keeps the order of the chunks
    for s in model.settings:
        values = f" ({' | '.join(s.choices)})" if s.choices else f" ({s.low} .. {s.high})" if s.low is not None else ""
        lines += [f"# {s.doc}{values}",
                  f'parameters {{ key: "{s.name}", value: {{ string_value: {quoted(settings.get(s.name, s.default))} }} }}']
    return "\n".join(lines) + "\n"


WEIGHTS_LINK = "weights"  # in a version directory, to a weights directory that is served from where it is


def weights_directory(generator: Path, version: str, setting: str) -> Path:
    """Of a version of the generator in the directory `generator`; setting: its `weights`."""
    if setting:
        return generator / setting
    own = generator / version
    return own / WEIGHTS_LINK if os.path.islink(on_disk(str(own / WEIGHTS_LINK))) else own


def write_configs(repository: Path) -> None:
    for name in MODEL:
        directory = repository / name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.pbtxt").write_text(config_pbtxt(name), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m codefuse_triton.contract MODEL_REPOSITORY")
    write_configs(Path(sys.argv[1]))
