"""The checks of lesson 5's exercises accept these solutions, and refuse what is almost right."""

from collections.abc import Sequence as Seq
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from docs.exercises import stage5
from docs.exercises.stage5 import Above, Step
from stages.interface import TokenOutput
from stages.stage2_paged.engine import PagedEngine
from stages.stage5_overlap.engine import OverlapEngine


def commit_times(steps: Seq[Step], overlap: bool) -> list[int]:
    now = device_free = 0
    done, committed = list[int](), list[int]()
    for i, step in enumerate(steps):
        now += step.prepare
        device_free = max(now, device_free) + step.device
        done.append(device_free)
        due = i - 1 if overlap else i
        if due >= 0:
            now = max(now, done[due]) + steps[due].commit
            committed.append(now)
    if overlap:
        committed.append(max(now, device_free) + steps[-1].commit)
    return committed


def least_key(above: Above, low: int, high: int, limit: int, parts: int) -> int:
    while low < high:
        size = -(-(high - low + 1) // parts)  # of a part; the last may be smaller
        ends = [end for i in range(1, parts) if (end := low + i * size - 1) < high]
        low += size * sum(weight >= limit for weight in above(ends))
        high = min(high, low + size - 1)
    return low


class DeepEngine(stage5.DeepEngine):
    @property
    def has_work(self) -> bool:
        return self._table.has_work or bool(self._under_way)

    def step(self) -> list[TokenOutput]:
        batch = self._scheduler.schedule()
        if batch:
            self._under_way.append((batch, self._runner.launch(batch)))
        if not self._under_way or (batch and len(self._under_way) <= self._depth):
            return []
        oldest, pending = self._under_way.popleft()
        return self._table.commit(oldest, pending.wait())


class Graph(stage5.Graph):
    def __init__(self) -> None:
        super().__init__()
        self._calls = list[tuple[Any, Any, Any, Any]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags:
            raise RuntimeError(f"{func} asks for a value on the host, which a graph cannot")
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self._calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self._calls:
            again = func(*args, **kwargs)
            for place, x in zip(tree_leaves(result), tree_leaves(again), strict=True):
                place.copy_(x)


def test_the_stubs_are_to_do() -> None:
    for check in stage5.CHECKS.values():
        with pytest.raises(NotImplementedError):
            check()


def test_the_solutions_pass() -> None:
    stage5.check_commit_times(commit_times)
    stage5.check_least_key(least_key)
    stage5.check_deep_engine(DeepEngine)
    stage5.check_graph(Graph)


def test_the_clock_is_that_of_the_real_engines() -> None:
    steps = [Step(prepare=1, device=4, commit=1)] * 3
    assert stage5._committed(PagedEngine, steps) == [6, 12, 18]
    assert stage5._committed(OverlapEngine, steps) == [6, 10, 14]


def test_the_host_and_the_device_wait_for_each_other() -> None:
    def longer_of_the_two(steps: Seq[Step], overlap: bool) -> list[int]:
        if not overlap:
            return commit_times(steps, overlap)
        widths = [max(step.device, step.prepare + step.commit) for step in steps]
        return [sum(widths[: i + 1]) for i in range(len(steps))]

    def several_at_once(steps: Seq[Step], overlap: bool) -> list[int]:
        now, committed = 0, list[int]()
        done = list[int]()
        for step in steps:
            now += step.prepare
            done.append(now + step.device)
            if not overlap or len(done) > 1:
                due = len(committed)
                now = max(now, done[due]) + steps[due].commit
                committed.append(now)
        if len(committed) < len(steps):
            committed.append(max(now, done[-1]) + steps[-1].commit)
        return committed

    def any_number_ahead(steps: Seq[Step], overlap: bool) -> list[int]:
        if not overlap:
            return commit_times(steps, overlap)
        now = device_free = 0
        done, committed = list[int](), list[int]()
        for step in steps:
            now += step.prepare
            device_free = max(now, device_free) + step.device
            done.append(device_free)
        for step, end in zip(steps, done, strict=True):
            now = max(now, end) + step.commit
            committed.append(now)
        return committed

    def forgets_the_last(steps: Seq[Step], overlap: bool) -> list[int]:
        return commit_times(steps, overlap)[: -1 if overlap else None]

    def never(steps: Seq[Step], overlap: bool) -> list[int]:
        return commit_times(steps, False)

    for wrong in (longer_of_the_two, several_at_once, any_number_ahead, forgets_the_last, never):
        with pytest.raises(AssertionError, match=r"with overlap, .* are committed at"):
            stage5.check_commit_times(wrong)

    with pytest.raises(AssertionError, match=r"without overlap, .* are committed at"):
        stage5.check_commit_times(lambda steps, overlap: commit_times(steps, True))


def test_a_search_ends_at_the_least_key_and_in_time() -> None:
    def bisection(above: Above, low: int, high: int, limit: int, parts: int) -> int:
        return least_key(above, low, high, limit, 2)

    def four_whatever_is_asked(above: Above, low: int, high: int, limit: int, parts: int) -> int:
        return least_key(above, low, high, limit, 4)

    def one_by_one(above: Above, low: int, high: int, limit: int, parts: int) -> int:
        return next(key for key in range(low, high + 1) if above([key])[0] < limit)

    def at_most(above: Above, low: int, high: int, limit: int, parts: int) -> int:
        return least_key(above, low, high, limit + 1, parts)

    def greatest_above(above: Above, low: int, high: int, limit: int, parts: int) -> int:
        return least_key(above, low, high, limit, parts) - 1

    def keeps_the_end(above: Above, low: int, high: int, limit: int, parts: int) -> int:
        while high - low > 1:
            size = -(-(high - low) // parts)
            ends = [low + i * size for i in range(1, parts) if low + i * size < high]
            low += size * sum(weight >= limit for weight in above(ends))
            high = min(high, low + size)
        return high

    for wrong, message in (
        (bisection, "will do"),
        (four_whatever_is_asked, "parts have"),
        (one_by_one, "never ends"),
        (at_most, "the least key is"),
        (greatest_above, "the least key is"),
        (keeps_the_end, "the least key is"),
    ):
        with pytest.raises(AssertionError, match=message):
            stage5.check_least_key(wrong)


def test_the_engines_of_stages_4_and_5_are_depths_0_and_1() -> None:
    dropped = 0
    for seed in range(12):
        tokens, none = stage5.serve(lambda t, s, r, _: PagedEngine(t, s, r), 0, seed)
        ahead, rows = stage5.serve(lambda t, s, r, _: OverlapEngine(t, s, r), 1, seed)
        assert (tokens, none) == (ahead, 0)
        assert all(tokens.values())
        dropped += rows
    assert dropped


def test_loads_preempt_and_stop_where_nobody_foresees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = list[stage5._Table]()
    make = DeepEngine.__init__

    def remember(self: DeepEngine, table: stage5._Table, *parts: Any) -> None:
        tables.append(table)
        make(self, table, *parts)

    monkeypatch.setattr(DeepEngine, "__init__", remember)
    stage5.check_deep_engine(DeepEngine)
    assert sum(table.statistics.preemptions for table in tables) > 20
    assert sum(table.dropped for table in tables) > 20


def test_each_batch_is_committed_once_in_order_and_in_time() -> None:
    class LosesTheLast(DeepEngine):
        @property
        def has_work(self) -> bool:
            return self._table.has_work

    class WorksForever(DeepEngine):
        @property
        def has_work(self) -> bool:
            return True

    class NeverEmpties(DeepEngine):
        def step(self) -> list[TokenOutput]:
            if batch := self._scheduler.schedule():
                self._under_way.append((batch, self._runner.launch(batch)))
            if len(self._under_way) <= self._depth:
                return []
            oldest, pending = self._under_way.popleft()
            return self._table.commit(oldest, pending.wait())

    class NewestFirst(DeepEngine):
        def step(self) -> list[TokenOutput]:
            batch = self._scheduler.schedule()
            if batch:
                self._under_way.append((batch, self._runner.launch(batch)))
            if not self._under_way or (batch and len(self._under_way) <= self._depth):
                return []
            newest, pending = self._under_way.pop()
            return self._table.commit(newest, pending.wait())

    class OneAhead(DeepEngine):
        def __init__(self, *parts: Any) -> None:
            super().__init__(*parts)
            self._depth = min(self._depth, 1)

    class WaitsFirst(DeepEngine):
        def step(self) -> list[TokenOutput]:
            outputs = list[TokenOutput]()
            if self._depth and len(self._under_way) == self._depth:
                oldest, pending = self._under_way.popleft()
                outputs = self._table.commit(oldest, pending.wait())
            if batch := self._scheduler.schedule():
                self._under_way.append((batch, self._runner.launch(batch)))
            if not self._depth:
                oldest, pending = self._under_way.popleft()
                outputs = self._table.commit(oldest, pending.wait())
            return outputs

    class AnswersOfAnother(DeepEngine):
        def step(self) -> list[TokenOutput]:
            batch = self._scheduler.schedule()
            if batch:
                self._under_way.append((batch, self._runner.launch(batch)))
            if not self._under_way or (batch and len(self._under_way) <= self._depth):
                return []
            _, pending = self._under_way.popleft()
            newest = self._under_way[-1][0] if self._under_way else pending._batch
            return self._table.commit(newest, pending.wait())

    class EmptiesAtOnce(DeepEngine):
        def step(self) -> list[TokenOutput]:
            batch = self._scheduler.schedule()
            if batch:
                self._under_way.append((batch, self._runner.launch(batch)))
            outputs = list[TokenOutput]()
            while len(self._under_way) > (self._depth if batch else 0):
                oldest, pending = self._under_way.popleft()
                outputs += self._table.commit(oldest, pending.wait())
            return outputs

    class DropsWhatIsUnderWay(DeepEngine):
        def step(self) -> list[TokenOutput]:
            outputs = super().step()
            if any(output.finish_reason == "stop" for output in outputs):
                self._under_way.clear()
            return outputs

    for wrong, message in (
        (LosesTheLast, "has_work is False"),
        (WorksForever, "has_work is True"),
        (NeverEmpties, "it commits"),
        (NewestFirst, "launched earlier"),
        (OneAhead, "it commits"),
        (WaitsFirst, "before the next one was launched"),
        (AnswersOfAnother, "not its own"),
        (EmptiesAtOnce, "it commits"),
        (DropsWhatIsUnderWay, "it commits"),
    ):
        with pytest.raises(AssertionError, match=message):
            stage5.check_deep_engine(wrong)


def test_a_graph_reads_and_writes_where_it_did() -> None:
    class WritesElsewhere(Graph):
        def replay(self) -> None:
            for func, args, kwargs, _ in self._calls:
                func(*args, **kwargs)

    class ReadsOldValues(Graph):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            before = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args)
            result = super().__torch_dispatch__(func, types, args, kwargs)
            if not func.is_view:
                self._calls[-1] = (func, before, kwargs or {}, result)
            return result

    class SingleResults(Graph):
        def replay(self) -> None:
            for func, args, kwargs, result in self._calls:
                again = func(*args, **kwargs)
                if isinstance(result, Tensor):
                    result.copy_(again)

    class WithoutWritesInPlace(Graph):
        def replay(self) -> None:
            self._calls = [call for call in self._calls if torch.Tag.inplace not in call[0].tags]
            super().replay()

    class Shared(Graph):
        _all: list[tuple[Any, Any, Any, Any]] = []  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self._calls = self._all

    class AnswersTheHost(Graph):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if torch.Tag.data_dependent_output in func.tags:
                return func(*args, **(kwargs or {}))
            return super().__torch_dispatch__(func, types, args, kwargs)

    for wrong, message in (
        (WritesElsewhere, "a norm, replay"),
        (ReadsOldValues, "a norm, replay"),
        (SingleResults, "two results, replay"),
        (WithoutWritesInPlace, "a norm, replay"),
        (Shared, "two graphs"),
        (AnswersTheHost, "was recorded, but the host"),
    ):
        with pytest.raises(AssertionError, match=message):
            stage5.check_graph(wrong)
