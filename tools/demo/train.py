"""Trains the demo model from scratch on the Python sources installed on this machine.

    python3 tools/demo/train.py --out DIR --minutes 6

Writes a Hugging Face checkpoint directory: fp16 weights, tokenizer, configs and a card (README.md).
One GPU; the text preparation uses every core. --smoke runs the whole path in about a minute on a CPU.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

import torch

import card
import corpus
import evaluate
import heldout
import neox
import optimize
import packing
import spm

FINISH_SECONDS = 45   # evaluation, samples and files, kept free of --total-minutes


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write the checkpoint to")
    parser.add_argument("--minutes", type=float, default=6.0, help="training time, without preparation (default 6)")
    parser.add_argument("--total-minutes", type=float, default=9.5,
                        help="shortens the training so that the whole run ends in this time (default 9.5)")
    parser.add_argument("--shards", type=int, default=1, help="number of safetensors files (default 1)")
    parser.add_argument("--batch-rows", type=int, default=128, help="sequences of 2048 tokens in a step (default 128)")
    parser.add_argument("--passes", type=int, default=6, help="passes over the text with fill-in-the-middle drawn anew (default 6)")
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    parser.add_argument("--smoke", action="store_true", help="tiny model, little text, a few steps: checks the script")
    return parser.parse_args()


def main() -> None:
    begin = time.monotonic()
    options = arguments()
    shape, sample_bytes, device = neox.Shape(), 40_000_000, torch.device("cuda")
    if options.smoke:
        shape = neox.Shape(vocab=1024, hidden=128, layers=2, heads=2, intermediate=512, max_positions=1024)
        sample_bytes, device = 2_000_000, torch.device("cpu")
        options.minutes, options.passes, options.batch_rows = min(options.minutes, 0.4), 2, 4
        options.no_compile = True
    workers = len(os.sched_getaffinity(0))

    def stage(text: str) -> None:
        print(f"[{time.monotonic() - begin:5.1f} s] {text}", flush=True)

    stage("reading the sources")
    sample = heldout.load()
    text = corpus.collect(sample, workers)
    if options.smoke:
        del text.train[600:], text.held_out[20:]
    texts = [document.text for document in text.train]
    stage(f"{len(texts)} files, {sum(map(len, texts)) / 1e6:.1f} M characters, {len(text.held_out)} held out; dropped {text.dropped}")
    model_proto = spm.train(texts, shape.vocab, sample_bytes)
    stage("tokenizer trained")
    passes, broken = packing.encode_passes(texts, model_proto, options.passes, shape.max_positions + 1, workers)
    if broken:
        raise RuntimeError(f"{broken} documents do not survive encode and decode")
    corpus_tokens = passes[0].size
    stage(f"{options.passes} passes of {corpus_tokens / 1e6:.1f} M tokens")

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = neox.NeoX(shape).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    left = options.total_minutes * 60 - (time.monotonic() - begin) - FINISH_SECONDS - (0 if options.no_compile else 60)
    seconds = min(options.minutes * 60, left)
    stage(f"training {parameters / 1e6:.2f} M parameters for {seconds:.0f} s")
    history = optimize.train(model, passes, options.batch_rows, seconds, compile_loss=not options.no_compile)
    stage("saving")
    neox.save(model, model_proto, options.out, options.shards)
    del model, passes

    torch.set_float32_matmul_precision("highest")
    served, tokenizer = neox.load(options.out)
    served.to(device).eval()
    sample_score = evaluate.score(served, tokenizer, sample)
    local_score = evaluate.score(served, tokenizer, text.held_out)
    samples = evaluate.samples(served, tokenizer)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU"
    command = shlex.join(["python3", "tools/demo/train.py",
                          *("DIR" if a == str(options.out) else a for a in sys.argv[1:])])
    (options.out / "README.md").write_text(card.render(
        shape=shape, parameters=parameters, corpus=text, corpus_tokens=corpus_tokens, batch_rows=options.batch_rows,
        history=history, device=name, command=command, sample_score=sample_score, local_score=local_score,
        samples=samples), encoding="utf-8")
    print(samples)
    stage(f"held-out sample: loss {sample_score.loss:.4f}, perplexity {sample_score.perplexity:.3f}, "
          f"{sample_score.bits_per_byte:.4f} bits per byte; local held-out: perplexity {local_score.perplexity:.3f}")
    try:
        difference = evaluate.difference_to_transformers(options.out, served, tokenizer.encode(sample[0].text)[:200])
        stage(f"largest logit difference to transformers in float32: {difference:.2e}")
    except ImportError as error:
        stage(f"not compared with transformers: {error}")
    stage("done")


if __name__ == "__main__":
    main()
