"""transformers' generate() as a peer in bench_engine.py: greedy, dynamic KV cache, the same token counts and device."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np


class Peer:
    """source: a Hugging Face checkpoint directory, or the name of a preset, which gets random weights."""

    def __init__(self, source: Path | str, device: str, dtype: str, threads: int):
        import torch
        import transformers
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._torch, self._device = torch, device
        if device == "cpu" and threads:
            torch.set_num_threads(threads)
        kind = getattr(torch, dtype)
        if isinstance(source, Path):
            self._model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=kind).to(device).eval()
        else:
            from hf_models import PRESETS
            config = transformers.GPTNeoXConfig(**PRESETS[source], dtype=dtype)
            torch.set_default_dtype(kind)
            with torch.device(device):
                self._model = transformers.GPTNeoXForCausalLM(config).eval()
            torch.set_default_dtype(torch.float32)
        at = f"{torch.get_num_threads()} threads" if device == "cpu" else device
        self.description = f"beside transformers {transformers.__version__} generate(), torch {torch.__version__}, {at}, {dtype}, in turn with the engine"

    def run(self, prompt: np.ndarray, tokens: int) -> tuple[float, float, float]:
        """Seconds to the first token, seconds to the last, tokens per second after the first."""
        first = self._timed(prompt, 1)
        last = self._timed(prompt, tokens)
        return first, last, (tokens - 1) / (last - first) if last > first else float("nan")

    def _timed(self, prompt: np.ndarray, tokens: int) -> float:
        torch = self._torch
        ids = torch.tensor(prompt[None].astype(np.int64), device=self._device)
        start = time.perf_counter()
        with torch.inference_mode():
            out = self._model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens,
                                       pad_token_id=0)
        if self._device != "cpu":
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        if out.shape[1] != len(prompt) + tokens:
            raise RuntimeError(f"transformers gave {out.shape[1] - len(prompt)} of {tokens} tokens")
        return elapsed
