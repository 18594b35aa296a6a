"""The model card: README.md of the checkpoint, written from what the run measured."""

from __future__ import annotations

from corpus import Corpus
from evaluate import WINDOW, Score
from neox import Shape
from optimize import BETAS, PEAK_RATE, WEIGHT_DECAY, History
from packing import FIM_SHARE, SPM_SHARE


def _score_line(name: str, score: Score) -> str:
    return (f"| {name} | {score.documents} | {score.bytes / 1e3:.0f} | {score.tokens} | {score.loss:.4f} | "
            f"{score.perplexity:.3f} | {score.bits_per_byte:.4f} |")


def render(*, shape: Shape, parameters: int, corpus: Corpus, corpus_tokens: int, batch_rows: int, history: History,
           device: str, command: str, sample_score: Score, local_score: Score, samples: str) -> str:
    train_bytes = sum(corpus.sizes.values())
    sources = "\n".join(f"| {name} | {corpus.licences[name]} | {size / 1e6:.2f} |"
                        for name, size in sorted(corpus.sizes.items(), key=lambda item: -item[1]))
    every = max(1, len(history.curve) // 12)
    points = history.curve[every - 1::every]
    if points[-1] != history.curve[-1]:
        points.append(history.curve[-1])
    curve = "\n".join(f"| {seconds:.0f} | {tokens / 1e6:.0f} | {loss:.3f} |" for seconds, tokens, loss in points)
    dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(corpus.dropped.items()))
    return f"""# codefuse-triton demo model

A small Python completion model, trained from scratch, that makes the server's main job and its quality tests real.
It writes plausible Python; it does not know what it writes. Not for production use.

- GPTNeoXForCausalLM with CodeFuse-13B's flags: parallel residual, rotary_pct 1.0 (base {shape.rope_theta:.0f}), erf GELU, biases, untied head.
- {parameters / 1e6:.2f} M parameters, fp16: hidden {shape.hidden}, {shape.layers} layers, {shape.heads} heads, intermediate {shape.intermediate},
  vocabulary {shape.vocab}, {shape.max_positions} positions.
- Tokenizer (`tokenizer.model`): sentencepiece BPE with byte fallback, no normalization, no dummy prefix; lossless for any text
  (a literal U+2581 must be encoded through its three byte pieces: sentencepiece itself would read it back as a space).
  Control symbols: `<|endoftext|>` (eos, document separator), `<fim_prefix>`, `<fim_middle>`, `<fim_suffix>`.
- Prompts: plain code, no bos. Fill in the middle: `<fim_prefix>` prefix `<fim_suffix>` suffix `<fim_middle>`, the answer ends with `<|endoftext|>`.
- Licence of the weights: MIT, as the project. Sources of the training text and their licences: below.

## Held-out quality of these files (fp16 weights, float32 arithmetic)

| text | documents | kB | tokens | loss (nats/token) | perplexity | bits per byte |
|---|---|---|---|---|---|---|
{_score_line("`tools/demo/heldout.jsonl`", sample_score)}
{_score_line("all held-out files of the training machine", local_score)}

Protocol: x = eos + text + eos; windows of {WINDOW} input tokens, each run on its own, predict the next token of x.

## Training

`{command}` on {device}: {history.seconds:.0f} s, {history.steps} steps of {batch_rows} x {shape.max_positions} tokens,
{history.tokens / 1e6:.0f} M tokens ({history.tokens / corpus_tokens:.1f} passes), {history.tokens / history.seconds / 1e6:.2f} M tokens/s.
AdamW {BETAS}, peak rate {PEAK_RATE:g}, cosine to zero at the end of the time, weight decay {WEIGHT_DECAY:g}, bfloat16 autocast.
{FIM_SHARE:.0%} of the documents of each pass are turned into fill-in-the-middle samples split at characters ({1 - SPM_SHARE:.0%} prefix-suffix-middle,
{SPM_SHARE:.0%} suffix-prefix-middle); details in `tools/demo/packing.py`.

| seconds | M tokens | training loss |
|---|---|---|
{curve}

To retrain, run the same command on a machine with one GPU and copy the directory here. It needs torch, numpy, sentencepiece
and safetensors, and no network; the text is whatever permissively licensed Python is installed there.

## Data

{len(corpus.train)} files, {train_bytes / 1e6:.1f} MB, about {corpus_tokens / 1e6:.0f} M tokens a pass: the Python standard library and the installed
packages whose own metadata declares only permissive licences. Left out: test directories, vendored copies and,
counted by file: {dropped}. {len(corpus.held_out)} files are held out by a hash of their path.

| source | declared licence | MB |
|---|---|---|
{sources}

## Samples

The generated part stands between \u27ea and \u27eb.

{samples}"""
