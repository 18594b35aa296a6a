"""codefuse-client: a completion on the terminal, as it is generated."""
from __future__ import annotations

import argparse
import os
import sys

from .protocol import CompletionError, Result
from .sync import Client


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="codefuse-client", description=__doc__)
    p.add_argument("prompt", nargs="?", help="the text to continue; without it, or as -, standard input")
    p.add_argument("--url", default="127.0.0.1:8001", help="gRPC address (default: %(default)s)")
    p.add_argument("--model", default="ensemble")
    p.add_argument("--max-tokens", type=int, default=128)
    p.add_argument("--temperature", type=float, help="0: greedy, the default")
    p.add_argument("--top-k", type=int)
    p.add_argument("--top-p", type=float)
    p.add_argument("--min-p", type=float)
    p.add_argument("--seed", type=int)
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; may be repeated")
    p.add_argument("--stop-at", action="append", default=[], metavar="WHERE", help="line, block, bracket, suffix or repetition; may be repeated")
    p.add_argument("--suffix", metavar="TEXT", help="the text behind the cursor: fill in between")
    p.add_argument("--fim-mode", choices=("psm", "spm"))
    p.add_argument("--no-token-healing", action="store_false", dest="token_healing", default=None,
                   help="continue the last token of the prompt, not its last byte")
    p.add_argument("--max-time-ms", type=int)
    p.add_argument("--session", help="cancel the request before this one of the same session")
    p.add_argument("--deadline-ms", type=int, help="give up when the first token has not come by then")
    p.add_argument("--cache-salt", help="reuse computed prompts only of requests with the same one")
    p.add_argument("--ignore-eos", action="store_true", default=None)
    p.add_argument("--echo", action="store_true", help="print the prompt too")
    p.add_argument("--no-stream", action="store_true", help="print the text when it is complete")
    p.add_argument("--timeout", type=float, metavar="SECONDS")
    p.add_argument("--stats", action="store_true", help="token counts and times, on standard error")
    return p


def stats(result: Result) -> str:
    t = result.timings
    rate = f", {(result.num_output_tokens - 1) / t.decode_s:.1f} tokens/s" if t.decode_s and result.num_output_tokens > 1 else ""
    cached = f" ({result.num_cached_tokens} reused)" if result.num_cached_tokens else ""
    return (f"{result.num_input_tokens} tokens in{cached}, {result.num_output_tokens} out{rate}; first text after "
            f"{t.first_chunk_s * 1e3:.1f} ms, all after {t.total_s * 1e3:.1f} ms (queue {t.queue_s * 1e3:.1f}, prompt "
            f"{t.prefill_s * 1e3:.1f}, decode {t.decode_s * 1e3:.1f}); ended by {result.finish_reason}"
            + (f" {result.stop_reason!r}" if result.stop_reason else ""))


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.prompt in (None, "-") and sys.stdin.isatty():
        print("reading the prompt from standard input; end it with Ctrl-D", file=sys.stderr)
    prompt: str | bytes = sys.stdin.buffer.read() if args.prompt in (None, "-") else args.prompt
    options = {name: getattr(args, name) for name in ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop",
                                                      "stop_at", "suffix", "fim_mode", "token_healing", "max_time_ms", "ignore_eos", "session",
                                                      "deadline_ms", "cache_salt")}
    write = sys.stdout.write
    try:
        with Client(args.url, model=args.model) as client:
            if args.echo:
                write(prompt if isinstance(prompt, str) else prompt.decode(errors="replace"))
            if args.no_stream:
                result = client.complete(prompt, timeout_s=args.timeout, **options)
                write(result.text)
            else:
                with client.stream(prompt, timeout_s=args.timeout, **options) as stream:
                    for chunk in stream:
                        write(chunk.text)
                        sys.stdout.flush()
                    result = stream.result
            write("\n")
            sys.stdout.flush()
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
