"""Two or four ranks say what stage 1 says, and the tables of all ranks stay equal."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.interface import Request, SamplingParams
from stages.stage5_overlap import engine as stage5
from tests.oracle import assert_same_outputs
from tests.stage2.bad_case import good_and_bad, write_bad
from tests.stage2.oracle_case import CONTEXT, PAGES, oracle, settings, sharing
from tests.stage6 import cases
from tests.stage6.ranks import Ranks

SEEDS = int(os.environ.get("STAGE6_SEEDS", "1"))  # more by hand


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize(
    ("family", "size", "page_size", "overlap"),
    [
        ("llama", 2, 16, True),
        ("qwen2", 2, 1, True),
        ("qwen3", 2, 16, False),
        ("mistral", 2, 1, True),
        ("llama", 4, 1, True),  # 2 key/value heads: each is held by two ranks
        ("qwen2", 4, 16, True),
        ("qwen3", 4, 1, True),
        ("mistral", 4, 16, False),
    ],
)
def test_tokens_are_those_of_stage_1(
    checkpoint: Callable[[str], Path],
    ranks: Callable[[int], Ranks],
    family: str,
    size: int,
    page_size: int,
    overlap: bool,
    seed: int,
) -> None:
    """Requests that share prefixes, come between the steps and are aborted, with too few pages for all."""
    rng = random.Random(f"{seed} {family} {size}")
    path, pages = checkpoint(family), PAGES[page_size]
    count = 15 if size == 2 else 7  # four processes crawl on two cores
    requests = sharing(rng, count, min(CONTEXT, pages * page_size))
    config = settings(
        path, tp=size, attention="torch", page_size=page_size, num_pages=pages, max_rows=6,
        prefill_budget=12, overlap=overlap,
    )  # fmt: skip
    results = ranks(size).run(cases.serve, config, requests, seed)
    outputs, counted, _ = results[0]
    expected = oracle(path, requests)
    for request in requests:
        assert_same_outputs(expected[request.id], outputs[request.id])
    assert counted.free_pages + counted.cached_pages == counted.pages, "nobody owns a page any more"
    if seed == 0 and size == 2:
        assert counted.cached_tokens > 0
        assert counted.evicted_pages > 0
    assert {(statistics, tables) for _, statistics, tables in results} == {results[0][1:]}


@pytest.mark.parametrize("overlap", [True, False])
def test_logits_that_are_nan_end_their_own_request(
    tmp_path: Path, ranks: Callable[[int], Ranks], overlap: bool
) -> None:
    path = write_bad(tmp_path, "llama")
    good, bad = good_and_bad([3, 9, 14, 20, 33, 5, 11, 17])
    config = settings(
        path,
        tp=2,
        attention="torch",
        page_size=1,
        num_pages=70,
        max_rows=4,
        prefill_budget=9,
        overlap=overlap,
    )
    results = ranks(2).run(cases.serve, config, [*bad, *good], 1)
    outputs, expected = results[0][0], oracle(path, good)
    for request in good:
        assert_same_outputs(expected[request.id], outputs[request.id])
    assert {outputs[request.id][-1].finish_reason for request in bad} == {"error"}
    assert {(statistics, tables) for _, statistics, tables in results} == {results[0][1:]}


def test_the_number_of_pages_is_the_smallest_of_all_ranks(
    checkpoint: Callable[[str], Path], ranks: Callable[[int], Ranks]
) -> None:
    assert ranks(2).run(cases.smallest, [7, 5]) == [5, 5]
    assert ranks(2).run(cases.pages, settings(checkpoint("qwen3"), tp=2), [25, 21]) == [21, 21]


def test_ranks_that_disagree_find_out(
    checkpoint: Callable[[str], Path], ranks: Callable[[int], Ranks]
) -> None:
    config = settings(checkpoint("qwen3"), tp=2, num_pages=20)
    request = Request("a", [1, 2, 3], SamplingParams(max_tokens=3, ignore_eos=True))
    errors = ranks(2).run(cases.disagree, config, request)
    assert errors[0] == []
    assert "disagree" in errors[1][0]


def test_one_rank_is_stage_5(checkpoint: Callable[[str], Path]) -> None:
    from stages.stage6_parallel.engine import EngineConfig, build

    assert type(build(EngineConfig(**settings(checkpoint("qwen3"), num_pages=20)))) is stage5.OverlapEngine
