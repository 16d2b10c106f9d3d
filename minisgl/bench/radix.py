"""`radix`: what stage 3's tree costs on one core, with many prompts in it."""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from minisgl.bench.record import environment, save
from stages.stage3_radix.radix_tree import RadixTree


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, default, text in (
        ("prompts", 10_000, "in the tree"),
        ("tokens", 1_000, "of each prompt"),
        ("page-size", 16, "tokens in a page"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default:,})")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all numbers there, as JSON")


def run(args: argparse.Namespace) -> None:
    if not 1 <= args.page_size <= args.tokens or args.prompts < 1:
        raise ValueError("there must be at least one prompt, and one page of at least one token in each")
    draw, tree = random.Random(0), RadixTree(args.page_size)
    pages = args.tokens // args.page_size
    stems = [draw.choices(range(150_000), k=args.tokens) for _ in range(100)]

    def prompt() -> list[int]:
        """It shares some beginning with others."""
        shared = draw.choice(stems)[: draw.randint(0, args.tokens)]
        return shared + draw.choices(range(150_000), k=args.tokens - len(shared))

    def insert(number: int, tokens: list[int]) -> float:
        """Microseconds."""
        new = list(range(number * pages, (number + 1) * pages))
        return _microseconds(partial(tree.insert, tokens[: pages * args.page_size], new))

    cached = [prompt() for _ in range(args.prompts)]
    for i, tokens in enumerate(cached):
        insert(i, tokens)
    probes = draw.sample(cached, min(1000, len(cached)))
    matches = [_microseconds(partial(tree.match, tokens)) for tokens in probes]
    inserts = [insert(args.prompts + i, prompt()) for i in range(1000)]
    count, evictions = tree.cached, 0.0
    while tree.cached:
        evictions += _microseconds(partial(tree.evict, pages))
    result = {
        "workload": "radix tree",
        "prompts": args.prompts,
        "tokens_of_each": args.tokens,
        "page_size": args.page_size,
        "cached_pages": count,
        "match_us": statistics.median(matches),
        "insert_us": statistics.median(inserts),
        "evict_us_per_page": evictions / count,
        "all_match_us": matches,
        "all_insert_us": inserts,
    }
    print(
        f"{args.prompts:,} prompts of {args.tokens:,} tokens in {count:,} pages: "
        f"match {result['match_us']:.1f} µs, insert {result['insert_us']:.1f} µs, "
        f"evict {result['evict_us_per_page']:.2f} µs a page"
    )
    if args.out:
        save(args.out, environment() | {"results": [result]})


def _microseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)
