"""Exercises of lesson 5. Fill in the functions, then run, in the repository's root:

    python -m docs.exercises.stage5

Each one says whether it passed. Solutions are in tests/docs/test_exercises_stage5.py.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from docs.exercises.checker import run_checks
from stages.interface import Request, SamplingParams, TokenOutput
from stages.stage1_naive.limits import Limits
from stages.stage1_naive.sampling import Sampled
from stages.stage2_paged.batch import Batch
from stages.stage2_paged.engine import PagedEngine
from stages.stage2_paged.prefix_cache import NoPrefixCache
from stages.stage2_paged.request_table import RequestTable, SampledToken
from stages.stage2_paged.runner import Pending, Runner
from stages.stage2_paged.scheduler import AnyScheduler
from stages.stage4_chunked.scheduler import ChunkedScheduler
from stages.stage5_overlap.engine import OverlapEngine

CONTEXT = 32  # tokens of a prompt and its answer, at most


@dataclass(frozen=True)
class Step:
    """What a batch takes, in microseconds."""

    prepare: int  # of Python: to schedule, pack and launch it
    device: int  # one batch at a time, in the order of their launches
    commit: int  # of Python, when its tokens are there


def commit_times(steps: Sequence[Step], overlap: bool) -> list[int]:
    """Exercise 1: when each batch is committed, in microseconds after the first one was begun.

    Without overlap the engine works as in stage 4, with it as in stage 5. Nothing else takes any time.
    """
    raise NotImplementedError


Above = Callable[[Sequence[int]], list[int]]


def least_key(above: Above, low: int, high: int, limit: int, parts: int) -> int:
    """Exercise 2: the least key from `low` to `high` above which all keys of a row weigh less than `limit`.

    `high` is such a key. `above(keys)` reads the row once, and says for each of at most `parts - 1` keys what
    is above it. Call it no more often than it takes to search by so many parts at a time. Weights are whole
    numbers here, so no sum is rounded.
    """
    raise NotImplementedError


class DeepEngine(PagedEngine):
    """Exercise 3: an engine that is `depth` batches ahead. 0 is stage 4's engine, and 1 is stage 5's.

    A step schedules once and launches what there is to launch. Then it commits the oldest batch under way, if
    more than `depth` are under way or if there was nothing to launch. It never commits more than one.
    """

    def __init__(self, table: RequestTable, scheduler: AnyScheduler, runner: Runner, depth: int) -> None:
        super().__init__(table, scheduler, runner)
        self._depth = depth
        self._under_way = deque[tuple[Batch, Pending]]()

    @property
    def has_work(self) -> bool:
        raise NotImplementedError

    def step(self) -> list[TokenOutput]:
        raise NotImplementedError


class Graph(TorchDispatchMode):
    """Exercise 4: a CUDA graph without a GPU.

        with Graph() as graph:
            y = function(x)
        x.copy_(...)
        graph.replay()  # y is function(x) again, though `function` is not called

    Inside `with`, PyTorch passes each operation to `__torch_dispatch__`, down to the writes in place, and
    returns to the caller what that returns. Unlike a real graph, this one also computes while it records.

    - A replay writes each result to the memory where it was when it was recorded. A result may be a tuple.
    - A view has no memory of its own, and needs no replay: `func.is_view`.
    - What asks for a value on the host, as `x.item()` and `if x > 0` do, cannot be recorded. It raises a
      RuntimeError. Such operations have `torch.Tag.data_dependent_output` in `func.tags`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError

    def replay(self) -> None:
        raise NotImplementedError


# --- The checks ----------------------------------------------------------------------------------


def check_commit_times(solution: Callable[[Sequence[Step], bool], list[int]]) -> None:
    draw = random.Random(5)
    for case in range(200):
        host, device = ((9, 1), (1, 9), (5, 5), (9, 9))[case % 4]
        steps = [
            Step(draw.randint(1, host), draw.randint(1, device), draw.randint(1, host))
            for _ in range(min(case + 1, draw.randint(1, 8)))
        ]
        for overlap in (False, True):
            expected = _committed(OverlapEngine if overlap else PagedEngine, steps)
            result = list(solution(list(steps), overlap))
            assert result == expected, (
                f"{'with' if overlap else 'without'} overlap, {steps} "
                f"are committed at {expected}, not at {result}"
            )


def _committed(kind: type[PagedEngine] | type[OverlapEngine], steps: Sequence[Step]) -> list[int]:
    """When the real engine commits each of these."""
    parts: Any = _Timeline(steps)
    engine = kind(parts, parts, parts)
    for _ in range(len(steps) + 1):
        engine.step()
    return list(parts.committed)


class _Timeline:
    """Scheduler, runner and table of an engine, all in one, on a clock that only they move."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps, self.committed = steps, list[int]()
        self.made = self.now = self.device_free = 0

    def schedule(self) -> Batch | None:
        if self.made == len(self.steps):
            return None
        self.now += self.steps[self.made].prepare
        self.made += 1
        return Batch([], 0)

    def launch(self, batch: Batch) -> SimpleNamespace:
        self.device_free = max(self.now, self.device_free) + self.steps[self.made - 1].device
        return SimpleNamespace(wait=partial(self.wait, self.device_free))

    def wait(self, until: int) -> list[SampledToken]:
        self.now = max(self.now, until)
        return []

    def commit(self, batch: Batch, sampled: list[SampledToken]) -> list[TokenOutput]:
        self.now += self.steps[len(self.committed)].commit
        self.committed.append(self.now)
        return []


def check_least_key(solution: Callable[[Above, int, int, int, int], int]) -> None:
    torch.manual_seed(5)
    draw, passes = random.Random(5), dict[int, int]()
    for case in range(40):
        logits = 3 * torch.randn(draw.choice((1, 2, 20, 300)))
        keys = _keys(logits.bfloat16().float() if case % 2 else logits)  # rounded ones are often equal
        counts = torch.ones_like(keys)
        weights = counts if case % 3 == 0 else (1e6 * logits.softmax(0)).long() + 1
        total = int(weights.sum())
        limit = draw.choice((1, draw.randint(1, total), draw.randint(1, total), total, total + 1))
        low, high = int(keys.min()) - draw.choice((0, 0, 7)), int(keys.max()) + draw.choice((0, 0, 7))
        if case == 39:
            low, high = -(2**31), 2**31 - 1
        candidates = sorted({low, *keys.tolist()})
        expected = next(key for key in candidates if int(weights[keys > key].sum()) < limit)
        for parts in (2, 3, 4, 8, 16):
            row = _Row(keys, weights, parts)
            result = solution(row.above, low, high, limit, parts)
            assert result == expected, (
                f"from {low} to {high}, {parts} parts at a time, with a limit of {limit}: "
                f"the least key is {expected}, not {result}"
            )
            enough = next(n for n in range(33) if parts**n > high - low)
            assert row.passes <= enough, (
                f"{row.passes} passes for {high - low + 1:,} keys, {parts} parts at a time: {enough} will do"
            )
            passes[parts] = row.passes
    print(f"  passes to find one of all keys of 32 bits, by the number of parts: {passes}")


def _keys(values: Tensor) -> Tensor:
    """Integers that order as these float32 do."""
    bits = values.view(torch.int32).long()
    return bits ^ ((bits >> 63) & 0x7FFFFFFF)


class _Row:
    """A row that counts how often it is read."""

    def __init__(self, keys: Tensor, weights: Tensor, parts: int) -> None:
        self.keys, self.weights, self.parts, self.passes = keys, weights, parts, 0

    def above(self, keys: Sequence[int]) -> list[int]:
        self.passes += 1
        most = self.parts - 1
        assert len(keys) <= most, f"{self.parts} parts have {most} keys between them, not {len(keys)}"
        assert self.passes <= 100, "the search never ends"
        return [int(self.weights[self.keys > key].sum()) for key in keys]


MakeEngine = Callable[[RequestTable, AnyScheduler, Runner, int], PagedEngine | OverlapEngine]


def check_deep_engine(solution: MakeEngine) -> None:
    dropped = dict.fromkeys(range(4), 0)
    for seed in range(12):
        expected, _ = serve(lambda t, s, r, _: PagedEngine(t, s, r), depth=0, seed=seed)
        for depth in dropped:
            tokens, rows = serve(solution, depth, seed)
            for name, answer in expected.items():
                assert tokens[name] == answer, (
                    f"depth {depth}: request {name} got {tokens[name]}, and {answer} in stage 4"
                )
            dropped[depth] += rows
    print(f"  rows computed for nothing, by depth: {dropped}")


def serve(make: MakeEngine, depth: int, seed: int) -> tuple[dict[str, list[int]], int]:
    """Serve requests that come one a step and end where nobody can foresee it, now and then with too few
    pages. -> the tokens of each, and the rows that were dropped. Watches every step."""
    draw, slots = random.Random(seed), 4
    device = _Device(slots)
    limits = Limits(vocab_size=_Device.VOCABULARY, context_length=CONTEXT, eos_token_ids=frozenset())
    table = _Table(device, limits, draw.choice((9, 100)), 4, slots, NoPrefixCache())
    scheduler = _Scheduler(table, budget=8)
    engine = make(table, scheduler, device, depth)
    tokens, steps = dict[str, list[int]](), 0
    while steps < 10 or engine.has_work:
        if steps < 10:
            prompt = draw.choices(range(device.VOCABULARY), k=draw.randint(1, 12))
            stops = draw.sample(range(device.VOCABULARY), k=3)
            params = SamplingParams(max_tokens=draw.randint(1, 16), stop_token_ids=stops)
            tokens[str(steps)] = []
            engine.add(Request(str(steps), prompt, params))
            assert engine.has_work, "there is a request, but has_work is False"
        for output in _watched_step(engine, scheduler, device, depth):
            tokens[output.request_id].append(output.token_id)
        under_way, steps = len(device.under_way), steps + 1
        assert engine.has_work == (table.has_work or under_way > 0), (
            f"has_work is {engine.has_work}, but batches under way are {under_way}, "
            f"and requests that have not ended {len(table.running) + len(table.waiting)}"
        )
        assert steps <= 500, "the requests never end"
    return tokens, table.dropped


def _watched_step(
    engine: PagedEngine | OverlapEngine, scheduler: "_Scheduler", device: "_Device", depth: int
) -> list[TokenOutput]:
    scheduler.made, device.launched, device.waits = [], [], []
    under_way = len(device.under_way)
    outputs = engine.step()
    assert len(scheduler.made) == 1, f"a step schedules once, not {len(scheduler.made)} times"
    made = [batch for batch in scheduler.made if batch]
    assert list(map(id, device.launched)) == list(map(id, made)), (
        f"a step scheduled {len(made)} batches, and launched {len(device.launched)}"
    )
    under_way += len(made)
    due = int(under_way > depth or (not made and under_way > 0))
    assert len(device.waits) == due, (
        f"depth {depth}: a step launched {'a batch' if made else 'nothing'} and had {under_way} under way "
        f"then: it commits {due}, not {len(device.waits)}"
    )
    assert device.waits in ([], [under_way]), "a batch was waited for before the next one was launched"
    assert not device.arrived, "a batch was waited for, but never committed"
    return outputs


class _Device:
    """A runner without a model: a token follows from the one before it, and from where it stands."""

    VOCABULARY = 30

    def __init__(self, slots: int) -> None:
        self.newest = [0] * slots
        self.under_way, self.arrived = list[_Watched](), list[_Watched]()
        self.launched, self.waits = list[Batch](), list[int]()

    def launch(self, batch: Batch) -> Pending:
        for row in batch.sampling:
            known = row.sequence.tokens
            token = known[row.end - 1] if row.end <= len(known) else self.newest[row.slot]
            self.newest[row.slot] = (7 * token + 5 * row.end + known[0]) % self.VOCABULARY
        pending = _Watched(self, batch, [self.newest[row.slot] for row in batch.sampling])
        self.launched.append(batch)
        self.under_way.append(pending)
        return pending


class _Watched(Pending):
    def __init__(self, device: _Device, batch: Batch, tokens: list[int]) -> None:
        super().__init__(batch, Sampled(torch.tensor(tokens, dtype=torch.int64)))
        self.device, self.batch, self.tokens = device, batch, tokens

    def wait(self) -> list[SampledToken]:
        under_way = self.device.under_way
        assert self in under_way, "a batch was waited for twice"
        assert self is under_way[0], "a batch was waited for before one that was launched earlier"
        self.device.waits.append(len(under_way))
        self.device.arrived.append(under_way.pop(0))
        return super().wait()


class _Scheduler(ChunkedScheduler):
    def __init__(self, table: RequestTable, budget: int) -> None:
        super().__init__(table, budget)
        self.made = list[Batch | None]()

    def schedule(self) -> Batch | None:
        self.made.append(super().schedule())
        return self.made[-1]


class _Table(RequestTable):
    def __init__(self, device: _Device, *parts: Any) -> None:
        super().__init__(*parts)
        self.device, self.dropped = device, 0

    def commit(self, batch: Batch, sampled: Sequence[SampledToken]) -> list[TokenOutput]:
        tokens = [new.token_id for new in sampled]
        found = [p for p in self.device.arrived if p.batch is batch and p.tokens == tokens]
        assert found, "a batch was committed with tokens that are not its own, or twice"
        self.device.arrived.remove(found[0])
        self.dropped += sum(row.sequence.done for row in batch.sampling)
        return super().commit(batch, sampled)


def check_graph(solution: type[Graph]) -> None:
    torch.manual_seed(5)
    for name, (function, shapes) in _FUNCTIONS.items():
        inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        expected = _direct(function, inputs)
        with solution() as graph:
            outputs = function(*inputs)
        _compare(f"{name}, while it is recorded", [*inputs, *outputs], expected)
        for turn in range(1, 4):
            if turn > 1:  # the first time it goes on from its own results
                for x in inputs:
                    x.copy_(torch.randn_like(x))
            expected = _direct(function, inputs)
            _replay(graph, name)
            _compare(f"{name}, replay {turn}", [*inputs, *outputs], expected)
    _check_two_graphs(solution)
    x = torch.ones(3)
    for what, ask in _QUESTIONS.items():
        try:
            with solution():
                ask(x)
        except RuntimeError:
            continue
        raise AssertionError(f"{what} was recorded, but the host cannot know its answer at a replay")


def _direct(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> list[Tensor]:
    """What the inputs and the results are after a call."""
    inputs = [x.clone() for x in inputs]
    return [x.clone() for x in (*inputs, *function(*inputs))]


def _replay(graph: Graph, name: str) -> None:
    try:
        graph.replay()
    except NotImplementedError:
        raise
    except (RuntimeError, AttributeError, TypeError) as error:
        raise AssertionError(f"{name}: the replay failed: {error}") from error


def _compare(what: str, tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for x, right in zip(tensors, expected, strict=True):
        assert torch.equal(x, right), f"{what}: {_short(x)} instead of {_short(right)}"


def _short(x: Tensor) -> str:
    numbers = [f"{value:.3g}" for value in x.flatten()[:4].tolist()]
    return f"[{', '.join(numbers)}{', ...' if x.numel() > 4 else ''}]"


def _check_two_graphs(solution: type[Graph]) -> None:
    """An engine has a graph for each size, and they share what they write to."""
    x = torch.tensor([1.0])
    with solution() as add:
        x.add_(3)
    with solution() as double:
        x.mul_(2)
    x.fill_(1)
    x.sub_(1)  # when nothing is recorded
    for graph, value in ((add, 3), (double, 6), (double, 12), (add, 15)):
        _replay(graph, "one of two graphs")
        assert x.item() == value, f"two graphs add 3 and double: {value} was expected, not {x.item():.0f}"


def _normalise(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    y = x * 2 + 1
    y.add_(weight)
    return y, y * torch.rsqrt(y.square().mean(-1, keepdim=True)) * weight


def _attend(qkv: Tensor) -> tuple[Tensor, ...]:
    q, k, v = qkv.split([8, 4, 4], dim=-1)
    q = q.reshape(-1, 2, 4).transpose(0, 1)  # two heads share one of k and v
    weights = (q @ k.expand(2, -1, -1).transpose(1, 2)).softmax(-1)
    return k.unsqueeze(0).expand(2, -1, -1), weights @ v.expand(2, -1, -1)


def _best(x: Tensor) -> tuple[Tensor, ...]:
    values, indices = x.topk(3)
    lowest, where = x.min(-1)
    return values, indices, lowest, x.gather(-1, torch.cat([indices, where.unsqueeze(1)], dim=1))


def _next_token(newest: Tensor, table: Tensor, position: Tensor) -> tuple[Tensor, ...]:
    logits = table[newest.abs().long() % len(table)] + position.sin().unsqueeze(1)
    newest.copy_(logits.argmax(-1))
    position += 1
    return (logits,)


_FUNCTIONS: dict[str, tuple[Callable[..., Sequence[Tensor]], list[tuple[int, ...]]]] = {
    "a norm": (_normalise, [(3, 8), (8,)]),
    "attention, with views": (_attend, [(5, 16)]),
    "operations with two results": (_best, [(2, 9)]),
    "a step that reads what the last one wrote": (_next_token, [(4,), (7, 7), (4,)]),
}
_QUESTIONS: dict[str, Callable[[Tensor], object]] = {
    "x.sum().item()": lambda x: x.sum().item(),
    "`if x.max() > 0`": lambda x: 1 if x.max() > 0 else 2,
    "torch.equal(x, x + 1)": lambda x: torch.equal(x, x + 1),
}


CHECKS: dict[str, Callable[[], None]] = {
    "1 commit_times": lambda: check_commit_times(commit_times),
    "2 least_key": lambda: check_least_key(least_key),
    "3 DeepEngine": lambda: check_deep_engine(DeepEngine),
    "4 Graph": lambda: check_graph(Graph),
}


if __name__ == "__main__":
    run_checks(CHECKS)
