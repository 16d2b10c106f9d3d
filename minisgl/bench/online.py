"""`online`: load on any OpenAI-compatible server, and what its users would feel."""

import argparse
import asyncio
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import uvloop
from tqdm import tqdm

from minisgl.bench.client import RequestFailed, Server
from minisgl.bench.load import Load, Sample
from minisgl.bench.online_report import Limits, summarize, table
from minisgl.bench.record import Json, environment, save
from minisgl.bench.traces import Conversation, Synthetic, TokenSource, Turn, read_trace, replay

_LIST_TIMEOUT_S = 10.0
_SELF_TEST_STREAMS = 64
_SELF_TEST_TOKENS = 4000  # of each stream: a second or two


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    count, positive, span = _whole(1), _number, _span
    add("--url", default="http://127.0.0.1:1919/v1", help="base URL (default: http://127.0.0.1:1919/v1); "
        "the environment's OPENAI_API_KEY is sent if set")  # fmt: skip
    add("--model", help="model to ask (default: the first that the server lists)")
    add("--requests", type=count, default=100, metavar="N", help="conversations of --turns (default: 100)")
    add("--rate", type=positive, metavar="R", help="conversations per second, Poisson (default: all at once)")
    add("--concurrency", type=_counts, default=[None], metavar="A,B,C",
        help="conversations in flight at most; one result for each (default: no limit)")  # fmt: skip
    add("--input-tokens", type=span, default=(512, 512), metavar="MIN[,MAX]", help="of a turn (default: 512)")
    add("--output-tokens", type=span, default=(128, 128), metavar="MIN[,MAX]", help="(default: 128)")
    add("--shared-prefix", type=_whole(0), default=0, metavar="TOKENS",
        help="tokens before --input-tokens, the same in all conversations (default: 0)")  # fmt: skip
    add("--turns", type=count, default=1, metavar="N",
        help="requests of a conversation, each with all before it and sent when that has ended; "
        "more than 1 means --text (default: 1)")  # fmt: skip
    add(
        "--trace",
        type=Path,
        metavar="FILE",
        help="JSONL trace to replay: our own format, Mooncake, Qwen-Bailian",
    )
    add("--trace-limit", type=count, metavar="N", help="only the trace's first N requests")
    add("--trace-speed", type=positive, default=1.0, metavar="X", help="divides its times (default: 1)")
    add("--vocab", type=_whole(2), default=2000, metavar="N",
        help="token ids are drawn below N (default: 2000, which the built-in model has)")  # fmt: skip
    add("--text", action="store_true", help="send words, for servers that take no token ids")
    add("--seed", type=_whole(0), default=0,
        help="of prompts and times (default: 0); the server's cache may know the same prompts")  # fmt: skip
    add("--timeout", type=positive, default=600.0, metavar="S", help="seconds of one request (default: 600)")
    add(
        "--limit-ttft",
        type=positive,
        metavar="MS",
        help="goodput counts requests with this time to first token",
    )
    add("--limit-itl", type=positive, metavar="MS", help="and with this mean inter-token latency")
    add("--self-test", action="store_true", help="how many tokens a second this client takes from a dummy")
    add("--out", type=Path, metavar="FILE", help="save the results as JSON, with every request")


def run(args: argparse.Namespace) -> None:
    """Do what the arguments say. Ctrl-C ends it with a report of what was measured by then.

    Raises:
        ValueError: the user's error, or no request was answered.
    """
    _many_connections()
    if args.self_test:
        _self_test(args)
        return
    if args.trace and (args.rate or args.turns > 1 or args.shared_prefix):
        raise ValueError(
            "--trace brings its own times and prefixes: leave --rate, --turns, --shared-prefix out"
        )
    build = _workload(args)
    server = Server.from_url(args.url)
    model = args.model or _first_model(server)
    limits, results = Limits(args.limit_ttft, args.limit_itl), list[Json]()
    try:
        for position, concurrency in enumerate(args.concurrency):
            load, samples = Load(server, model, args.timeout, concurrency), list[Sample]()
            try:
                _measure(load, build(position), samples)
            finally:
                if samples:
                    name, open_loop = _name(args, concurrency), concurrency is None
                    results.append(summarize(name, samples, limits, open_loop))
                    print(table(results[-1]), end="\n\n", flush=True)
    except KeyboardInterrupt:
        print("interrupted: these numbers are of what had ended by then", file=sys.stderr)
        raise
    finally:
        _save(args, model, results)
    if all(result["failed"] == result["requests"] for result in results):
        raise ValueError("no request was answered")


def _workload(args: argparse.Namespace) -> Callable[[int], list[Conversation]]:
    """The conversations of each position in the sweep: the same lengths, times and sharing, other tokens."""
    text = args.text or args.turns > 1  # an answer comes back as text: a history of ids cannot hold it

    def source(salt: int) -> TokenSource:
        return TokenSource(args.vocab, text, args.seed, salt)

    if args.trace:
        requests = read_trace(args.trace, args.trace_limit)
        return lambda position: replay(requests, args.trace_speed, source(position))
    synthetic = Synthetic(
        args.requests,
        args.turns,
        args.input_tokens,
        args.output_tokens,
        args.shared_prefix,
        args.rate or math.inf,
    )
    return lambda position: synthetic.build(source(position))


def _measure(load: Load, conversations: Sequence[Conversation], samples: list[Sample]) -> None:
    """Fill `samples`."""
    total = sum(len(conversation.turns) for conversation in conversations)
    with (
        tqdm(total=total, unit="req", disable=None, leave=False) as bar,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(load.drive(conversations, samples, bar.update))


def _self_test(args: argparse.Namespace) -> None:
    command = [sys.executable, "-m", "minisgl.bench.dummy"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as dummy:
        try:
            assert dummy.stdout is not None
            server = Server("127.0.0.1", int(dummy.stdout.readline()), "/v1", tls=False)
            load, samples = Load(server, "dummy", args.timeout), list[Sample]()
            turn = Turn(lambda: [1], _SELF_TEST_TOKENS)
            cpu = time.process_time()
            _measure(load, [Conversation(0.0, [turn])] * _SELF_TEST_STREAMS, samples)
            cpu = time.process_time() - cpu
        finally:
            dummy.kill()
    result = summarize("self-test", samples, Limits(), open_loop=False) | {"client_cpu_s": cpu}
    if result["failed"] or not result["output_tokens_per_s"]:
        raise ValueError(f"the self-test failed: {result['errors']}")
    print(
        f"the client took {result['output_tokens_per_s']:,.0f} tokens/s, one event each, "
        f"from {_SELF_TEST_STREAMS} streams of a dummy server; "
        f"{1e6 * cpu / result['output_tokens']:.1f} µs of its CPU a token"
    )
    _save(args, "dummy", [result])


def _first_model(server: Server) -> str:
    try:
        found = msgspec.json.decode(asyncio.run(server.get("/models", _LIST_TIMEOUT_S)))
        return str(found["data"][0]["id"])
    except RequestFailed as failure:
        raise ValueError(f"the server's models cannot be listed: {failure}") from None
    except (ValueError, LookupError, TypeError):
        raise ValueError("the server lists no models: name one with --model") from None


def _save(args: argparse.Namespace, model: str, results: list[Json]) -> None:
    if args.out:
        server = "self-test" if args.self_test else args.url
        save(args.out, environment() | {"server": server, "model": model, "results": results})


def _name(args: argparse.Namespace, concurrency: int | None) -> str:
    """A name that two results share if they did the same."""
    if args.trace:
        what = f"trace {args.trace.name} x{args.trace_speed:g}" + (
            f" first {args.trace_limit}" if args.trace_limit else ""
        )
    else:
        spans = ["-".join(map(str, dict.fromkeys(s))) for s in (args.input_tokens, args.output_tokens)]
        what = f"{args.requests} x {spans[0]} in, {spans[1]} out"
        what += f", {args.turns} turns" if args.turns > 1 else ""
        what += f", {args.shared_prefix} shared" if args.shared_prefix else ""
        what += f", {args.rate:g}/s" if args.rate else ""
    return what + (f", {concurrency} in flight" if concurrency else "")


def _many_connections() -> None:
    """Allow as many open sockets as this process may have: each request in flight takes one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _whole(least: int) -> Callable[[str], int]:
    def convert(given: str) -> int:
        if not given.strip().isdecimal() or int(given) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least}, not {given!r}")
        return int(given)

    return convert


def _number(given: str) -> float:
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {given!r}")
    return value


def _counts(given: str) -> list[int]:
    return [_whole(1)(part) for part in given.split(",")]


def _span(given: str) -> tuple[int, int]:
    ends = _counts(given)
    if len(ends) > 2 or ends[0] > ends[-1]:
        raise argparse.ArgumentTypeError(f"must be MIN or MIN,MAX, not {given!r}")
    return ends[0], ends[-1]
