"""The contract table against the files written from it, and requests parsed by it."""
from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codefuse_triton import contract
from codefuse_triton.prompt import Prompt
from codefuse_triton.request import parse, parse_settings, parse_text

ROOT = Path(__file__).resolve().parents[1]
IDS = {"input_ids": np.array([[5, 6]], np.int32)}


@pytest.mark.parametrize("name", list(contract.MODEL))
def test_config_files_are_written_from_the_table(name: str) -> None:
    """python -m codefuse_triton.contract model_repository"""
    assert (ROOT / "model_repository" / name / "config.pbtxt").read_text() == contract.config_pbtxt(name)


@pytest.mark.parametrize("name", list(contract.MODEL))
def test_config_files_are_what_triton_reads(name: str) -> None:
    text_format = pytest.importorskip("google.protobuf.text_format")
    model_config = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    config = text_format.Parse(contract.config_pbtxt(name), model_config.ModelConfig())
    model = contract.MODEL[name]
    assert config.name == name
    assert [t.name for t in config.input] == [t.name for t in model.inputs] and all(t.optional for t in config.input)
    assert [t.name for t in config.output] == [t.name for t in model.outputs]
    if name != contract.ENSEMBLE:
        assert {k: v.string_value for k, v in config.parameters.items()} == {s.name: s.default for s in model.settings}
        assert [(g.count, g.kind) for g in config.instance_group] == [(1, model_config.ModelInstanceGroup.KIND_CPU)]
        assert not config.HasField("dynamic_batching")


def test_table_is_consistent() -> None:
    names = [n for o in contract.OPTIONS for n in (o.name, o.alias) if n]
    assert len(names) == len(set(names))
    for model in contract.MODEL.values():
        for tensors in (model.inputs, model.outputs):
            assert len({t.name for t in tensors}) == len(tensors)
        parse_settings(model.name, {s.name: s.default for s in model.settings})
    outputs = {t.name: (t.type, t.dims) for t in contract.MODEL["generator"].outputs}
    assert outputs == {t.name: (t.type, t.dims) for t in contract.MODEL["detokenizer"].inputs}


def test_client_knows_the_same_tensors() -> None:
    protocol = pytest.importorskip("codefuse_triton_client.protocol")
    types = {"BYTES": "STRING"}
    tensors = {t.name: t for t in contract.MODEL["ensemble"].inputs}
    for option in protocol.OPTIONS.values():
        tensor = tensors[option.tensor]
        assert (tensor.type, tensor.dims == -1) == (types.get(option.type, option.type), option.many), option
    known = {option.tensor for option in protocol.OPTIONS.values()}
    assert {o.name for o in contract.OPTIONS if not known & {o.name, o.alias}} == {"stream", "pad_id", "prediction"}  # the client's own; what says nothing


def submit(**given: Any) -> dict[str, Any]:
    """The Engine.submit keywords for these request parameters."""
    return parse(IDS, given).submit


def test_submit_keywords_are_the_engines() -> None:
    import inspect

    from codefuse_triton import Engine
    keywords = inspect.signature(Engine.submit).parameters
    assert set(submit()) <= set(keywords)


def test_defaults() -> None:
    assert submit() == dict(max_tokens=128, min_tokens=0, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=None, stop=(), logit_bias={},
                            repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, bad_words=(),
                            include_stop=False, stop_at=(), stop_token_ids=(), ignore_eos=False, max_time_ms=0, include_typed=False, stream=False, logprobs=False, top_logprobs=0, cache_salt="", beam_width=1,
                            length_penalty=1.0, beam_diversity_rate=0.0, early_stopping=False, session="", deadline_ms=0)


@pytest.mark.parametrize("given, temperature", [
    (dict(), 0), (dict(top_k=1), 0), (dict(top_k=50), 1), (dict(top_p=0.9), 1), (dict(top_p=0.0), 0), (dict(min_p=0.1), 1),
    (dict(seed=3), 0), (dict(top_k=50, temperature=0), 0), (dict(temperature=0.7), 0.7)], ids=str)
def test_temperature_when_not_given(given: dict[str, Any], temperature: float) -> None:
    assert submit(**given)["temperature"] == temperature


def test_off_values() -> None:
    assert submit(top_k=-1)["top_k"] == 0
    greedy = submit(top_p=0, temperature=1)
    assert (greedy["top_k"], greedy["top_p"]) == (1, 1.0)


def test_equal_values_given_twice_are_one() -> None:
    tensors = {**IDS, "temperature": np.array([[0.7]], np.float32), "stop_words": np.array([[b"a", b""]], object),
               "min_tokens": np.array([[2]], np.int32)}
    text = json.dumps({"temperature": "0.7", "stop": "a", "min_tokens": 2.0})
    request = parse({**tensors, "sampling_parameters": np.array([[text.encode()]], object)}, {"temperature": 0.7, "min_length": "2"})
    assert request.submit["stop"] == ("a",) and request.submit["min_tokens"] == 2


def test_answers() -> None:
    assert [(r.count, r.best_of) for r in (parse(IDS, {}), parse(IDS, dict(num_return_sequences=3, temperature=1)),
                                           parse(IDS, dict(sampling_parameters='{"n": 2, "best_of": 5, "temperature": 1}')))] == [(1, 1), (3, 3), (2, 5)]
    assert parse(IDS, dict(num_return_sequences=2, best_of=2, temperature=1, stream=True)).best_of == 2


def test_beams() -> None:
    for given in (dict(), dict(temperature=1.0, top_k=1, top_p=0.0)):  # what clients send anyway
        request = parse(IDS, dict(beam_width=4, num_return_sequences=3, len_penalty=0.5, **given))
        assert request.count == request.best_of == 3 and request.submit["beam_count"] == 3 and request.submit["length_penalty"] == 0.5
        assert (request.submit["temperature"], request.submit["top_k"], request.submit["top_p"]) == (0, 0, 1)
    assert "beam_count" not in submit(length_penalty=2, beam_width=1)


@pytest.mark.parametrize("given, logprobs, top", [
    ('{"logprobs": 0}', True, 0), ('{"logprobs": 5}', True, 5), ('{"logprobs": true}', True, 0), ('{"logprobs": null}', False, 0),
    ('{"logprobs": true, "top_logprobs": 3}', True, 3), ('{"top_logprobs": 3}', True, 3)])
def test_log_probs_under_vllms_and_openais_names(given: str, logprobs: bool, top: int) -> None:
    options = submit(sampling_parameters=given)
    assert (options["logprobs"], options["top_logprobs"]) == (logprobs, top)


def test_biases() -> None:
    words = {**IDS, "embedding_bias_words": np.array([["in", "", "in"]], object), "embedding_bias_weights": np.array([[1.5, 9, 0.5]], np.float32)}
    for given in (dict(logit_bias='{"7": -2, "5": 1e3}'), dict(sampling_parameters='{"logit_bias": {"5": 1000, "7": "-2.0"}}')):
        assert submit(**given)["logit_bias"] == {5: 1000.0, 7: -2.0}
        assert parse(words, given).submit["logit_bias"] == {5: 1000.0, 7: -2.0, "in": 2.0}
    tensor = {**IDS, "logit_bias": np.array([[b'{"7": 1}']], object)}
    assert parse(tensor, {}).submit["logit_bias"] == {7: 1.0}
    for words_, weights in (([""], [0.0]), ([""], []), ([], [])):  # tensors that a client fills with nothing
        assert submit(embedding_bias_words=words_, embedding_bias_weights=weights, logit_bias="")["logit_bias"] == {}


@pytest.mark.parametrize("given, said", [
    (dict(logit_bias="[1]"), "parameter logit_bias is [1]; expected a JSON object, token id to number"),
    (dict(logit_bias="{"), "parameter logit_bias is not JSON"),
    (dict(logit_bias='{"word": 1}'), "a token of parameter logit_bias is 'word'; expected an integer"),
    (dict(logit_bias='{"-1": 1}'), "a token of parameter logit_bias is '-1'; it must be between 0 and 2147483647"),
    (dict(logit_bias='{"1": Infinity}'), "parameter logit_bias[1] is inf; expected a finite number"),
    (dict(logit_bias='{"1": 1e40}'), "parameter logit_bias[1] is 1e+40; it must be between"),
    (dict(logit_bias='{"1": 1}', sampling_parameters='{"logit_bias": {"1": 2}}'), "give one of them"),
    (dict(embedding_bias_words=["a"]), "embedding_bias_words has 1 strings and embedding_bias_weights 0 values"),
    (dict(embedding_bias_weights=[1.0]), "embedding_bias_words has 0 strings and embedding_bias_weights 1 values"),
    (dict(bad_words=["x"] * 65), "parameter bad_words has 65 strings; at most 64 are accepted"),
    (dict(repetition_penalty=0), "parameter repetition_penalty is 0; it must be between 0.01 and 100"),
    (dict(presence_penalty=101), "parameter presence_penalty is 101; it must be between -100 and 100"),
    (dict(num_return_sequences=0), "parameter num_return_sequences is 0; it must be between 1 and 64"),
    (dict(num_return_sequences=2), "num_return_sequences is 2; with temperature 0 all answers are the same, so it must be 1"),
    (dict(best_of=2), "best_of is 2; with temperature 0 all answers"),
    (dict(num_return_sequences=3, best_of=2, temperature=1), "best_of is 2; it must be at least num_return_sequences (3)"),
    (dict(best_of=2, temperature=1, stream=True), "best_of is 2; with stream it must be num_return_sequences (1)"),
    (dict(beam_width=65), "parameter beam_width is 65; it must be between 1 and 64"),
    (dict(beam_width=2, temperature=0.7), "temperature is 0.7; with beam_width 2 it must be 0 or 1"),
    (dict(beam_width=2, top_k=50), "top_k is 50; with beam_width 2 it must be -1 or 0 or 1"),
    (dict(beam_width=2, min_p=0.5), "min_p is 0.5; with beam_width 2 it must be 0"),
    (dict(beam_width=2, num_log_probs=1), "num_log_probs is 1; with beam_width 2 it must be 0"),
    (dict(beam_width=2, num_return_sequences=3), "num_return_sequences is 3; with beam_width 2 it must be at most 2"),
    (dict(beam_width=4, num_return_sequences=2, best_of=3), "best_of is 3; with beam_width 4 it must be at most 2"),
    (dict(temperature="hot"), "parameter temperature is 'hot'; expected a number"),
    (dict(temperature=True), "parameter temperature is True; expected a number"),
    (dict(max_tokens=1.5), "parameter max_tokens is 1.5; expected an integer"),
    (dict(max_tokens="1e3"), "parameter max_tokens is '1e3'; expected an integer"),
    (dict(stop_at=["line", "word"]), "parameter stop_at is 'word'; it must be one of line, block, bracket, suffix, repetition"),
    (dict(fim_mode="mps"), "parameter fim_mode is 'mps'; it must be one of psm, spm"),
    (dict(max_time_ms=-1), "parameter max_time_ms is -1; it must be between 0 and"),
    (dict(fim_template=[1]), "fim_template is a tensor"),
    (dict(stream="yes"), "parameter stream is 'yes'; expected true or false"),
    (dict(seed=2**64), "it must be between 0 and 18446744073709551615"),
    (dict(input_ids=3), "input_ids is a tensor"),
    (dict(sampling_parameters='{"logprobs": 21}'), "sampling_parameters.logprobs is 21; it must be between 0 and 20"),
    (dict(sampling_parameters='{"logprobs": 2, "top_logprobs": 3}'), "give one of them"),
    (dict(sampling_parameters='{"use_beam_search": true}'), "sampling_parameters.use_beam_search is True; accepted: null, false"),
    (dict(sampling_parameters='{"stop": [1]}'), "sampling_parameters.stop is 1; expected a string"),
    (dict(sampling_parameters="[" * 100000), "sampling_parameters is not JSON"),
], ids=str)
def test_refusals(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        submit(**given)


def test_parameters_that_triton_adds_are_ignored() -> None:
    submit(sequence_id=3, priority=1, timeout=5, triton_enable_empty_final_response=True, binary_data_output=True, **{"x-trace": "1"})


def test_echo_and_heartbeat() -> None:
    tensors = {**IDS, "prompt_text": np.array([[b"abc"]], object), "heartbeat": np.array([[True]])}
    assert parse(tensors, {}).echo == b"" and parse(tensors, {}).heartbeat
    assert parse(tensors, {}, exclude_input=False).echo == b"abc"
    assert parse(tensors, {"exclude_input_in_output": False}).echo == b"abc"
    assert parse(tensors, {"exclude_input_in_output": True}, exclude_input=False).echo == b""


def test_text_options() -> None:
    assert parse_text({}, {}) == dict(token_healing=True, suffix="", fim_mode="")
    tensors = {"suffix": np.array([["é".encode()]], object), "token_healing": np.array([[False]])}
    assert parse_text(tensors, {"fim_mode": "spm", "max_tokens": 3}) == dict(token_healing=False, suffix="é", fim_mode="spm")
    with pytest.raises(ValueError, match="token_healing is 'maybe'; expected true or false"):
        parse_text({}, {"token_healing": "maybe"})


def test_prompt_of_the_tokenizer_and_of_a_direct_client() -> None:
    """What the tokenizer has done is not done again; beside a client's own ids a suffix is the engine's to add."""
    tensors = {**IDS, "prefix_bytes": np.array([[b"ab\xc3"]], object), "prefix_ids": np.array([[4]], np.int32),
               "suffix_ids": np.array([[7]], np.int32), "fim_template": np.array([[1, -1, 2, -2, 3]], np.int32),
               "fim_end_ids": np.zeros((1, 0), np.int32), "suffix": np.array([[b"text"]], object)}
    request = parse(tensors, {"include_typed": True})
    assert request.prompt == Prompt([5, 6], b"ab\xc3", [4], [7], [1, -1, 2, -2, 3], [])
    assert "suffix" not in request.submit and request.submit["include_typed"]
    direct = parse({**IDS, "suffix": tensors["suffix"]}, {})
    assert direct.prompt == Prompt([5, 6], b"", [], [], [], []) and direct.submit["suffix"] == "text" and "fim_mode" not in direct.submit
    echoed = parse({**tensors, "prompt_text": np.array([[b"x"]], object)}, {"include_typed": True}, exclude_input=False)
    assert not echoed.submit["include_typed"]


def test_settings() -> None:
    values = parse_settings("generator", {"slots": "4", "dtype": "", "weights": "/data/w"})
    assert (values["slots"], values["dtype"], values["weights"], values["queue"]) == (4, "auto", "/data/w", 256)
    for given, said in [({"slot": "4"}, "'slot' is unknown; did you mean 'slots'?"), ({"slots": "0"}, "slots is '0'; it must be between 1"),
                        ({"slots": "many"}, "slots is 'many'; expected an integer"),
                        ({"dtype": "int3"}, "dtype is 'int3'; it must be one of auto, float32")]:
        with pytest.raises(ValueError, match=re.escape(said)):
            parse_settings("generator", given)
