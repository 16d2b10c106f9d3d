# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     name: python3
#     display_name: Python 3
#     language: python
# ---

# %% [markdown]
# # One step ahead
#
# [Lesson 4](4-chunked.md) took a decode step apart. Hardly any of it was arithmetic: most was Python, asking
# for one operation after the other, while the GPU waited for the next.
#
# Stage 5 asks less and asks earlier. It launches a batch before it has read the tokens of the one before, it
# records a decode step once as a CUDA graph and replays it with one call, and it joins small operations into
# kernels of its own. Pages, tree and scheduler stay what they were, and so do the tokens.

# %% tags=["hide-input"]
import inspect
import json
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from docs.lesson import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    ROOT,
    canvas,
    code,
    kernels,
    machine,
    publish,
    show,
    table,
)
from minisgl.builtin import PATH
from stages.interface import Request, SamplingParams
from stages.stage1_naive import engine as stage1
from stages.stage1_naive import model as plain
from stages.stage1_naive.attention import QKV, rope_table
from stages.stage1_naive.limits import Limits
from stages.stage1_naive.sampling import Filters, SamplingBatch, sample
from stages.stage1_naive.tokenizer import Tokenizer
from stages.stage2_paged.engine import PagedEngine
from stages.stage2_paged.inputs import RowInputs, Slots, StepInputs, _tokens
from stages.stage2_paged.kv_cache import PagedKVCache
from stages.stage2_paged.request_table import RequestTable, SampledToken
from stages.stage2_paged.sampler import _FLOATS, _INTS, Sampler
from stages.stage2_paged.scheduler import decode_rows, place
from stages.stage3_radix.prefix_cache import RadixPrefixCache
from stages.stage4_chunked import engine as stage4
from stages.stage4_chunked.scheduler import ChunkedScheduler
from stages.stage5_overlap import engine as stage5
from stages.stage5_overlap.engine import OverlapEngine
from stages.stage5_overlap.graph_runner import _OWN, GraphRunner, _Graph, _is_plain, graph_sizes

torch.set_num_threads(1)  # several wait for each other whenever another program takes a core

# %% [markdown]
# ## What stage 4 left
#
# On one H200, with Qwen3-0.6B's shape, PyTorch's profiler counted 824, 880 and 854 kernels in a decode step
# of stage 4 with 1, 32 and 256 rows, each launched from Python. While it recorded, the GPU worked 6%, 7% and
# 18% of the time. Without it these steps took 17, 31 and 35 ms. (These numbers, and others on this page that
# no table holds, are from [what was tried](5-attempts.md).)
#
# What is such a step made of? Stage 4's engine again, with the built-in model on this CPU. *Upload* packs the
# batch, *launch* is the rest of the runner, *wait* fetches the tokens:

# %%
PAGE = 16
tokenizer = Tokenizer(PATH)
text = tokenizer.chat([{"role": "user", "content": "Why is the first engine so slow?"}]) * 20


def make(stage, **more):
    options = {"page_size": PAGE, "num_pages": 512, "max_rows": 32, "prefill_budget": 256, **more}
    return stage.build(stage.EngineConfig(model=str(PATH), device="cpu", **options))


def with_readers(engine, readers, steps=4):
    """The same engine, with requests that are being answered."""
    for i in range(readers):
        params = SamplingParams(max_tokens=400, ignore_eos=True)
        engine.add(Request(f"reader {i}", text[i : i + 20], params, seed=i))
    for _ in range(steps):
        engine.step()
    return engine


def parts_of_a_step(engine, steps=30):
    """Median milliseconds of each part; together they are `PagedEngine.step`."""
    upload, uploads, times = engine._runner._slots.upload, [], []

    def timed_upload(batch):
        start = time.perf_counter()
        result = upload(batch)
        uploads.append(time.perf_counter() - start)
        return result

    engine._runner._slots.upload = timed_upload
    for _ in range(steps):
        clock = [time.perf_counter()]
        batch = engine._scheduler.schedule()
        clock.append(time.perf_counter())
        pending = engine._runner.launch(batch)
        clock.append(time.perf_counter())
        sampled = pending.wait()
        clock.append(time.perf_counter())
        engine._table.commit(batch, sampled)
        clock.append(time.perf_counter())
        schedule, launch, wait, commit = np.diff(clock)
        times.append((schedule, uploads[-1], launch - uploads[-1], wait, commit))
    return [1000 * median(column) for column in zip(*times, strict=True)]


class Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += not function.is_view  # a view moves no data
        return function(*args, **(kwargs or {}))


rows = []
for readers in (1, 8, 32):
    engine = with_readers(make(stage4), readers)
    parts = parts_of_a_step(engine)
    with Count() as count:
        engine.step()
    rows.append((readers, *(f"{part:.2f}" for part in parts), count.calls))
table(
    ["rows", *(f"{p}, ms" for p in ("schedule", "upload", "launch", "wait", "commit")), "operations"],
    rows,
    "r" * 7,
)

# %% [markdown]
# On a CPU, *launch* computes as well. (With more rows there are more operations, since the `torch` backend
# attends row by row.) On a GPU it only asks, one operation at a time, and the GPU is done with most of them
# before the next one comes. So there are two things to win:
#
# - **Beside each other.** What Python does for the next step it can do while the GPU computes this one.
# - **Once.** The operations of one decode step are those of the next; only numbers change.
#
# ## One batch ahead
#
# Stages 2 to 4 schedule a batch, launch it, wait, and commit. Here is the step of stage 5, all of it:

# %% tags=["hide-input"]
show(OverlapEngine.step)

# %% [markdown]
# It schedules and launches batch n+1, and only then waits for the tokens of batch n. While Python commits
# these, sends them to the users, and schedules what is next, the GPU has a batch to compute. This is what
# SGLang calls a zero-overhead scheduler[^sglang].
#
# But each decode row of batch n+1 begins with a token of batch n. Its *value* is not known to the host yet.
# It need not be: since stage 2 the device keeps the newest token of every slot, and the packed batch says -1
# where it is to be taken from there. And that there *is* such a token, the sequence knows: its `length`
# counts tokens that are being sampled.
#
# One kind of request does ask for the value: where some tokens may not be drawn, which ones can depend on
# those before (`bad_words_ids`). Such a batch is `masked`. Its forward pass is launched as early as any, and
# while the GPU runs it the batch before is committed; only the draw waits for that.
#
# Let us drive an engine by hand. Two requests, one of which ends by a stop token that nobody can foresee, and
# a third that arrives later:


# %%
def tokens_of(engine, requests):
    """All tokens of these requests, by id."""
    outputs = {request.id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output.token_id)
    return outputs


naive = stage1.build(stage1.EngineConfig(model=str(PATH), device="cpu", dtype="float64"))
prompt = text[:24]
foreseen = tokens_of(naive, [Request("stops", prompt, SamplingParams(max_tokens=8, ignore_eos=True), seed=4)])
first = foreseen["stops"]
stop = next(i for i in range(2, 8) if first[i] not in first[:i])  # the first output that ends it
stops = Request("stops", prompt, SamplingParams(stop_token_ids=[first[stop]], max_tokens=50), seed=4)
counts = Request("counts", text[5:17], SamplingParams(max_tokens=6, ignore_eos=True), seed=5)
late = Request("late", text[9:20], SamplingParams(max_tokens=4, ignore_eos=True), seed=6)

engine = make(stage5, dtype="float64", max_rows=4)
launch, commit, launched, dropped = engine._runner.launch, engine._table.commit, [], []


def watched_launch(batch):
    launched.append(
        [(row.sequence.request.id, row.start, row.length, _tokens(row)[-1]) for row in batch.rows]
    )
    return launch(batch)


def watched_commit(batch, sampled):
    dropped.extend(row.sequence.request.id for row in batch.sampling if row.sequence.done)
    return commit(batch, sampled)


engine._runner.launch, engine._table.commit = watched_launch, watched_commit
engine.add(stops)
engine.add(counts)
story, outputs = [], {"stops": [], "counts": [], "late": []}
while engine.has_work:
    if len(story) == 3:
        engine.add(late)
    launched.clear()
    dropped.clear()
    committed = engine.step()
    story.append((list(launched), committed, list(dropped)))
    for output in committed:
        outputs[output.request_id].append(output.token_id)


# %% tags=["hide-input"]
def describe(row):
    name, _, length, token = row
    return f"{name}: {f'{length} of the prompt' if length > 1 else token}"


table(
    ["step", "launches: input token of each row", "commits", "dropped"],
    [
        (
            i,
            "; ".join(describe(row) for rows in batches for row in rows) or "nothing",
            "; ".join(
                f"{o.request_id}: {o.token_id}{' (end)' if o.finish_reason else ''}" for o in outputs_of
            )
            or "nothing",
            ", ".join(gone),
        )
        for i, (batches, outputs_of, gone) in enumerate(story, start=1)
    ],
    "rlll",
)
assert any(gone == ["stops"] for _, _, gone in story)
assert all(row[3] == -1 for batches, _, _ in story for rows in batches for row in rows if row[2] == 1)

# %% [markdown]
# Read the table one line at a time. Each line launches a batch and commits the one of the line above. Every
# decode row begins with -1. Three things are worth a look:
#
# - **“Stops” ends one step late.** When its stop token is read, a row that continues from it has been
#   launched. That row's token is dropped one step later: `commit` passes over sequences that are done. This
#   costs one row of one step.
# - **“Counts” does not.** Its end is a number of tokens, and numbers are known beforehand. `decode_rows`
#   leaves out who is at its limit.
# - **The pages of “stops”** are free, or the tree's, while its last row may still be writing into one of
#   them. No harm is done: whoever gets the page is launched later, and the device computes batches in order.
#   The tree takes only pages whose tokens are all known.
#
# ### Why no token can differ
#
# The scheduler looks at lengths, never at the newest token. We can read its source, and that of the functions
# it places rows with:

# %%
for function in (ChunkedScheduler.schedule, decode_rows, place):
    assert ".tokens" not in inspect.getsource(function)

# %% [markdown]
# Tokens matter in two other places. A request that is admitted is looked up in the tree, by its prompt, which
# is known. A request that was preempted while its token was being sampled has to be computed again from all
# of its tokens; it stays in the queue for a step, until that one has been read (`sequence.in_flight`). And
# since a row's noise depends on seed, position and token id alone, it does not matter which batch a row is
# in. The assertion, in float64, with all that sampling can be asked for, and so few pages that requests are
# preempted:

# %%
SETTINGS = [
    {"temperature": 0.0},
    {},
    {"top_k": 20, "top_p": 0.9},
    {"min_p": 0.1, "temperature": 0.7},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5},
    {"logit_bias": {5: 4.0}},
]
mixed = [
    Request(f"request {i}", text[i : i + 9 + 7 * i], SamplingParams(max_tokens=14 + 2 * i, **setting), seed=i)
    for i, setting in enumerate(SETTINGS)
]
expected = tokens_of(naive, [stops, counts, late, *mixed])
assert {name: expected[name] for name in outputs} == outputs
for few in (512, 7):
    engine = make(stage5, dtype="float64", num_pages=few, max_rows=8)
    assert tokens_of(engine, mixed) == {request.id: expected[request.id] for request in mixed}
    print(f"{few} pages of {PAGE}: the tokens of stage 1, with {engine.statistics.preemptions} preemptions")

# %% [markdown]
# ### What it brings
#
# On this machine the device is the CPU itself, so nothing runs beside anything, and a step ahead brings
# nothing. But we can put a clock in the device's place: a runner that packs each batch as always and then
# computes nothing. A batch is done a fixed time after the one before it. Scheduler, table and packing are the
# real ones, with 256 requests:

# %%
NEEDS = 0.004  # seconds a batch


class Clock:
    """A device that takes `NEEDS` for each batch, one after the other."""

    def __init__(self, slots):
        self.slots, self.free, self.busy, self.waits = slots, 0.0, [], []

    def launch(self, batch):
        self.slots.upload(batch)
        start = max(time.perf_counter(), self.free)
        self.free = start + NEEDS
        self.busy.append((start, self.free))
        return SimpleNamespace(wait=partial(self.wait, self.free, len(batch.sampling)))

    def wait(self, until, count):
        start = time.perf_counter()
        time.sleep(max(0.0, until - start))
        self.waits.append((start, time.perf_counter()))
        return [SampledToken(1)] * count


def on_a_clock(kind, requests=256, steps=40):
    """The clock of an engine that decodes, and what it did while it was watched."""
    limits = Limits(100, 512, frozenset())
    requests_table = RequestTable(limits, 4096, PAGE, requests, RadixPrefixCache(PAGE))
    sampler = Sampler(100, requests, torch.device("cpu"))
    clock = Clock(Slots(requests, 32, PAGE, 4096, sampler, torch.device("cpu")))
    engine = kind(requests_table, ChunkedScheduler(requests_table, 4096), clock)
    for i in range(requests):
        engine.add(Request(str(i), [i % 100] * 4, SamplingParams(max_tokens=200)))
    for _ in range(6):
        engine.step()
    clock.busy, clock.waits = clock.busy[-1:], []
    start = time.perf_counter()
    for _ in range(steps):
        engine.step()
    return clock, start, (time.perf_counter() - start) / steps


clocks = {"stage 4": on_a_clock(PagedEngine), "stage 5": on_a_clock(OverlapEngine)}
table(
    ["engine", "device, ms a step", "whole step, ms", "device busy"],
    [
        (name, f"{1000 * NEEDS:.1f}", f"{1000 * whole:.1f}", f"{NEEDS / whole:.0%}")
        for name, (_, _, whole) in clocks.items()
    ],
    "lrrr",
)

# %% tags=["hide-input"]
figure, axes = canvas(8, 3.0, rows=2, sharex=True)
for axis, (name, (clock, start, _)) in zip(axes, clocks.items(), strict=True):
    wakes = [start, *(end for _, end in clock.waits)]
    host = [(begin, wait - begin) for begin, (wait, _) in zip(wakes, clock.waits, strict=False)]
    device = [(begin, end - begin) for begin, end in clock.busy]
    for line, (spans, colour) in enumerate(((host, PURPLE), (device, BLUE))):
        bars = [(1000 * (b - start), max(0.05, 1000 * length - 0.08)) for b, length in spans]
        axis.broken_barh(bars, (line - 0.36, 0.72), color=colour, linewidth=0)
    axis.set_yticks((0, 1), ("Python", "device"))
    axis.set_ylim(1.5, -0.5)
    axis.set_xlim(0, 1000 * 6 * NEEDS)
    axis.set_title(f"{name}: {'one after the other' if name == 'stage 4' else 'one batch ahead'}")
    axis.tick_params(axis="y", left=False)
    axis.spines["left"].set_visible(False)
axes[1].set_xlabel("milliseconds")
publish(
    figure,
    "Two timelines: Python and device take turns in stage 4, and work at the same time in stage 5",
    f"Steps of 256 requests, with a clock as the device that needs {1000 * NEEDS:.0f} ms a batch. "
    "Python's bars are schedule, upload and commit.",
)

# %% [markdown]
# A step took the sum of both; now it takes the longer of the two. So it is enough for Python to need less
# time than the device. That is a goal which CUDA graphs bring into reach.
#
# ## CUDA graphs
#
# A CUDA graph[^graphs] is a recording: all kernels of a step with their arguments, that is, with the
# addresses they read and write. One call replays it. Python, PyTorch's dispatcher and the launches are paid
# once, when it is recorded. In return, nothing may change from step to step but what is *in* the memory at
# those addresses:
#
# - **The number of rows** is fixed, so graphs are captured for some numbers, and a batch is padded to the
#   next.
# - **Inputs** lie at a fixed place. One buffer of integers holds all of them and crosses in one copy.
# - **Nothing may ask the host.** No plan, no list of lengths, no Python `if` over a value.
#
# How many rows do the graphs have, and how much of a batch is padding?

# %%
sizes = graph_sizes(256)
print(len(sizes), "graphs for up to 256 rows:", ", ".join(map(str, sizes)))
table(
    ["rows", "rows of the graph", "padding"],
    [
        (n, size, f"{1 - n / size:.0%}")
        for n in (1, 3, 9, 17, 33, 100, 241)
        for size in [min(s for s in sizes if s >= n)]
    ],
    "rrr",
)

# %% [markdown]
# This is how a batch is launched and what is packed for it:

# %% tags=["hide-input"]
show(GraphRunner.forward)
show(GraphRunner._pack)

# %% [markdown]
# A padding row computes like any other; it must only harm nobody. The tables on the device have one slot more
# than there are requests, and the cache one page more than the allocator knows. A padding row belongs to that
# slot, all pages of which are that page. It writes its key there, and its token to that slot. Nobody reads
# either.
#
# `_pack` needs no GPU. Three rows, packed for a graph of four:


# %%
class Rehearsal(GraphRunner):
    """With the real `launch` and `_pack`. Without a GPU, a graph is a function that does the same."""

    def __init__(self, eager, max_rows):
        self._eager, self._model, self._attention = eager, eager._model, eager._attention
        self._sampler, self._slots, self._share = eager._sampler, eager._slots, None
        self._sizes, self._padding, self.log = graph_sizes(max_rows), len(self._slots.newest) - 1, []
        self._graphs = {size: self._capture(size) for size in self._sizes}

    def _upload(self, rows, packed):
        self._pack(rows, packed)

    def _capture(self, size):
        packed = torch.zeros(_OWN + self._sampler.columns, size, dtype=torch.int32)
        logits = torch.zeros(size, self._model.config.vocab_size, dtype=torch.float64)
        tokens = torch.zeros(size, dtype=torch.int64)

        def replay():  # in place: who reads the result knows the addresses only
            for output, result in zip((logits, tokens), self._compute(packed), strict=True):
                output.copy_(result)

        return _Graph(SimpleNamespace(replay=replay), packed, logits, tokens)

    def _compute(self, packed):
        """`GraphRunner._step` without Triton; it knows nothing of the batch but `packed`."""
        slots, (token, index, page, slot, end) = self._slots, packed[:5].long()
        new = index >= 0
        slots.page_table[slot[new], index[new]] = page[new].int()
        token_ids, positions = torch.where(token < 0, slots.newest[slot], token), end - 1
        pages, starts = slots.page_table[slot], torch.arange(len(slot) + 1, dtype=torch.int32)
        rows = RowInputs(pages, starts, end.int(), [1] * len(slot), end.tolist())
        where = pages[torch.arange(len(slot)), positions // PAGE].long() * PAGE + positions % PAGE
        inputs = self._sampler.unpack([], packed[_OWN:].reshape(-1))
        everyone = torch.arange(len(slot))
        self._attention.plan(StepInputs(token_ids, positions, where, len(slot), rows, None, everyone, inputs))
        logits = self._model.logits(self._model.hidden(token_ids, positions, self._attention))
        sampled = self._sampler.sample(logits, inputs)
        slots.remember(inputs.slots, sampled.tokens)
        return logits, sampled.tokens

    def launch(self, batch):
        n, replayed = len(batch.rows), batch.num_decode == len(batch.rows) <= self._sizes[-1]
        size = min(s for s in self._sizes if s >= n) if replayed else None
        self.log.append((n, batch.num_decode, size, all(map(_is_plain, batch.rows))))
        pending = super().launch(batch)
        sampled = pending._sampled  # on a GPU a copy: the next replay writes to the same place
        pending._sampled = replace(sampled, tokens=sampled.tokens.clone())
        return pending


engine = make(stage5, dtype="float64", max_rows=6)
engine._runner = Rehearsal(engine._runner, 6)
for name, length, more in (("one", 16, {}), ("two", 20, {"top_p": 0.9}), ("three", 9, {"temperature": 0.0})):
    engine.add(Request(name, text[:length], SamplingParams(**more), seed=length))
engine.step()
batch = engine._scheduler.schedule()
packed = torch.zeros(_OWN + engine._runner._sampler.columns, 4, dtype=torch.int32)
engine._runner._pack(batch.rows, packed)
names = ["token", "new page's index", "new page", *_INTS, *_FLOATS]
floats = packed.view(torch.float32)
table(
    ["column", *(row.sequence.request.id for row in batch.rows), "padding"],
    [
        (name, *(f"{x:g}" for x in (floats if name in _FLOATS else packed)[i].tolist()))
        for i, name in enumerate(names)
    ],
    "lrrrr",
)
print(f"{packed.numel() * 4} bytes in one copy")

# %% [markdown]
# The first three columns are the graph's own, the rest is what stage 2's sampler packs. The token is -1: the
# graph's first kernel takes it from the slot. A row that begins a page, here “one” after its prompt of 16
# tokens, brings its number, and the same kernel writes it into the page table. *Position* is that of the
# token to be sampled; the row's own is one less, and how much it has to attend to follows from it on the
# device.
#
# The model runs on no more than this. To try it, the cell above has a `replay` in plain PyTorch which sees
# the packed buffer only. An engine with it serves the requests from before, and the tokens are those of stage
# 1, padding and all:

# %%
engine = make(stage5, dtype="float64", max_rows=6)
engine._runner = Rehearsal(engine._runner, 6)
for requests in ([stops, counts, late], mixed):
    assert tokens_of(engine, requests) == {request.id: expected[request.id] for request in requests}

# %% tags=["hide-input"]
kinds = {}
for n, num_decode, size, all_plain in engine._runner.log:
    reason = "prompts among the rows" if num_decode < n else "decode rows"
    if size is None:
        how = "no: operation by operation"
    else:
        how = "yes" if all_plain else "yes, then sampled again from its logits"
    count, rows = kinds.get((reason, how), (0, set()))
    kinds[reason, how] = count + 1, rows | {f"{n} in {size}" if size else str(n)}
table(
    ["batch", "replayed", "batches", "rows (in a graph of)"],
    [(*kind, count, ", ".join(sorted(rows))) for kind, (count, rows) in kinds.items()],
    "llrl",
)

# %% [markdown]
# So what is replayed?
#
# - **Batches of decode rows only.** A batch with a piece of a prompt goes to the runner of stage 2, with
#   fused kernels where there are some. Its shape is different each time, and where it is large its kernels
#   run for longer than they take to launch.
# - **Any temperature and seed.** If a row asks for filters, penalties, a bias or log-probabilities, the model
#   is replayed all the same. Then its logits are sampled once more, from Python, and the token that the graph
#   drew is overwritten.
#
# Sampling is inside the graph for two reasons. Outside, it would be launched operation by operation after
# each replay:

# %%
asked = [(Request(str(i), [1], SamplingParams(), seed=i), []) for i in range(32)]
with Count() as count:
    sample(torch.randn(32, 2048), SamplingBatch.of(asked, 2048, torch.device("cpu")))
print(f"{count.calls} operations to sample, parameters included")

# %% [markdown]
# And the token must be in its slot before the next replay begins. It is the last thing that a graph writes
# and the first that the next one reads, without the host in between. That is what makes being a batch ahead
# cheap.
#
# What is captured is this function. It reads like the runner of stage 2:

# %% tags=["hide-input"]
show(GraphRunner._step)

# %% [markdown]
# ### Before and after
#
# Both stages on one H200, with random weights of Qwen3-0.6B's shape and 32 requests that are being answered,
# as PyTorch's profiler saw them (`benchmarks/results/traces-h200.json`). The upper half is one step of stage
# 4, the lower half four steps of stage 5. Look at the time axes, and at how much of the last row is empty:

# %% tags=["hide-input"]
recorded = json.loads((ROOT / "benchmarks/results/traces-h200.json").read_text())
KINDS = {"matrix products": BLUE, "attention": ORANGE, "other": GREEN, "copy": GREY}
HOST = {"schedule": PURPLE, "launch": BLUE, "wait": GREY, "commit": RED}
figure, axes = canvas(8, 4.2, rows=2)
for axis, number in zip(axes, ("4", "5"), strict=True):
    trace = recorded["stages"][number]["32"]
    marks = [start for name, start, _ in trace["host"] if name == "schedule"]
    first = marks[1]  # the profiler makes the first step slower
    last = marks[2] if number == "4" else max(start + length for _, start, length in trace["gpu"])
    for line, (spans, colours) in enumerate(((trace["host"], HOST), (trace["gpu"], KINDS))):
        for name, colour in colours.items():
            bars = [
                ((start - first) / 1000, length / 1000)
                for kind, start, length in spans
                if kind == name and first <= start < last
            ]
            axis.broken_barh(bars, (line - 0.36, 0.72), color=colour, linewidth=0)
    axis.set_yticks((0, 1), ("host", "GPU"))
    axis.set_ylim(1.5, -0.5)
    axis.set_xlim(0, (last - first) / 1000)
    axis.tick_params(axis="y", left=False)
    axis.spines["left"].set_visible(False)
    axis.set_title(f"stage {number}: {'one step' if number == '4' else 'the steps after the first'}")
axes[1].set_xlabel("milliseconds, with the profiler's own time in them")
labels = [(f"host: {name}", colour) for name, colour in HOST.items()]
for name, colour in labels + [(f"GPU: {name}", colour) for name, colour in list(KINDS.items())[:3]]:
    axes[1].bar(0, 0, color=colour, label=name)
figure.legend(loc="outside upper center", ncols=4, handlelength=1.0, columnspacing=1.2)
publish(
    figure,
    "Two traces: in stage 4 one launch is as long as the step and the GPU is idle between short spans; "
    "in stage 5 launches are short and the GPU is busy nearly always",
    "A decode step of 32 requests before and after, on one H200.",
)
table(
    [
        "requests",
        "stage",
        "a step, without the profiler",
        "kernels",
        "GPU time of attention",
        "products",
        "other",
    ],
    [
        (
            count,
            number,
            f"{trace['step_ms']:.2f} ms",
            f"{trace['kernels_per_step']:.0f}",
            *(
                f"{trace['gpu_us_per_step'][kind]:,.0f} µs"
                for kind in ("attention", "matrix products", "other")
            ),
        )
        for count in ("1", "32", "256")
        for number in ("4", "5")
        for trace in [recorded["stages"][number][count]]
    ],
    "rrrrrrr",
)

# %% [markdown]
# A kernel that waits on the device for the one before it (below) counts as busy meanwhile, so the times of
# stage 5's kernels add up to more than the step. From here on, what counts is what the kernels themselves
# take.
#
# ## Fused kernels
#
# Between the matrix products lie small operations. Each reads its input from memory and writes its output
# back, to be read again by the next. And each is a kernel, with a beginning and an end at which most of the
# GPU is idle. Stage 5 brings kernels in Triton[^triton] that do several of them at once. `--fused` chooses
# among them by name:

# %% tags=["hide-input"]
table(
    ["name", "does in one kernel", "where"],
    [
        (code("norm"), "adding to the residual stream, RMSNorm", "`elementwise.py`"),
        (code("mlp"), "SiLU of the gate, times up", "`elementwise.py`"),
        (
            code("linear"),
            "matrix products of few rows; the one for gate and up also does SiLU and product",
            "`linear.py`",
        ),
        (
            code("layer"),
            "`linear` in graphs, with the norm before a product or the sum after it in the same kernel",
            "`linear.py`",
        ),
        (code("prepare"), "norm of q and k, RoPE, stores to the cache, for prefill", "`preparation.py`"),
        (code("decode"), "all of `prepare`, and attention, for decode rows", "`attention.py`"),
        (
            code("sampling"),
            "temperature, noise and argmax in two kernels; one more for top-k, top-p and min-p",
            "`sampling.py`",
        ),
    ],
)

# %% [markdown]
# How many bytes does that save? Count them: run the unfused functions with Qwen3-0.6B's sizes, and add up
# what every operation reads and writes. (RMSNorm is one operation, as on the GPU. Matrix products and the
# cached keys and values are left out, as they are the same before and after.) For the kernels we count each
# input once and each output once:

# %%
H, INNER, N, K, D, V, LAYERS = 1024, 3072, 16, 8, 128, 151_936, 28  # Qwen3-0.6B
T = 32


def nbytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


class Traffic(TorchFunctionMode):
    """Counts operations, and the bytes that they read and write if each goes through memory."""

    operations = bytes = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs, outputs = ([t for t in tree_leaves(x) if isinstance(t, torch.Tensor)] for x in (args, result))
        known = {t.untyped_storage().data_ptr() for t in inputs}
        new = [t for t in outputs if t.untyped_storage().data_ptr() not in known]  # else: a view
        name = function.__name__
        if name == "index_copy_":
            self.operations, self.bytes = self.operations + 1, self.bytes + 2 * nbytes(inputs[-1:])
        elif new and name != "linear":
            read = new if name == "__getitem__" else inputs  # of a table only what is looked up
            self.operations, self.bytes = self.operations + 1, self.bytes + nbytes(read) + nbytes(new)
        return result


shape = SimpleNamespace(
    num_layers=1, num_heads=N, num_kv_heads=K, head_dim=D, norm_eps=1e-6, rope_theta=1e6, rope_scaling=None
)
x, residual, wide = (torch.randn(T, n).bfloat16() for n in (H, H, (N + 2 * K) * D))
gate_up, down, ones = (
    torch.randn(2 * INNER, H).bfloat16(),
    torch.randn(H, INNER).bfloat16(),
    torch.ones(H).bfloat16(),
)
biases = dict.fromkeys(("gate_up_bias", "down_bias"))
layer = SimpleNamespace(q_norm=ones[:D], k_norm=ones[:D], gate_up=gate_up, down=down, **biases)
cache = PagedKVCache(shape, 8, PAGE, torch.bfloat16, torch.device("cpu"))
qkv = QKV(shape, rope_table(shape, T, torch.device("cpu")))
logits, everywhere = torch.randn(T, V).bfloat16(), torch.arange(T)
batch = SamplingBatch.of(asked, V, torch.device("cpu"))


def prepare():
    _, k, v = qkv(layer, wide, everywhere)
    cache.store(0, k, v, everywhere)


unfused = {
    "prepare": prepare,
    "norm": lambda: plain.add_norm(x, residual, ones, 1e-6),
    "mlp": lambda: plain.mlp(layer, x),
    "sampling": lambda: sample(logits, batch),
}
traffic = {}
for name, function in unfused.items():
    with Traffic() as traffic[name]:
        function()

read_qkv, store = 2 * (N + 2 * K) * D + 2 * D * 4, 2 * 2 * K * D  # the row of the RoPE table is float32
after = [  # what, operations of, kernels, bytes a token, how often in a step
    ("q/k-norm, RoPE, store: prefill", "prepare", 1, read_qkv + store + 2 * N * D, LAYERS),
    ("q/k-norm, RoPE, store: inside decode attention", "prepare", 0, read_qkv + store, LAYERS),
    ("add, norm", "norm", 1, 2 * 4 * H, 2 * LAYERS),
    ("SiLU · up", "mlp", 1, 2 * 3 * INNER, LAYERS),
    ("SiLU · up: inside the product, with few rows", "mlp", 0, 2 * INNER, LAYERS),
    ("sampling", "sampling", 2, 2 * V + 2 * 8 * -(-V // 4096), 1),
]

# %% tags=["hide-input"]
table(
    ["part", "operations before", "kernels after", "bytes a token before", "after", "ratio"],
    [
        (
            what,
            traffic[name].operations,
            kernels or "none of its own",
            f"{traffic[name].bytes / T:,.0f}",
            f"{fused:,}",
            f"{traffic[name].bytes / T / fused:.1f}",
        )
        for what, name, kernels, fused, _ in after
    ],
    "lrrrrr",
)
COPY = 4.3e12  # bytes a second of a copy on an H200


def in_a_step(parts, tokens, fused):
    """Kernels of a step, and microseconds for their bytes, of these lines of the table."""
    lines = [after[i] for i in parts]
    moved = sum(times * (b if fused else traffic[name].bytes / T) for _, name, _, b, times in lines)
    calls = sum(times * (k if fused else traffic[name].operations) for _, name, k, _, times in lines)
    return calls, f"{1e6 * moved * tokens / COPY:,.0f}"


table(
    [
        "in one step of 28 layers",
        "operations before",
        "their bytes at a copy's speed, µs",
        "kernels after",
        "µs",
    ],
    [
        (what, *in_a_step(parts, tokens, False), *in_a_step(parts, tokens, True))
        for what, parts, tokens in (
            ("decode, 8 rows", (1, 2, 4, 5), 8),
            ("decode, 32 rows", (1, 2, 3, 5), 32),
            ("decode, 256 rows", (1, 2, 3, 5), 256),
            ("prefill, 16,384 tokens, without sampling", (0, 2, 3), 16_384),
        )
    ],
    "lrrrr",
)

# %% [markdown]
# In prefill and with many rows, what is saved is bytes. With 8 rows, those of before are a tenth of a
# millisecond. There, what is saved is kernels: each operation of before would be one in the graph too, and a
# kernel that moves a few kilobytes takes microseconds all the same.
#
# ### One kernel
#
# The kernels are written in Triton, which need not be there where this page is made; so the next cell reads
# the files without importing it. This is the kernel of `add_norm`. A block takes one row:

# %% tags=["hide-input"]
show(kernels("stage5_overlap/kernels/elementwise.py")._add_norm)
show(kernels("stage5_overlap/kernels/elementwise.py").begin)

# %% [markdown]
# The row stays in registers between the sum and the norm: five passes over `[T, H]` become four. The sum is
# rounded to the model's type before it is squared, because PyTorch's separate operations do that too.
#
# `begin` is the other half of what these kernels gain, **programmatic dependent launch** (Hopper and
# newer). Usually a kernel starts when every block of the one before is done. With it, a kernel calls
# `gdc_launch_dependents`, and from then on blocks of its successor may come onto multiprocessors that have
# room. They do what depends on nobody. Here that is reading the norm's weight. In `linear.py` it is loading
# the weights of the matrix, which is nearly all that a product with few rows does; in `attention.py` the
# first keys and values, which older steps have stored. Then `gdc_wait` holds them until the predecessor has
# ended and its results can be read. So the order of what is computed is the same; what is gone is the pause
# between two kernels, some two hundred times a step.
#
# ### Decode attention
#
# A decode row has one query for each head and reads all keys and values that the row has. One block for each
# row and KV head is enough to fill the GPU with many rows, but one row alone would keep 8 of its 132
# multiprocessors busy. So rows are split along their tokens, as in flash-decoding[^decoding]. Each block
# attends to its part and writes a maximum, a sum and a weighted sum, and the last block to finish joins them.
# How many parts, and what is in one?

# %%
attention = kernels("stage5_overlap/kernels/attention.py")
device = SimpleNamespace(_sms=132, _config=SimpleNamespace(num_kv_heads=K))


def splits_of(rows, cached):
    """Splits in the launch, tokens in each, and how many have any: as `_decode` divides them."""
    splits, tile = attention.DecodeAttention._splits(device, rows), attention._shape(rows)[0]
    least = attention.DecodeAttention._least(device, rows)
    active = max(1, min(splits, -(-cached // least)))
    size = -(-cached // active // tile) * tile
    return splits, size, max(1, -(-cached // size))


cases = [
    (rows, cached, *splits_of(rows, cached)) for rows in (1, 8, 32, 256) for cached in (400, 4000, 32_000)
]
table(
    [
        "rows",
        "tokens in the cache",
        "splits launched",
        "tokens of a split",
        "splits with work",
        "blocks with work",
    ],
    [
        (rows, f"{cached:,}", splits, f"{size:,}", active, f"{active * rows * K:,}")
        for rows, cached, splits, size, active in cases
    ],
    "rrrrrr",
)

# %% [markdown]
# The number of splits in the launch depends on the number of rows alone, and that is fixed for a graph.
# Everything else a block finds out on the device. It reads the position of its row, computes where its part
# begins and ends, and leaves at once if there is nothing in it. So rows of any lengths use the same graph,
# and the host needs no plan. With FlashInfer the host makes one for every step, which took 0.6 ms at 256
# rows.
#
# The block of the first split also takes the new token. It normalises and rotates its key, stores key and
# value, and attends to it without reading it back.
#
# ### Top-k and top-p without a sort
#
# Stage 1's filters sort the vocabulary of every row. But what they look for is a threshold: the least logit
# that is kept. Top-k wants the least value with fewer than k logits above it; top-p the least value with less
# than p of the probability above it. Both can be bisected. Floats order as their bits do when these are read
# as an integer, with the bits of negative ones turned over. So there are at most 32 halvings, each of which
# is a pass over the row that counts or adds:


# %%
def key(values):
    """Integers that order as these float32 do."""
    bits = values.view(torch.int32).long()
    return bits ^ ((bits >> 63) & 0x7FFFFFFF)


def least_key(keys, weights, limit):
    """The least key with less than `limit` above it, and the passes that it took to find it."""
    low, high, passes = int(keys.min()), int(keys.max()), 0
    while low < high:
        middle, passes = (low + high) // 2, passes + 1
        enough = weights[keys > middle].sum() >= limit
        low, high = (middle + 1, high) if enough else (low, middle)
    return low, passes


def kept(row, k, p):
    """What top-k and then top-p leave of one row: bool for each token, and the passes."""
    keys, weights = key(row), (row - row.max()).double().exp()
    least, passes = least_key(keys, torch.ones_like(weights), k)
    above = keys > least
    mass = weights[above].sum() + (k - above.sum()) * weights[keys == least][0]  # of exactly k, whatever ties
    by_p, more = least_key(keys, weights, p * mass)
    return keys >= max(least, by_p), passes + more


# %%
torch.manual_seed(0)
rows, kinds = [], {"float32": lambda x: x, "rounded to bfloat16": lambda x: x.bfloat16().float()}
for (kind, rounded), k, p in [
    (kind, k, p) for kind in kinds.items() for k, p in ((50, 0.9), (1000, 0.95), (V, 0.8))
]:
    logits = rounded(3 * torch.randn(2, V))
    tops = torch.tensor([k, k]), torch.tensor([p, p]), torch.zeros(2)
    theirs = Filters(*tops).apply(logits.double()) > -torch.inf
    ours, passes = zip(*(kept(row, k, tops[1][0].double()) for row in logits), strict=True)
    assert torch.equal(torch.stack(ours), theirs)
    rows.append(
        (kind, "off" if k == V else f"{k:,}", p, ", ".join(f"{m.sum():,}" for m in ours), max(passes))
    )
table(["logits", "top-k", "top-p", "tokens kept of each row", "passes"], rows, "lrrrr")

# %% [markdown]
# The kept sets are equal, ties with the last one included: a value is above a threshold or it is not, so what
# ties is kept together, which is also stage 1's rule. The kernel divides by four instead of two, which halves
# the passes. It begins with closer bounds, and bfloat16 has keys of 16 bits. And it stops at the threshold:
# `draw` makes each token's noise in registers while it reads the logits, and cuts what is below. Neither
# sorted logits nor noise are ever in memory.
#
# ## Measured
#
# Both stages on one H200 with random weights of Qwen3-0.6B's shape, medians of three runs, with the default
# budgets: 2,048 tokens a step in stage 4, and 16,384 in stage 5. The limit is what [the
# benchmark](../bench.md) computes from the speed of the machine's own matrix products and copies. It lets
# every request read its own keys and values. Where 256 requests share 2,048 tokens, that is more than has to
# be read, so there it is no lower bound.

# %% tags=["hide-input"]
files = {n: json.loads((ROOT / f"benchmarks/results/stage{n}-offline-h200.json").read_text()) for n in (4, 5)}
by_stage = {n: {r["workload"]: r for r in file["results"]} for n, file in files.items()}
RATE, TIME = "tokens_per_second", "seconds"
TARGETS = {  # by the beginning of the workload's name
    "1 request": (RATE, 1200),
    "8 requests": (RATE, 9000),
    "32 requests": (RATE, 26_000),
    "prefill": (TIME, 0.105),
    "8 x 32,000": (TIME, 2.1),
    "256 x": (TIME, 0.60),
    "256 requests": (RATE, 30_000),
}
rows = []
for workload, old in by_stage[4].items():
    new = by_stage[5][workload]
    kind, target = next(value for name, value in TARGETS.items() if workload.startswith(name))
    is_rate = kind == RATE
    of = "{:,.0f} tokens/s" if is_rate else "{:.3f} s"
    limit = new["tokens"] / new["limit_seconds"] if is_rate else new["limit_seconds"]
    reached = new[kind] >= target if is_rate else new[kind] <= target
    rows.append(
        (
            workload,
            *(of.format(value) for value in (old[kind], new[kind])),
            f"{old['seconds'] / new['seconds']:.1f}",
            of.format(limit),
            of.format(target),
            "yes" if reached else "not yet",
        )
    )
table(["workload", "stage 4", "stage 5", "times as fast", "limit", "target", "reached"], rows, "lrrrrrl")
table(
    ["measured on", "stage 4", "stage 5"],
    [(name, *(file[name] for file in files.values())) for name in ("hardware", "model", "commit")]
    + [
        (name, *(file["versions"].get(name, "none") for file in files.values()))
        for name in files[5]["versions"]
    ]
    + [("command", *(code(file["command"]) for file in files.values()))],
)

# %% [markdown]
# Two of the seven targets are reached: one request alone, and the shared prefix. Five are not yet. Where
# their time goes, and what was tried, is in [the log](5-attempts.md). The gain is largest for the request
# alone, where the GPU had worked 5% of the time. It is smallest with the prompts of 32,000 tokens, where
# stage 4 had reached 45% of the limit already, and where most steps are no graphs.
#
# Stage 5 ran each workload once before, which does not count; every single run is in the files,
# `benchmarks/results/stage4-offline-h200.json` and `stage5-offline-h200.json`. With pages of 128 tokens
# instead of 16, for which flash-attn 4 has a faster path, the eight long prompts took 2.15 s, and the other
# workloads tried as long as before (`stage5-page128-h200.json`).
#
# ### Each kernel alone
#
# The kernels against the PyTorch that they stand for, on the same H200. Both run inside a CUDA graph, so
# neither waits for Python. The last column is how long a copy takes to move as many bytes as the kernel must:

# %% tags=["hide-input"]
alone = json.loads((ROOT / "benchmarks/results/stage5-kernels-h200.json").read_text())
table(
    ["kernel", "size", "ours, µs", "PyTorch, µs", "times as fast", "bytes alone, µs"],
    [
        (
            r["kernel"],
            r["size"],
            f"{r['ours_us']:,.1f}",
            f"{r['pytorch_us']:,.1f}",
            f"{r['pytorch_us'] / r['ours_us']:.1f}",
            f"{r['ceiling_us']:.1f}" if r["ceiling_us"] >= 0.05 else "less than 0.1",
        )
        for r in alone["results"]
    ],
    "llrrrr",
)

# %% [markdown]
# With many rows the elementwise kernels run at the speed of a copy; there is nothing left to win but to not
# move the bytes. With few rows a kernel takes a microsecond or two, whatever it does. The draw is the other
# way round: 256 rows are nine times slower than their bytes, for it is bound by the arithmetic of its noise.
#
# ### One part less
#
# `python -m minisgl.bench ablate` takes out one part at a time and compares. Here it does so on this CPU,
# with the built-in model, where there are no graphs and no kernels to take out:


# %% tags=["hide-input"]
def seconds_without(**changes):
    """Seconds for 16 requests that share most of their prompts; the better of two runs."""
    engine, best = make(stage5, **changes), float("inf")
    for run in range(2):
        start = time.perf_counter()
        requests = [
            Request(
                f"{run} {i}", [*text[:200], run, i], SamplingParams(max_tokens=24, ignore_eos=True), seed=i
            )
            for i in range(16)
        ]
        tokens_of(engine, requests)
        best = min(best, time.perf_counter() - start)
    return best


variants = {"nothing": {}, "radix": {"radix": False}, "overlap": {"overlap": False}}
ablated = {name: seconds_without(**changes) for name, changes in variants.items()}
table(
    ["taken out", "seconds", "in units of the whole engine's"],
    [(name, f"{t:.2f}", f"{t / ablated['nothing']:.2f}") for name, t in ablated.items()],
    "lrr",
)

# %% [markdown]
# On a CPU the step ahead wins nothing, as there Python and the arithmetic share the same cores. On an H200,
# with Qwen3-0.6B's shape and up to 32 rows (medians of three runs, in units of the whole engine's):

# %% tags=["hide-input"]
ablation = json.loads((ROOT / "benchmarks/results/stage5-ablation-h200.json").read_text())
WORKLOADS = ["1 request, 128 in, 512 out", "16 x (256 shared + 64) in, 64 out", "prefill of 64 x 1,024"]
seconds_of = {(r["part"], r["variant"], r["workload"]): r["seconds"] for r in ablation["results"]}
parts = {r["variant"]: r["part"] for r in ablation["results"] if r["variant"] != "everything"}
rows = [("nothing", *(f"{seconds_of[2, 'everything', name]:.3f} s" for name in WORKLOADS))]
for variant, part in parts.items():
    ratios = [seconds_of[part, variant, w] / seconds_of[part, "everything", w] for w in WORKLOADS]
    rows.append((variant, *(f"{ratio:.2f}" for ratio in ratios)))
table(["taken out", "1 request", "16 that share", "prefill of 64 x 1,024"], rows, "lrrr")
print(ablation["note"])

# %% [markdown]
# *Graphs* and the *decode* kernel, without which there are no graphs, are worth a factor of ten where one
# request waits for each token, and nothing to prefill. The kernel that prepares q, k and v halves the time
# of prefill, for plain PyTorch makes a dozen passes over them. The step ahead brings 8% to one request and
# 14% to prefill. And some parts pay nothing here: without `linear` the products of `layer` are still ours,
# and the other way round, and either is as fast as both; 16 rows even seem a little faster without one,
# within what two engines of the same kind differ (0.079 and 0.084 s of *nothing*, on two GPUs). A part that
# only prevents a bad case, as chunks do, shows nothing in workloads without it: for that there is stage 4's
# page.
#
# ## What the engine did, on a time axis
#
# Whether Python and the GPU really work beside each other is best seen. With `--trace FILE` the engine
# records its first steps, as a file for [Perfetto](https://ui.perfetto.dev): what the scheduler did, what was
# launched, what was copied and waited for, on a GPU every kernel, and what each request got of it. Here is a
# small engine on this CPU:

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "trace.json")
    engine = make(stage5, max_rows=4, prefill_budget=48, trace=str(path))
    tokens_of(engine, [stops, counts])  # once before, so that nothing is done for the first time
    for name, length, answer in (("one", 20, 10), ("two", 100, 8), ("three", 30, 6)):
        params = SamplingParams(max_tokens=answer, ignore_eos=True)
        engine.add(Request(name, [7, length, *text[:length]], params))
    while engine.has_work:
        engine.step()
    events = json.loads(path.read_text())["traceEvents"]

names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
lines = ["scheduler", "launches", "host copies", "one", "two", "three"]
spans = [
    (names[e["pid"], e["tid"]], e["name"], e["ts"] / 1000, e["dur"] / 1000) for e in events if e["ph"] == "X"
]
zero = min(start for line, _, start, _ in spans if line in ("one", "two", "three"))
spans = [(line, name, start - zero, length) for line, name, start, length in spans if start >= zero]

# %% tags=["hide-input"]
colours = {
    "schedule": PURPLE,
    "commit": RED,
    "launch": BLUE,
    "upload of inputs": GREEN,
    "wait for tokens": GREY,
    "waiting": GREY,
    "prefill": ORANGE,
    "decode": BLUE,
}
figure, axis = canvas(8, 3.4)
for name, colour in colours.items():
    for number, line in enumerate(lines):
        bars = [(s, max(0.04, length)) for where, what, s, length in spans if (where, what) == (line, name)]
        alpha = 0.4 if name == "waiting" else 1.0
        axis.broken_barh(bars, (number - 0.36, 0.72), color=colour, alpha=alpha, linewidth=0)
for where, _, start, _ in spans:
    if where == "launches":
        axis.axvline(start, color=GREY, linewidth=0.5, alpha=0.6)
axis.set_yticks(range(len(lines)), lines)
axis.set_ylim(len(lines) - 0.5, -0.5)
axis.set_xlim(0, None)
axis.set_xlabel("milliseconds since the first request came")
axis.tick_params(axis="y", left=False)
axis.spines["left"].set_visible(False)
for name in ("schedule", "launch", "upload of inputs", "commit", "waiting", "prefill", "decode"):
    axis.bar(0, 0, color=colours[name], alpha=0.4 if name == "waiting" else 1.0, label=name)
figure.legend(loc="outside upper center", ncols=7, handlelength=1.0, columnspacing=1.2)
publish(
    figure,
    "A trace as rows: short spans of the scheduler, long launches, copies, and three requests step by step",
    "The rows of a trace, drawn from its file. The thin lines are the beginnings of launches. On this CPU a "
    "launch computes, so “launches” is busy nearly always.",
)
widths = {
    name: median(n for _, what, _, n in spans if what == name) for name in ("schedule", "launch", "commit")
}
table(["span", "median, ms"], [(name, f"{width:.3f}") for name, width in widths.items()], "lr")
table(["measured on", ""], [*machine(), ("model", "built-in"), ("command", code("make docs"))])

# %% [markdown]
# The spans of a request lie between launch and commit of its rows. “Two” is cut into chunks, and “three”
# waits until the budget has room for it. Each batch begins for its requests when the one before is done,
# which is when its tokens have been read. On a GPU, “launches” shrinks, “host copies” shows how long Python
# waits for tokens, and there is a row for each stream with all its kernels. Gaps in that row are what this
# stage is about.
#
# ## What stage 6 will do
#
# Now most of a step is the GPU's own. At 128 rows, attention over the cache takes two thirds of it (2.05 of
# 2.96 ms), and matrix products most of the rest. A larger model makes the same picture with larger numbers,
# until it does not fit: neither its weights nor the pages for enough requests.
#
# Stage 6 spreads each matrix over several GPUs. Each holds some of the heads with their part of the cache,
# and a slice of the MLP, and computes its share of every layer. Twice in a layer their partial sums are
# added, right where `add_norm` begins. Everything above the model, the scheduler, the tree and the step
# ahead, stays as it is.
#
# ## Exercises
#
# Stubs are in `docs/exercises/stage5.py`; `python -m docs.exercises.stage5` in the repository's root checks
# what you filled in.
#
# 1. **Draw the timeline.** Given what Python and the device need for each batch, say when each is committed,
#    one after the other and one batch ahead. Who waits for whom?
# 2. **Search in parts.** Find the threshold of top-k or top-p by four parts at a time, or by any number of
#    them, in as few passes as that takes. The checker says how many. Why does the kernel stop at four?
# 3. **Go further ahead.** Write a `DeepEngine` that is as many batches ahead as you ask for. No token may
#    differ, and no batch may be left behind. The checker says what it costs in rows computed for nothing.
#    Look at your timeline again: what can the second batch ahead bring that the first did not?
# 4. **Record it.** Write a CUDA graph in plain PyTorch. It records the operations of a function and does them
#    again, on the same memory. What asks the host cannot be recorded.
#
# ## What to read next
#
# - `stages/stage5_overlap/engine.py`: `make_runner`, which puts kernels and graphs in their places.
# - `stages/stage5_overlap/kernels/linear.py`: why a product with one row is all about reading its matrix.
# - `tests/stage5/test_oracle.py`: aborts and preemptions while a row is under way.
# - [What was tried](5-attempts.md): predictions and measurements, also of what was not kept.
# - The [glossary](../glossary.md) has the new words.
#
# [^sglang]: The SGLang Team, *SGLang v0.4: Zero-Overhead Batch Scheduler, Cache-Aware Load Balancer, Faster
# Structured Outputs*, 2024.
# [^graphs]: A. Gray, *Getting Started with CUDA Graphs*, NVIDIA, 2019.
# [^triton]: P. Tillet, H. T. Kung and D. Cox, *Triton: An Intermediate Language and Compiler for Tiled Neural
# Network Computations*, 2019.
# [^decoding]: T. Dao, D. Haziza, F. Massa and G. Sizov, *Flash-Decoding for Long-Context Inference*, 2023.
