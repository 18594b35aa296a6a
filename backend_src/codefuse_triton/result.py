"""Result: a whole completion, and which of several are the best."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ._native import Chunk

_Scored = TypeVar("_Scored", Chunk, "Result")


@dataclass(frozen=True)
class Result:
    """A whole completion. The end-of-text token is not part of it; tokens cut away by a stop string are neither."""

    uid: int
    text: str
    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]  # of token_ids, empty unless asked for
    top_token_ids: npt.NDArray[np.int32]  # [len(token_ids), top_logprobs] likeliest first, empty unless asked for
    top_logprobs: npt.NDArray[np.float32]  # and their log-probabilities
    cum_logprob: float
    finish_reason: str  # eos | stop | length | time | cancelled | deadline
    stop_reason: str  # the stop string, or "stop_at:" and the name of what ended the text
    num_input_tokens: int
    num_truncated_tokens: tuple[int, int]  # fill in the middle: those that the prompt and the suffix lost to fit
    num_output_tokens: int
    num_cached_tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float

    @classmethod
    def of(cls, c: Chunk) -> Result:
        """Of the one chunk of a request that is not streamed."""
        return cls(c.uid, c.text.decode("utf-8", "replace"), c.token_ids, c.logprobs, c.top_token_ids, c.top_logprobs, c.cum_logprob,
                   c.finish_reason, c.stop_reason, c.num_input_tokens, c.num_truncated_tokens, c.num_output_tokens, c.num_cached_tokens,
                   c.queue_s, c.prefill_s, c.decode_s)


def best(results: Sequence[_Scored], count: int) -> list[_Scored]:
    """The count of them with the highest mean log-probability of a token, best first; without tokens is last."""
    return sorted(results, key=lambda r: r.cum_logprob / r.num_output_tokens if r.num_output_tokens else -math.inf, reverse=True)[:count]
