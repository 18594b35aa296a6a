"""Engine: completions from Python, without Triton. Thread-safe; nothing here holds the GIL while it waits."""
from __future__ import annotations

import atexit
import math
import os
import secrets
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _native
from ._native import Chunk, DeviceError, Outbox
from .files import is_file, on_disk, read_json
from .prompt import Prompt, assemble, fim_template, make_prompt
from .result import Result, best
from .vocab import Vocab

_FLOAT32_MAX = float(np.finfo(np.float32).max)
AnyPrompt = str | bytes | Sequence[int] | npt.NDArray[np.integer[Any]] | Prompt
Word = str | bytes | Sequence[int]
_BEFORE_BYTES = 1 << 16  # of the text in front of the cursor that stop_at looks at


class Stream:
    """Chunks of one request. Closing it, or dropping it, cancels the request."""

    def __init__(self, engine: Engine, uid: int, outbox: Outbox) -> None:
        self.uid = uid
        self._engine = engine
        self._outbox = outbox
        self._ended = False

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        if self._ended:
            raise StopIteration
        try:
            chunks = self._outbox.poll()
        except BaseException:  # Ctrl-C
            self.close()
            raise
        if not chunks:  # closed by another thread
            self._ended = True
            raise StopIteration
        self._ended = chunks[0].finish_reason != ""
        if chunks[0].finish_reason == "error":
            raise DeviceError(chunks[0].error)
        return chunks[0]

    def close(self) -> None:
        if not self._ended:
            self._ended = True
            self._engine.cancel(self.uid)
            self._outbox.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Engine:
    """Loads a weights directory (written by tools/convert.py) and completes prompts.

    device: "cpu", "cuda", "cuda:N" or "auto" (CUDA if there is one). dtype: "float32", "float16", "bfloat16" or "auto"
    (the CPU computes in float32, CUDA in the checkpoint's type). slots: sequences that run at once. prefill_tokens: prompt
    tokens of one step. max_len: prompt and new tokens of one request, 0 for the model's limit. kv_memory_mb: of each GPU,
    0 for a default. queue: requests that may wait beyond the slots. threads: of the CPU, 0 for all cores. prefix_cache: "on": requests
    with the same beginning compute it once, where that changes no bit of a result: prompts after prompts and, on the CPU, after
    generated text; "generated": after generated text on a GPU too, which rounds it differently; "off".

    ValueError for an option, LoadError for a file, DeviceError for a device.
    """

    def __init__(self, weights_dir: str | os.PathLike[str], *, device: str = "auto", dtype: str = "auto", tensor_parallel: int = 1,
                 slots: int = 16, prefill_tokens: int = 512, max_len: int = 0, kv_memory_mb: int = 0, queue: int = 256,
                 threads: int = 0, prefix_cache: str = "on") -> None:
        directory = os.fspath(weights_dir)
        if not os.path.isdir(on_disk(directory)):
            raise _native.LoadError(f"{directory}: no such directory; expected a weights directory written by tools/convert.py")
        has_tokenizer = any(is_file(os.path.join(directory, name)) for name in ("tokenizer.json", "tokenizer.model"))
        vocab = Vocab.load(directory) if has_tokenizer else Vocab.none(directory)
        config = read_json(os.path.join(directory, "config.json"))
        longest = max((i for i, text in enumerate(vocab.token_bytes) if text), default=-1)
        if longest >= config.get("vocab", longest + 1):
            raise _native.LoadError(f"{directory}: the tokenizer has token {longest}, but the model's vocab is {config['vocab']}; expected the model's own tokenizer")
        if kv_memory_mb < 0:
            raise ValueError(f"kv_memory_mb is {kv_memory_mb}; expected 0 (a default) or more")
        native = _native.Engine(directory, vocab.token_bytes, never_text=sorted(vocab.never_text), device=device, dtype=dtype,
                                tensor_parallel=tensor_parallel, slots=slots, prefill_tokens=prefill_tokens, max_len=max_len, kv_bytes=kv_memory_mb << 20, queue=queue, threads=threads, prefix_cache=prefix_cache)
        self._set(native, vocab, config)

    @classmethod
    def _of(cls, native: _native.Engine, vocab: Vocab, config: dict[str, Any] | None = None) -> Engine:
        """An Engine over a native one that was made elsewhere."""
        self = cls.__new__(cls)
        self._set(native, vocab, config or {})
        return self

    def _set(self, native: _native.Engine, vocab: Vocab, config: dict[str, Any]) -> None:
        self._native = native
        self.vocab = vocab
        self.config = config
        self.device: str = native.device
        self.dtype: str = native.dtype
        self.max_len: int = native.max_len
        self.weight_bytes: int = native.weight_bytes
        self.load_stats: dict[str, float] = native.load_stats  # what loading took: device_s, weights_s, verified_s, total_s; weight_bytes, verified_bytes
        self._eos_ids: list[int] = list(native.eos_ids)
        stats = native.stats()
        self._room = min(native.max_len, stats["pages"] * stats["page_tokens"])  # tokens of one request
        _open.add(self)

    def _prompt(self, prompt: AnyPrompt, token_healing: bool, prefix_bytes: bytes, suffix: str | bytes | Sequence[int], fim_mode: str) -> Prompt:
        if isinstance(prompt, (str, bytes)):
            if prefix_bytes:
                raise ValueError("prefix_bytes is given beside a prompt that is text; expected token ids")
            return make_prompt(self.vocab, prompt, token_healing=token_healing, suffix=suffix, fim_mode=fim_mode)
        if isinstance(prompt, Prompt):
            prompt, prefix_bytes = prompt.ids, prompt.typed
        ids = self._ids(prompt)
        if not len(suffix):
            return Prompt(ids, prefix_bytes)
        template, ends = fim_template(self.vocab, fim_mode)
        behind = self.vocab.encode_inner(suffix) if isinstance(suffix, (str, bytes)) else self._ids(suffix)
        return Prompt(ids, prefix_bytes, (), behind, template, ends)

    def _ids(self, prompt: Sequence[int] | npt.NDArray[np.integer[Any]]) -> list[int]:
        ids = np.asarray(prompt)
        if ids.size == 0:
            return []
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"prompt has shape {ids.shape} and type {ids.dtype}; expected text or a flat sequence of token ids")
        if ids.max() > 2**31 - 1 or ids.min() < 0:
            raise ValueError(f"prompt has token {int(ids.max()) if ids.min() >= 0 else int(ids.min())}; expected 0..{self._native.vocab - 1}")
        return ids.tolist()  # type: ignore[no-any-return]

    def submit(self, prompt: AnyPrompt, *, outbox: Outbox, max_tokens: int = 128, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
               min_p: float = 0.0, seed: int | None = None, logit_bias: Mapping[int | str, float] | None = None,
               repetition_penalty: float = 1.0, presence_penalty: float = 0.0, frequency_penalty: float = 0.0,
               bad_words: Sequence[Word] | Word = (), stop: Sequence[Word] | Word = (), include_stop: bool = False,
               stop_at: Sequence[str] | str = (), eos_ids: Sequence[int] | None = None, ignore_eos: bool = False, stop_token_ids: Sequence[int] = (), min_tokens: int = 0,
               max_time_ms: int = 0, token_healing: bool = True, include_typed: bool = False, prefix_bytes: bytes = b"",
               suffix: str | bytes | Sequence[int] = "", fim_mode: str = "", stream: bool = True, logprobs: bool = False, top_logprobs: int = 0,
               cache_salt: str | bytes = b"", beam_width: int = 1, beam_count: int = 1,
               length_penalty: float = 1.0, beam_diversity_rate: float = 0.0, early_stopping: bool = False,
               session: str | bytes = b"", beside: int = 0, deadline_ms: int = 0) -> int:
        """Starts a completion whose chunks go to `outbox`; returns its uid, a positive number never used again.

        prompt: text, UTF-8 bytes or token ids. A text may end anywhere: the completion continues its last byte, whatever its tokens
        (token_healing=False: it continues its last token). include_typed: the output begins with the typed bytes that it had to
        spell again. prefix_bytes: such bytes behind token ids. suffix: the text behind the cursor; the model fills in the middle.
        fim_mode: "psm" or "spm", the order of the two; "": psm. What does not fit is cut off the beginning of the prompt and the
        end of the suffix. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off. seed None draws
        one. logit_bias: what is added to the logit of a token, by id, or by text for every token of its encoding; -inf bans it.
        repetition_penalty divides the logits of tokens of prompt and output where they are positive and multiplies them where
        they are negative (as transformers does); presence_penalty is subtracted from the logits of tokens of the output,
        frequency_penalty as often as they occur in it (as OpenAI defines them); all before temperature, logit_bias after
        repetition_penalty. bad_words: no token is chosen that would complete one of these in the text, wherever tokens begin and
        end, also together with the end of the prompt; one that names a special token bans that token. stop: the output ends
        before the first of these to end in it (after it with include_stop); one that names a special token makes it an end token. Words
        may be given as the ids of their tokens. stop_at: further ends, any of "line", "block",
        "bracket", "suffix", "repetition". eos_ids: end tokens in place of the model's; ignore_eos: go on after those, and after the ones that end
        a middle; stop_token_ids: end tokens besides, which ignore_eos leaves. min_tokens: no end token is sampled before, stop strings do not end the output.
        max_time_ms: the output ends so long after submit, with finish_reason "time"; 0: no limit.
        stream=False delivers one chunk with everything. logprobs: of each token under the model itself: before temperature, biases,
        penalties and bans. top_logprobs: how many of the most likely tokens to report with each token, at most 20.
        cache_salt: only requests of the same one reuse each other's computed prompts. beam_width > 1: beam search as transformers does
        it, with length_penalty and early_stopping; beam_diversity_rate times a token's rank among those of its beam is added to its score
        when beams are chosen. The beam_count best texts come at the end, best first, each as one chunk under uids that follow the
        returned one; logprobs then include what biases and penalties add; not with temperature or top_logprobs, and without token healing.
        session: not empty: the request before it of the same session (and cache_salt) ends as cancelled, within one step and wherever it is,
        and what it has computed is reused; beside: the uid of a request that this one came together with and does not cancel.
        deadline_ms: the request ends (finish_reason "deadline") when its first token has not come so long after submit; 0: never.

        ValueError names field, value and limit; QueueFull; DeviceError once the device has failed.
        """
        if seed is not None and not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}; expected 0..{2**64 - 1}")
        for name, value in (("max_tokens", max_tokens), ("min_tokens", min_tokens), ("top_k", top_k), ("top_logprobs", top_logprobs), ("beam_width", beam_width),
                            ("beam_count", beam_count), ("max_time_ms", max_time_ms), ("deadline_ms", deadline_ms)):
            if abs(value) >= 2**31:
                raise ValueError(f"{name} is {value}; expected less than {2**31}")
        bias = self._bias(logit_bias or {})
        words, bans = _words(self.vocab, "bad_words", bad_words)
        stops, stop_ids = _words(self.vocab, "stop", stop)
        places = (stop_at,) if isinstance(stop_at, str) else tuple(stop_at)
        for i, token in enumerate(stop_token_ids):
            if not 0 <= token < self._native.vocab:
                raise ValueError(f"stop_token_ids[{i}] is {token}; expected 0..{self._native.vocab - 1}")
        p = prompt if isinstance(prompt, Prompt) and not len(suffix) else self._prompt(prompt, token_healing, bytes(prefix_bytes), suffix, fim_mode)
        if beam_width > 1 and p.typed_ids:
            p = replace(p, ids=[*p.ids, *p.typed_ids], typed=b"", typed_ids=())
        ids, lost_prefix, lost_suffix = assemble(p, self._room - max_tokens - len(p.template) + 2 - max(len(p.typed_ids), len(p.typed)))
        eos = [*stop_ids, *stop_token_ids] + ([] if ignore_eos else [*(self._eos_ids if eos_ids is None else eos_ids), *p.end_ids])
        before, after = (self.vocab.decode(p.ids[-_BEFORE_BYTES:]) + p.typed, self.vocab.decode(p.suffix)) if places else (b"", b"")
        return self._native.submit(ids, outbox, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                                   min_p=min_p, seed=seed, logit_bias=bias + [(id, -math.inf) for id in bans], repetition_penalty=repetition_penalty,
                                   presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, bad_words=words,
                                   stop=stops, include_stop=include_stop, eos_ids=eos, min_tokens=min_tokens,
                                   stream=stream, logprobs=logprobs, top_logprobs=top_logprobs, cache_salt=_key_bytes("cache_salt", cache_salt),
                                   beam_width=beam_width, beam_count=beam_count, length_penalty=length_penalty, beam_diversity_rate=beam_diversity_rate,
                                   early_stopping=early_stopping, stop_at=places, max_time_ms=max_time_ms, prefix_bytes=p.typed, prefix_ids=p.typed_ids,
                                   include_typed=include_typed, before=before[-_BEFORE_BYTES:], after=after,
                                   truncated_tokens=(lost_prefix, lost_suffix), session=_key_bytes("session", session), beside=beside,
                                   deadline_ms=deadline_ms)

    def _bias(self, given: Mapping[int | str, float]) -> list[tuple[int, float]]:
        bias: list[tuple[int, float]] = []
        for key, value in given.items():
            if abs(value) > _FLOAT32_MAX and value != -math.inf:
                raise ValueError(f"logit_bias of {key!r} is {value}; expected a float32 number, or -inf to ban it")
            ids = self.vocab.encode(key) if isinstance(key, str) else [key]
            if any(abs(id) >= 2**31 for id in ids):
                raise ValueError(f"logit_bias has token {key}; expected 0..{self._native.vocab - 1}")
            bias += [(id, value) for id in ids]
        return bias

    def submit_many(self, prompt: AnyPrompt, count: int, *, outbox: Outbox, seed: int | None = None, **options: Any) -> list[int]:
        """Starts `count` completions of one prompt; options as for submit. The i-th has the seed `seed` + i, modulo 2**64. All of
        them or none: when one is refused, the outbox may still get cancelled chunks of uids that were never returned."""
        first = secrets.randbits(64) if seed is None else seed
        uids: list[int] = []
        try:
            for i in range(count):
                uids.append(self.submit(prompt, outbox=outbox, seed=(first + i) % 2**64 if i else first, beside=uids[0] if i else 0, **options))
        except BaseException:
            for uid in uids:
                self.cancel(uid)
            raise
        return uids

    def stream(self, prompt: AnyPrompt, **options: Any) -> Stream:
        """Submits and iterates over the chunks; options as for submit. Raises DeviceError if the device fails."""
        outbox = Outbox()
        return Stream(self, self.submit(prompt, outbox=outbox, stream=True, **options), outbox)

    def generate(self, prompt: AnyPrompt, **options: Any) -> Result:
        """Submits and waits for the whole completion; options as for submit."""
        outbox = Outbox()
        with Stream(self, self.submit(prompt, outbox=outbox, stream=False, **options), outbox) as chunks:
            return Result.of(next(chunks))

    def generate_many(self, prompt: AnyPrompt, n: int, *, best_of: int | None = None, **options: Any) -> list[Result]:
        """n completions as of submit_many, in order; with best_of > n the n of so many that have the highest mean log-probability
        of a token, best first. With beam_width the n best of its beams."""
        count = n if best_of is None else best_of
        if n < 1 or count < n:
            raise ValueError(f"n is {n} and best_of {count}; expected 1 or more, and best_of not less than n")
        outbox = Outbox()
        if options.get("beam_width", 1) > 1:
            if count > n:
                raise ValueError(f"best_of is {best_of}; with beam_width expected n, {n}")
            first = self.submit(prompt, outbox=outbox, stream=False, beam_count=n, **options)
            uids = list(range(first, first + n))
        else:
            uids = self.submit_many(prompt, count, outbox=outbox, stream=False, **options)
        results: dict[int, Result] = {}
        try:
            while len(results) < count:
                for chunk in outbox.poll():
                    if chunk.finish_reason == "error":
                        raise DeviceError(chunk.error)
                    results[chunk.uid] = Result.of(chunk)
        finally:
            for uid in uids:
                if uid not in results:
                    self.cancel(uid)
        every = [results[uid] for uid in uids]
        return every if best_of is None or count == n else best(every, n)

    def cancel(self, uid: int) -> bool:
        """Ends a request within one step, wherever it is; False when it is unknown or has ended."""
        return self._native.cancel(uid)

    def stats(self) -> dict[str, Any]:
        """Now: running and waiting requests, free_pages that no request holds (of pages, page_tokens each) and cached_pages, those
        among them that the prefix cache has filled, slots, queue, step_s (moving average).
        Since the start: steps, prefill_tokens, decode_tokens, cached_tokens (of prompts, not computed again), wasted_rows (results of
        requests that had ended), preemptions, evictions (pages that the prefix cache gave up), submitted, refused, finished (by finish reason). error: what the device failed with, or ""."""
        return self._native.stats()

    def close(self, drain_s: float = 0.0) -> None:
        """Refuses new requests, waits up to drain_s seconds for those at hand, cancels the rest. Memory goes with the object."""
        self._native.close(drain_s)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _words(vocab: Vocab, name: str, words: Sequence[Word] | Word) -> tuple[list[bytes], list[int]]:
    """(The bytes of the words, the special tokens that they name.)"""
    found: list[bytes] = []
    special: list[int] = []
    for i, word in enumerate((words,) if isinstance(words, (str, bytes)) else words):
        if isinstance(word, str) and any("\ud800" <= c <= "\udfff" for c in word):
            raise ValueError(f"{name}[{i}] has a lone surrogate")
        if isinstance(word, (str, bytes)):
            found.append(word.encode() if isinstance(word, str) else word)
            id = vocab.special_id(found[-1].decode("utf-8", "replace"))
            special += [] if id is None else [id]
            continue
        if not isinstance(word, (Sequence, np.ndarray)):
            raise ValueError(f"{name}[{i}] is {word!r}; expected text or the token ids of one")
        texts = [vocab.decode([int(id)]) for id in word]
        if len(texts) == 1 and not texts[0]:
            special.append(int(word[0]))
        elif texts and all(texts):
            found.append(b"".join(texts))
        else:
            raise ValueError(f"{name}[{i}] is {list(word)}; expected one token, or tokens that are text")
    return found, special


def _key_bytes(name: str, key: str | bytes) -> bytes:
    if isinstance(key, str) and any("\ud800" <= c <= "\udfff" for c in key):
        raise ValueError(f"{name} has a lone surrogate")
    return key.encode() if isinstance(key, str) else bytes(key)


_open: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for engine in list(_open):
        engine.close()
