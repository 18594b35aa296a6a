#!/usr/bin/env python3
"""Start tritonserver on a model repository, wait until every model is ready, stay until Ctrl-C or SIGTERM, drain, stop.

    python tools/serve.py                       # model_repository/ on 127.0.0.1:8000 (HTTP), 8001 (gRPC), 8002 (metrics)
    python tools/serve.py --demo                # and stream a completion to the terminal first
    python tools/serve.py -- --log-verbose=1    # with options of tritonserver

The exit code is 0 after Ctrl-C or SIGTERM, 1 if the server could not start or stopped working.
"""
from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from codefuse_triton.triton_server import StartError, TritonServer

from arguments import integer, number

ROOT = Path(__file__).resolve().parent.parent
DEMO_PROMPT = '''import os


def read_lines(path):
    """Return the lines of a text file without their line ends."""
'''


def say(text: str = "", end: str = "\n") -> None:
    print(text, end=end, flush=True)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repository", type=Path, default=ROOT / "model_repository")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for every network (default: %(default)s)")
    p.add_argument("--http-port", type=integer(1, 65535), default=8000)
    p.add_argument("--grpc-port", type=integer(1, 65535), default=8001)
    p.add_argument("--metrics-port", type=integer(1, 65535), default=8002)
    p.add_argument("--log", type=Path, help="the server's log (default: a temporary file, its path is printed)")
    p.add_argument("--load-timeout", type=number(0, above=True), default=1800, metavar="SECONDS", help="for loading the models (default: %(default)g)")
    p.add_argument("--drain", type=number(0), default=10, metavar="SECONDS",
                   help="how long running requests may go on after Ctrl-C or SIGTERM (default: %(default)g)")
    p.add_argument("--demo", action="store_true", help="stream a completion and print lines to try")
    p.add_argument("--model", default="ensemble", metavar="NAME", help="of --demo; one that tools/deploy.py has made has the name given there")
    p.add_argument("--once", action="store_true", help="with --demo: stop afterwards")
    p.add_argument("options", nargs="*", type=server_option, metavar="-- OPTION", help="of tritonserver, e.g. -- --model-control-mode=explicit --load-model=NAME")
    return p


def server_option(text: str) -> str:
    if not text.startswith("--"):
        raise argparse.ArgumentTypeError(f"{text}; expected an option of tritonserver, such as --log-verbose=1")
    return text


def waiting(seconds: float) -> None:
    if sys.stdout.isatty():
        say(f"\rloading the models ... {seconds:.0f} s ", end="")
    elif int(seconds * 10) % 100 == 50:
        say(f"loading the models ... {seconds:.0f} s")


def demo(server: TritonServer, model: str) -> None:
    from codefuse_triton_client import Client, CompletionError
    from codefuse_triton_client.cli import stats

    say(f"\n--- {DEMO_PROMPT!r} is continued by the model:\n")
    say(DEMO_PROMPT, end="")
    try:
        with Client(server.grpc_url, model=model) as client, client.stream(DEMO_PROMPT, max_tokens=96, stop=["\ndef ", "\nclass "]) as stream:
            for chunk in stream:
                say(chunk.text, end="")
            say(f"\n\n--- {stats(stream.result)}")
    except CompletionError as error:
        raise StartError(f"no completion from model {model!r} (--model): {error}") from None
    programs = Path(sys.executable).parent
    say(f"""
Try, in another terminal:
  curl -s {server.http_url}/v2/models/{model}/generate -d '{{"text_input": "def add(a, b):\\n", "max_tokens": 32}}'
  curl -sN {server.http_url}/v2/models/{model}/generate_stream -d '{{"text_input": "class Stack:\\n", "max_tokens": 64, "stream": true}}'
  {shown(programs / "codefuse-client")} --url {server.grpc_url}{f" --model {model}" * (model != "ensemble")} --stats 'def quicksort(items):'
  echo '{{"data": [{{"text_input": ["def f(x):"], "max_tokens": [64], "stream": [true]}}]}}' > /tmp/input.json && \\
  {shown(programs / "python")} {shown(ROOT / "tools" / "perf_analyzer.py")} -m {model} -u {server.grpc_url} -i grpc --streaming --async \\
    --input-data /tmp/input.json --concurrency-range 1:4 --measurement-interval 6000 --stability-percentage 50
  curl -s {server.metrics_url} | grep codefuse_
""")


def shown(path: Path) -> str:
    """As typed from the current directory."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    stop_signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda signum, frame: stop_signals.append(signum))
    server = TritonServer(args.repository, host=args.host, http_port=args.http_port, grpc_port=args.grpc_port,
                          metrics_port=args.metrics_port, log=args.log, options=args.options)
    started = time.monotonic()

    def wait(seconds: float) -> None:
        waiting(seconds)
        if stop_signals:
            raise KeyboardInterrupt

    try:
        server.start()
        server.wait_ready(args.load_timeout, wait)
        say(f"\rready after {time.monotonic() - started:.1f} s: HTTP {server.http_url}, gRPC {server.grpc_url}, metrics "
            f"{server.metrics_url}, log {server.log}")
        if args.demo:
            demo(server, args.model)
        if not (args.demo and args.once):
            say("Ctrl-C drains and stops the server.")
            while not stop_signals:
                trouble = server.poll()
                if trouble is not None:
                    raise StartError(f"{trouble}\n{server.failures()}")
                time.sleep(0.2)
        say(f"\ndraining: running requests may go on for {args.drain:g} s")
        server.stop(drain_s=args.drain)
        say("stopped")
        return 0
    except KeyboardInterrupt:
        return 0
    except StartError as error:
        print(f"\nserve: {error}", file=sys.stderr)
        return 1
    finally:
        server.stop(drain_s=0)


if __name__ == "__main__":
    sys.exit(main())
