"""What the radix tree costs on one core: 10,000 cached prompts of 1,000 tokens, pages of 16.

python benchmarks/radix_tree.py
"""

import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

from stages.stage3_radix.radix_tree import RadixTree

PROMPTS, TOKENS, PAGE = 10_000, 1_000, 16
PAGES = TOKENS // PAGE


def microseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)


def main() -> None:
    draw, tree = random.Random(0), RadixTree(PAGE)
    stems = [draw.choices(range(150_000), k=TOKENS) for _ in range(100)]

    def prompt() -> list[int]:
        """It shares some beginning with another one."""
        shared = draw.choice(stems)[: draw.randint(0, TOKENS)]
        return shared + draw.choices(range(150_000), k=TOKENS - len(shared))

    def pages(number: int) -> list[int]:
        return list(range(number * PAGES, (number + 1) * PAGES))

    cached = [prompt() for _ in range(PROMPTS)]
    for i, each in enumerate(cached):
        tree.insert(each[: PAGES * PAGE], pages(i))
    hits = [microseconds(partial(tree.match, each)) for each in draw.sample(cached, 1000)]
    new = [prompt()[: PAGES * PAGE] for _ in range(1000)]
    inserts = [microseconds(partial(tree.insert, new[i], pages(PROMPTS + i))) for i in range(1000)]
    count = tree.cached
    evictions = microseconds(lambda: [tree.evict(PAGES) for _ in range(1 + count // PAGES)])
    assert tree.cached == 0
    result = {"workload": "radix tree", "prompts": PROMPTS, "prompt_tokens": TOKENS, "page_size": PAGE}
    result |= {"match_us": statistics.median(hits), "insert_us": statistics.median(inserts)}
    print(json.dumps(result | {"evict_us_per_page": evictions / count, "cached_pages": count}))


if __name__ == "__main__":
    main()
