"""codefuse-client: a completion on the terminal, as it is generated."""
from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from typing import Any

from .protocol import OPTIONS, CompletionError, Option, Result
from .sync import Client

DEFAULT_MAX_TOKENS = 128
NO_FLAG = {"exclude_input": "--echo"}  # options that another flag sets


def _text(argument: str) -> str:
    """UTF-8 in whatever locale; bytes that are not the locale's have come as lone surrogates."""
    if not any("\ud800" <= c <= "\udfff" for c in argument):
        return argument
    raw = os.fsencode(argument)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}") from None


def _seconds(argument: str) -> float:
    value = float(argument)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{argument}; expected a number above 0 and below 1e9")
    return value


_TYPES = {"INT32": int, "UINT64": int, "FP32": float, "BYTES": _text}


def _add(group: Any, keyword: str, option: Option) -> None:
    flag = "--" + keyword.replace("_", "-")
    if option.type == "BOOL":
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=option.help)
        return
    kind = {"BYTES": "TEXT", "FP32": "X"}.get(option.type, "N")
    group.add_argument(flag, type=_TYPES[option.type], action="append" if option.many else "store", metavar=kind,
                       help=option.help + (f" (default: {DEFAULT_MAX_TOKENS})" if keyword == "max_tokens" else "; may be repeated" if option.many else ""))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="codefuse-client", usage="%(prog)s [option ...] [prompt]", description=__doc__)
    p.add_argument("prompt", nargs="?", type=_text, help="the text to continue; without it, or as -, standard input")
    p.add_argument("--url", type=_text, default="127.0.0.1:8001", help="gRPC address (default: %(default)s)")
    p.add_argument("--model", type=_text, default="ensemble")
    p.add_argument("--echo", action="store_true", help="print the prompt too")
    p.add_argument("--no-stream", action="store_true", help="print the text when it is complete; so it is with several answers, too")
    p.add_argument("--json", action="store_true", help="print each answer as a line of JSON, with all that is known of it")
    p.add_argument("--timeout", type=_seconds, metavar="SECONDS")
    p.add_argument("--stats", action="store_true", help="token counts and times, on standard error")
    group = p.add_argument_group("options of the request", "what is not given is left to the server; logprobs are printed on standard error")
    for keyword, option in OPTIONS.items():
        if keyword not in NO_FLAG:
            _add(group, keyword, option)
    p.set_defaults(max_tokens=DEFAULT_MAX_TOKENS)
    return p


def stats(result: Result) -> str:
    t = result.timings
    rate = f", {(result.num_output_tokens - 1) / t.decode_s:.1f} tokens/s" if t.decode_s and result.num_output_tokens > 1 else ""
    cached = f" ({result.num_cached_tokens} reused)" if result.num_cached_tokens else ""
    return (f"{result.num_input_tokens} tokens in{cached}, {result.num_output_tokens} out{rate}; first text after "
            f"{t.first_chunk_s * 1e3:.1f} ms, all after {t.total_s * 1e3:.1f} ms (queue {t.queue_s * 1e3:.1f}, prompt "
            f"{t.prefill_s * 1e3:.1f}, decode {t.decode_s * 1e3:.1f}); ended by {result.finish_reason}"
            + (f" {result.stop_reason!r}" if result.stop_reason else ""))


def log_probs(result: Result) -> str:
    """A line for each token: id, log-probability, and the likeliest ones in its place."""
    tops = result.top or ((),) * len(result.token_ids)
    return "".join(f"{id:8d} {p:9.4f}" + "".join(f"  {t.text!r} {t.log_prob:.4f}" for t in top) + "\n"
                   for id, p, top in zip(result.token_ids, result.log_probs, tops))


def _run(args: argparse.Namespace, client: Client, prompt: str | bytes, options: dict[str, Any]) -> list[Result]:
    write = sys.stdout.write
    if args.json or args.no_stream or (args.n or 1) > 1 or (args.best_of or 1) > 1 or (args.beam_width or 1) > 1:
        results = client.complete_all(prompt, timeout_s=args.timeout, **options)
        for i, result in enumerate(results):
            if args.json:
                write(json.dumps(asdict(result)) + "\n")
            else:
                write(f"--- answer {i}\n" * (len(results) > 1) + result.text + "\n")
        return results
    with client.stream(prompt, timeout_s=args.timeout, **options) as stream:
        for chunk in stream:
            if chunk.sequence_index == 0:
                write(chunk.text)
                sys.stdout.flush()
        write("\n" + "".join(f"--- answer {i}\n{r.text}\n" for i, r in enumerate(stream.results) if i))  # those that sampling_parameters asks for
        return stream.results


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    sys.stdout.reconfigure(errors="replace")  # whatever the terminal cannot show
    if args.prompt in (None, "-") and sys.stdin.isatty():
        print("reading the prompt from standard input; end it with Ctrl-D", file=sys.stderr)
    try:
        prompt: str | bytes = sys.stdin.buffer.read() if args.prompt in (None, "-") else args.prompt
        options = {keyword: getattr(args, keyword) for keyword in OPTIONS if keyword not in NO_FLAG}
        if args.echo:
            options["exclude_input"] = False
        with Client(args.url, model=args.model) as client:
            results = _run(args, client, prompt, options)
        sys.stdout.flush()
        for result in results:
            if result.log_probs and not args.json:
                sys.stderr.write(log_probs(result))
            if args.stats:
                print(stats(result), file=sys.stderr)
        return 0
    except CompletionError as error:
        sys.stdout.flush()
        print(f"codefuse-client: {error.code}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
