"""What is run before pages are counted: no more of a long prompt than shows what its chunks take."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from stages.stage2_paged import assembly
from stages.stage4_chunked.engine import EngineConfig, longest_prompt
from stages.stage4_chunked.scheduler import ChunkedScheduler


def test_two_chunks_are_enough_where_memory_does_not_grow_with_the_prompt(
    checkpoint: Callable[[str], Path],
) -> None:
    config = EngineConfig(model=str(checkpoint("qwen3")), device="cpu", max_rows=4, prefill_budget=20)
    loaded = assembly.load(config)
    context = loaded.limits.context_length
    starts: list[int] = []

    def make_runner(*arguments: Any) -> Any:
        runner = assembly.make_runner(*arguments)
        launch = runner.launch

        def watched(batch: Any) -> Any:
            starts.extend(row.start for row in batch.rows)
            return launch(batch)

        runner.launch = watched  # type: ignore[method-assign]
        return runner

    for attention, furthest in (("torch", context - 2), ("flash_attn", 40)):
        of = replace(loaded, attention=(attention, attention))
        starts.clear()
        longest = longest_prompt(config, of)
        assembly._run_largest_steps(config, loaded, ChunkedScheduler, make_runner, longest)
        assert max(starts) == furthest  # the decode step behind the prompt
