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
# # Pages, and many at once
#
# [Lesson 1](1-naive.md) ended with a number: nearly everything that the naive engine computes, it has
# computed before. For each new token it reads the whole sequence again, and it serves one request at a
# time. The first pain has an old remedy: keep what was computed. The second has one too: put many requests
# in one batch. Both need memory, and the question of this lesson is whose it is, and when.
#
# Stage 2 keeps stage 1's model, sampling and interface. What it swaps in is a little over a thousand
# lines, and this page walks you through the ones that matter.

# %% tags=["hide-input"]
import json
import random
import time
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from docs.lesson import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    ROOT,
    TEAL,
    canvas,
    code,
    machine,
    publish,
    show,
    table,
)
from minisgl.builtin import PATH
from stages import interface
from stages.interface import Request, SamplingParams
from stages.stage1_naive import engine as stage1
from stages.stage1_naive.config import ModelConfig
from stages.stage1_naive.limits import Limits
from stages.stage1_naive.tokenizer import Tokenizer
from stages.stage2_paged.assembly import load, make_runner
from stages.stage2_paged.attention.backend import PagedAttention
from stages.stage2_paged.attention.torch import TorchAttention
from stages.stage2_paged.batch import Batch, Row, Sequence
from stages.stage2_paged.engine import EngineConfig, PagedEngine, build
from stages.stage2_paged.inputs import Slots
from stages.stage2_paged.kv_cache import PageAllocator, PagedKVCache
from stages.stage2_paged.prefix_cache import NoPrefixCache
from stages.stage2_paged.request_table import RequestTable, SampledToken
from stages.stage2_paged.runner import ModelRunner
from stages.stage2_paged.scheduler import Scheduler

torch.set_num_threads(1)  # several wait for each other whenever another program takes a core

# %% [markdown]
# ## Keep K and V
#
# Attention asks one thing of the past: the keys and the values of every earlier position. The causal mask
# fixes them the moment they are computed. Keep both, and a step needs to push only the *new* token through
# the model. This store is the **KV cache**, and this is its price:

# %%
builtin = ModelConfig.load(PATH)
qwen = replace(builtin, num_layers=28, num_kv_heads=8, head_dim=128)  # Qwen3-0.6B, as far as K and V go

prices = []
for name, config, dtype in (("built-in", builtin, torch.float32), ("Qwen3-0.6B", qwen, torch.bfloat16)):
    one_token = PagedKVCache.bytes_per_page(config, page_size=1, dtype=dtype)
    prices.append((name, str(dtype), f"{one_token:,}", f"{2**30 // one_token:,}"))
table(["model", "dtype", "bytes per token", "tokens per GiB"], prices, "llrr")

# %% [markdown]
# That is two tensors (K and V), times layers, KV heads, head size and bytes per number. A model that is
# called small pays over 100 kB for every token of every conversation, for as long as it lasts. So the
# number of requests that a GPU can serve at once is decided by how well this memory is used.
#
# ## The holes
#
# The obvious layout gives each request one contiguous buffer. How large? An answer may grow to its
# `max_tokens`, but nobody knows where it will stop, and a buffer cannot grow once another lies behind it.
# So one reserves the most that it could be. Some of that is never used; and when requests leave, they
# leave holes, which are of no use to a larger one.
#
# **Pages** take the idea of operating systems[^vllm]. Cut the memory into blocks of, say, 16 tokens, give a
# request one more whenever its last is full, and let them lie anywhere. Who has which is kept in plain
# integers:

# %% tags=["hide-input"]
show(PageAllocator)

# %% [markdown]
# To see the difference we serve the same load twice in a memory of 512 tokens. No model is needed, since no
# page depends on what a token *is*: a fake one ends each answer at a length drawn beforehand, which the
# engines cannot see. First, contiguous buffers, each placed into the first hole that is large enough:


# %%
@dataclass
class Fake:
    prompt: int
    max_tokens: int  # what the client allows
    answer: int  # where it will stop


MEMORY, PAGE = 512, 16
draw = random.Random(7)
load_ = [Fake(draw.randint(8, 40), most := draw.randint(40, 120), draw.randint(8, most)) for _ in range(24)]


def contiguous(load):
    """For each step, the blocks in memory: (start, size, used, owner)."""
    queue, running, steps = list(enumerate(load)), [], []
    while queue or running:
        admitted = False
        while queue:
            owner, fake = queue[0]
            size, start = fake.prompt + fake.max_tokens, 0
            for other, taken, *_ in sorted(running):
                if start + size <= other:
                    break
                start = other + taken
            if start + size > MEMORY:
                break
            running.append((start, size, fake.prompt, owner))
            queue.pop(0)
            admitted = True
        if not admitted:  # as in stage 2, a step is for new prompts or for one token of everyone
            running = [(start, size, used + 1, owner) for start, size, used, owner in running]
        steps.append(running)
        running = [r for r in running if r[2] < load[r[3]].prompt + load[r[3]].answer]
    return steps


# %% [markdown]
# Then stage 2's own `RequestTable` and `Scheduler`, to which we come below:


# %%
STOP, WORD = 0, 1


def paged(load):
    limits = Limits(vocab_size=2, context_length=MEMORY, eos_token_ids=frozenset([STOP]))
    requests = RequestTable(limits, MEMORY // PAGE, PAGE, max_rows=24, prefix_cache=NoPrefixCache())
    scheduler, steps = Scheduler(requests, prefill_budget=MEMORY), []
    for owner, fake in enumerate(load):
        requests.add(Request(str(owner), [WORD] * fake.prompt, SamplingParams(max_tokens=fake.max_tokens)))
    while requests.has_work:
        batch = scheduler.schedule()
        steps.append(
            [
                (page * PAGE, PAGE, min(PAGE, max(0, s.scheduled - i * PAGE)), s.arrival)
                for s in requests.running
                for i, page in enumerate(s.pages)
            ]
        )
        ends = [len(r.sequence.output) + 1 == load[r.sequence.arrival].answer for r in batch.sampling]
        requests.commit(batch, [SampledToken(STOP if end else WORD) for end in ends])
    return steps


# %% tags=["hide-input"]
HUES = (BLUE, ORANGE, GREEN, PURPLE, TEAL, RED)


def draw_memory(axis, steps):
    """Every block as an area over the steps: pale what is reserved, full what is used."""
    lives = {}  # (start, owner, size) -> [(step, used)], a new list where it comes back
    for step, blocks in enumerate(steps):
        for start, size, used, owner in blocks:
            runs = lives.setdefault((start, owner, size), [])
            if not runs or runs[-1][-1][0] != step - 1:
                runs.append([])
            runs[-1].append((step, used))
    for (start, owner, size), runs in lives.items():
        colour = HUES[owner % len(HUES)]
        for run in runs:
            first, last = run[0][0], run[-1][0] + 1
            axis.fill_between([first, last], start, start + size, color=colour, alpha=0.22, linewidth=0)
            outline = [(first, start), (first, start + run[0][1])]
            for (_, before), (step, used) in pairwise(run):
                if used != before:
                    outline += [(step, start + before), (step, start + used)]
            outline += [(last, start + run[-1][1]), (last, start)]
            axis.fill(*zip(*outline, strict=True), color=colour, linewidth=0)


layouts = {"One buffer a request": contiguous(load_), f"Pages of {PAGE} tokens": paged(load_)}
longest = max(map(len, layouts.values()))
figure, axes = canvas(8, 6.4, rows=2, sharex=True)
for axis, (title, steps) in zip(axes, layouts.items(), strict=True):
    draw_memory(axis, steps)
    axis.set_title(f"{title}: {len(steps)} steps")
    axis.set_ylabel("place in memory")
    axis.set_yticks(range(0, MEMORY + 1, 128))
    axis.set_ylim(0, MEMORY)
    axis.set_xlim(0, longest)
axes[1].set_xlabel("step")
publish(
    figure,
    "Two maps of the same memory over time: large pale reservations with holes, and pages almost all in use",
    f"The same {len(load_)} requests in the same memory. A colour is a request (they repeat), pale what is "
    "reserved but not used, blank what nobody has. A buffer's end mostly waits for tokens that never come.",
)


def average(values):
    return sum(values) / len(values)


rows = []
for title, steps in layouts.items():
    full = steps[: max(i for i, blocks in enumerate(steps) if len({b[3] for b in blocks}) > 2)]
    used = average([sum(b[2] for b in blocks) / MEMORY for blocks in full])
    kept = average([sum(b[1] - b[2] for b in blocks) / MEMORY for blocks in full])
    at_once = average([len({b[3] for b in blocks}) for blocks in full])
    rows.append((title, f"{used:.0%}", f"{kept:.0%}", f"{1 - used - kept:.0%}", f"{at_once:.1f}", len(steps)))
table(["", "in use", "reserved", "nobody's", "requests at once", "steps in all"], rows, "lrrrrr")

# %% [markdown]
# (The averages leave out the end, when at most two requests are left.) A request wastes less than one page,
# and any free page will do for anyone. What nobody has in the lower map is kept back for those who run, or
# too little for the next prompt. Page size is a trade: small pages waste less, large ones make shorter
# tables and longer reads. `--page-size` takes 1, 16, 64, 128 or 256.
#
# ## Where a position lives
#
# The cache is one tensor of pages for K and one for V in each layer. A request's **page table** lists its
# pages in order of position. Finding a position is one division:

# %%
page_size, pages = 4, [5, 2, 7]
cache = PagedKVCache(
    builtin, num_pages=8, page_size=page_size, dtype=torch.float32, device=torch.device("cpu")
)
positions = torch.arange(10)
locations = torch.tensor(pages)[positions // page_size] * page_size + positions % page_size

table(
    ["position", "page", "offset in it", "location"],
    [(p, pages[p // page_size], p % page_size, at) for p, at in enumerate(locations.tolist())],
    "rrrr",
)

# %% [markdown]
# A store scatters rows to their locations; going through the table gathers them again, as if they had never
# been apart:

# %% tags=["hide-input"]
show(PagedKVCache.store)

# %%
k, v = torch.randn(2, len(positions), builtin.num_kv_heads, builtin.head_dim)
cache.store(0, k, v, locations)

print(list(cache.keys[0].shape), "pages, page_size, KV heads, head_dim")
assert torch.equal(cache.keys[0][pages].flatten(0, 1)[: len(positions)], k)

# %% [markdown]
# There is one page more than we asked for. No request owns it: later stages pad batches, and the padding
# has to read and write somewhere.
#
# ## Three nouns
#
# A request that is being served is a **`Sequence`**. Mind its two counters: `length` is how many tokens there
# are, `scheduled` how many positions were given to batches. What lies between them is still to compute:

# %% tags=["hide-input"]
show(Sequence)

# %% [markdown]
# A **`Row`** is a stretch of one sequence that one step computes, and a **`Batch`** is a list of rows. A
# prompt is a long row; a sequence that writes its answer is a row of one position:

# %% tags=["hide-input"]
show(Row)
show(Batch)

# %% [markdown]
# ## Who waits, who runs
#
# The **`RequestTable`** owns the queue, the running sequences, the pages, and the *slots*: a running
# sequence has one, its row in the tables on the device. Admission asks for the pages of what exists now,
# and not for `max_tokens`:

# %% tags=["hide-input"]
show(RequestTable.admit)

# %% [markdown]
# (`prefix` is always empty here. Stage 3 will change that, and no line of this table.)
#
# The **`Scheduler`** decides what the next step computes. This is *continuous batching*[^orca], in which a
# batch is made anew for every step, so a request joins as soon as there is room and leaves with its last
# token. Nobody waits for the slowest of a group:

# %% tags=["hide-input"]
show(Scheduler)

# %% [markdown]
# To admit by what is needed now is a bet that not everyone grows long. When it is lost, some sequence needs
# a page and none is free. Then `_add_page` *preempts* the youngest: its pages go to the older ones, it
# returns to its place in the queue, and later computes its prompt *and* what it has written in one go. The
# noise of lesson 1 hangs on seed and position alone, so its text does not change. The oldest always gets
# on, so everyone finishes.
#
# ## One step
#
# These parts make an engine. Read `build` like a sentence:

# %% tags=["hide-input"]
show(build)
show(PagedEngine.step)

# %% [markdown]
# Let us watch it. We assemble the same parts, with a scheduler that writes down what it decided, and a cache
# that is too small: 9 pages for eight questions, which arrive one after the other. Everything runs in
# float64, so that no rounding hides a mistake.


# %%
class Watched(Scheduler):
    def __init__(self, table, prefill_budget):
        super().__init__(table, prefill_budget)
        self.history = []

    def schedule(self):
        batch = super().schedule()
        states = {s.arrival: "preempted" if s.output else "waiting" for s in self._table.waiting}
        states |= {s.arrival: "stalled" for s in self._table.running}
        for i, row in enumerate(batch.rows):
            states[row.sequence.arrival] = "decode" if i < batch.num_decode else "prefill"
        self.history.append(states)
        return batch


NUM_PAGES = 9
config = EngineConfig(model=str(PATH), device="cpu", dtype="float64", page_size=PAGE, max_rows=8)
loaded = load(config)
limits = replace(loaded.limits, context_length=NUM_PAGES * PAGE)
requests = RequestTable(limits, NUM_PAGES, PAGE, config.max_rows, NoPrefixCache())
watched = Watched(requests, config.prefill_budget)
small = PagedEngine(requests, watched, make_runner(config, loaded, NUM_PAGES))

tokenizer = Tokenizer(PATH)
questions = [  # when it arrives, how much it may say, and the question
    (0, 40, "What is a KV cache?"),
    (0, 24, "What is a page?"),
    (0, 56, "What is a radix tree?"),
    (5, 40, "What is continuous batching?"),
    (9, 16, "What is a token?"),
    (9, 32, "Why is the first engine so slow?"),
    (30, 24, "What is preemption?"),
    (42, 16, "What is a batch?"),
]
arriving = [
    (
        step,
        Request(str(i), tokenizer.chat([{"role": "user", "content": text}]), SamplingParams(max_tokens=n), i),
    )
    for i, (step, n, text) in enumerate(questions)
]

texts, step, queue = {}, 0, list(arriving)
while queue or small.has_work:
    while queue and queue[0][0] <= step:
        small.add(queue.pop(0)[1])
    for output in small.step():
        texts.setdefault(output.request_id, []).append(output.token_id)
    step += 1

oracle = stage1.build(interface.EngineConfig(model=str(PATH), device="cpu", dtype="float64"))
for _, request in arriving:
    oracle.add(request)
expected = {}
while oracle.has_work:
    for output in oracle.step():
        expected.setdefault(output.request_id, []).append(output.token_id)
assert texts == expected, "stage 2 must give stage 1's tokens"

states = [state for column in watched.history for state in column.values()]
print(f"{step} steps, {sum(map(len, texts.values()))} tokens, the same as stage 1's")
assert "preempted" in states

# %% tags=["hide-input"]
LOOKS = {
    "prefill": (ORANGE, 1.0),
    "decode": (BLUE, 1.0),
    "stalled": (BLUE, 0.3),
    "waiting": (GREY, 0.45),
    "preempted": (RED, 0.85),
}
MEANING = {"stalled": "stalled by a prefill", "preempted": "preempted, waits"}
figure, axis = canvas(8, 3.4)
for state, (colour, alpha) in LOOKS.items():
    for row in range(len(questions)):
        there = [x for x, column in enumerate(watched.history) if column.get(row) == state]
        spans = []
        for x in there:
            if spans and sum(spans[-1]) == x:
                spans[-1] = (spans[-1][0], spans[-1][1] + 1)
            else:
                spans.append((x, 1))
        axis.broken_barh(spans, (row - 0.38, 0.76), color=colour, alpha=alpha, linewidth=0)
    axis.bar(0, 0, color=colour, alpha=alpha, label=MEANING.get(state, state))
axis.set_yticks(range(len(questions)), [f"request {i}" for i in range(len(questions))])
axis.set_ylim(len(questions) - 0.5, -0.5)
axis.set_xlim(0, len(watched.history))
axis.set_xlabel("step")
axis.tick_params(axis="y", left=False)
axis.spines["left"].set_visible(False)
figure.legend(loc="outside upper center", ncols=5, handlelength=1.2, columnspacing=1.4)
times = sum(
    column.get(row) == "preempted" and before.get(row) != "preempted"
    for before, column in pairwise(watched.history)
    for row in range(len(questions))
)
publish(
    figure,
    "A timeline of requests: each prefills for one step, then decodes; some wait, some are preempted",
    f"What the engine did in {len(watched.history)} steps. A column is a batch. Where an answer ends, the "
    f"next request takes its pages. Preemptions: {times}; each time the request prefilled again, what it had "
    "written included, and went on.",
)

# %% [markdown]
# Read it by columns. A step is either prompts or decode rows, so every orange bar leaves a pale gap in the
# blue ones: whoever is writing stalls while others are read. With short questions that is one step; a
# prompt of 32,000 tokens would stop them all for as long as it takes. Stage 4 removes it.
#
# What does the device see of a batch? Ids, positions, page numbers, sampling parameters: a dozen small
# arrays. Each copy to a GPU costs some microseconds and a possible wait, so `Slots.upload` packs all of
# them into one buffer of integers (floats as their bits) and sends that. Page tables stay on the device and
# only new pages travel:

# %% tags=["hide-input"]
show(Slots.upload)

# %% [markdown]
# After that the forward pass reads as it did in stage 1, and the draw follows. They are two methods, as a
# later stage commits the batch before between them:

# %% tags=["hide-input"]
show(ModelRunner.forward)
show(ModelRunner.sample)

# %% [markdown]
# ## Attention over pages
#
# In a matrix product, rows of different requests do not notice each other: positions lie one after the
# other in one `[T, H]`, without padding. Only attention has to know whose past is whose. `PagedAttention`
# is what the model calls as `attend`:

# %% tags=["hide-input"]
show(PagedAttention.__call__)

# %% [markdown]
# It stores first and attends then, so what is attended to is always in the cache. Behind it stands one of
# three backends. The one to read is `torch`:

# %% tags=["hide-input"]
show(TorchAttention.attend)

# %% [markdown]
# It copies each row's pages into one piece, one row at a time. That is right, runs everywhere, and is slow.
# The other two have kernels that follow the page table themselves. `flash_attn`[^flash] computes attention
# tile by tile and never writes the matrix of scores to memory. `flashinfer`[^flashinfer] is made for
# serving: before a step it plans how rows of very different length are spread evenly over the GPU. Prefill
# is bound by arithmetic and decode by reading the cache, so the two may use different ones: `--attention
# flash_attn,flashinfer`. What we measured, on one H200 in bfloat16 with 8 KV heads of size 128:
#
# | work | kernel | result |
# | :-- | :-- | --: |
# | decode, 256 rows of about 840 tokens | FlashInfer, tensor cores, page 16 or 64 | 3.8 to 3.9 TB/s |
# | | FlashInfer, tensor cores, page 1 | 3.6 TB/s |
# | | flash-attn 2, page 256 | 3.6 TB/s |
# | | flash-attn 4, page 16 | 2.7 TB/s |
# | prefill, 16 prompts of 1,024 | flash-attn 4, page 16 / 128 | 355 / 385 TFLOP/s |
# | | FlashInfer, `fa3` / `fa2` | 322 / 237 TFLOP/s |
# | | flash-attn 2, page 256 | 240 TFLOP/s |
# | prefill, 1 prompt of 32,000 | flash-attn 4, page 16 / 128 | 585 / 648 TFLOP/s |
# | | FlashInfer, `fa3` / `fa2` | 541 / 335 TFLOP/s |
# | | flash-attn 2, page 256 | 318 TFLOP/s |
#
# A plain copy reaches 4.3 TB/s on that GPU. Hence the default on Hopper and newer: flash-attn 4 for
# prefill, FlashInfer for decode.
#
# ## What it brings
#
# Back to this machine and the built-in model. First lesson 1's question: what does one more token cost, when
# so many are there already?

# %%
naive = stage1.build(interface.EngineConfig(model=str(PATH), device="cpu"))
engine = build(EngineConfig(model=str(PATH), device="cpu", num_pages=1024, page_size=PAGE, max_rows=32))
text = tokenizer.chat([{"role": "user", "content": "Why is the first engine so slow?"}]) * 100


def seconds(step):
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def next_token(engine, length, steps):
    """The fastest of some steps for one more token, when `length` are there."""
    engine.add(Request("probe", text[:length], SamplingParams(max_tokens=steps + 1, ignore_eos=True)))
    engine.step()  # reads the prompt
    return min(seconds(engine.step) for _ in range(steps))


lengths = [1, 64, 128, 256, 384, 512, 640, 768, 896, 1024]
curves = {
    "stage 1": [1000 * next_token(naive, n, steps=2) for n in lengths],
    "stage 2": [1000 * next_token(engine, n, steps=12) for n in lengths],
}

# %% [markdown]
# Then the question of a server: how many tokens per second come out when so many requests are there?


# %%
def throughput(engine, requests, answer=12):
    params = SamplingParams(max_tokens=answer, ignore_eos=True)
    for i in range(requests):
        engine.add(Request(str(i), text[i : i + 32], params, seed=i))
    start, tokens = time.perf_counter(), 0
    while engine.has_work:
        tokens += len(engine.step())
    return tokens / (time.perf_counter() - start)


crowds = [1, 2, 4, 8, 16, 32]
rates = {
    "stage 1": [throughput(naive, n) for n in crowds],
    "stage 2": [max(throughput(engine, n) for _ in range(3)) for n in crowds],
}

# %% tags=["hide-input"]
figure, (left, right) = canvas(8, 3.5, columns=2)
for stage, colour in (("stage 1", ORANGE), ("stage 2", BLUE)):
    left.plot(lengths, curves[stage], color=colour, marker="o", markersize=4)
    right.plot(crowds, rates[stage], color=colour, marker="o", markersize=4)
    for axis, x, y in ((left, lengths, curves), (right, crowds, rates)):
        place = {"xytext": (-6, 8), "textcoords": "offset points", "ha": "right"}
        axis.annotate(stage, (x[-1], y[stage][-1]), color=colour, **place)
left.set_title("time for one more token")
left.set_xlabel("tokens so far")
left.set_ylabel("milliseconds")
right.set_title("throughput")
right.set_xlabel("concurrent requests")
right.set_ylabel("tokens per second")
right.set_xscale("log", base=2)
right.set_xticks(crowds, list(map(str, crowds)))
for axis in (left, right):
    axis.set_ylim(0, None)
publish(
    figure,
    "Stage 2's time for one token hardly grows with length; its throughput grows with the number of requests",
    "Both stages with the built-in model. Left, the fastest of some steps; right, prompts of 32 tokens and "
    "answers of 12, prefill included.",
)
table(
    ["tokens so far", "stage 1, ms", "stage 2, ms", "ratio"],
    [
        (n, f"{a:.1f}", f"{b:.1f}", f"{a / b:.1f}")
        for n, a, b in zip(lengths, curves["stage 1"], curves["stage 2"], strict=True)
        if n in (1, 64, 256, 1024)
    ],
    "rrrr",
)
table(
    ["concurrent requests", "stage 1, tokens/s", "stage 2, tokens/s", "ratio"],
    [
        (n, f"{a:.0f}", f"{b:.0f}", f"{b / a:.1f}")
        for n, a, b in zip(crowds, rates["stage 1"], rates["stage 2"], strict=True)
    ],
    "rrrr",
)
table(["measured on", ""], [*machine(), ("model", "built-in, float32"), ("command", code("make docs"))])

# %% [markdown]
# The left curve is nearly flat now. It is not quite: attention still reads all that was kept, and the
# `torch` backend even copies it. The right one grows, for a reason that matters more on a GPU: a step reads
# every weight once, whether for one row or for thirty-two. Weights are most of what a small batch reads, so
# more rows are nearly free, until arithmetic or the cache becomes the limit.
#
# ## On a GPU
#
# The same engine, with the shape of Qwen3-0.6B and random weights:

# %% tags=["hide-input"]
measured = json.loads((ROOT / "benchmarks/results/stage2-h200.json").read_text())
table(
    ["workload", "attention", "output tokens", "seconds", "tokens per second"],
    [
        (
            r["workload"],
            code(r["attention"]),
            f"{r['tokens']:,}",
            f"{r['seconds']:.2f}",
            f"{r['tokens_per_second']:,.0f}",
        )
        for r in measured["results"]
    ],
    "llrrr",
)
table(
    ["measured on", ""],
    [
        ("hardware", measured["hardware"]),
        ("model", measured["model"]),
        *((name, version) for name, version in measured["versions"].items()),
        ("commit", measured["commit"]),
        ("command", code(measured["command"])),
    ],
)

# %% [markdown]
# (Each row is the median of its runs.) One request alone is served badly:

# %% tags=["hide-input"]
first = measured["results"][0]["attention"]
mine = {r["workload"][:3]: r for r in measured["results"] if r["attention"] == first}
alone = mine["1 r"]["seconds"] / mine["1 r"]["tokens"]
gain = mine["256"]["tokens_per_second"] / mine["1 r"]["tokens_per_second"]
weights = 596e6 * 2 / 4.3e12  # Qwen3-0.6B's parameters, 2 bytes each, at the speed of a copy
print(f"{1000 * alone:.1f} ms a token; reading all weights at a copy's speed takes {1000 * weights:.1f} ms")
print(f"256 requests together bring {gain:.0f} times as many tokens per second")

# %% [markdown]
# The GPU is not to blame. Count what one decode
# step asks of the device:


# %%
class Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += not function.is_view  # a view moves no data
        return function(*args, **(kwargs or {}))


for i in range(2):
    engine.add(Request(f"count {i}", text[:32], SamplingParams(max_tokens=2, ignore_eos=True)))
engine.step()
with Count() as count:
    engine.step()
print(f"{count.calls} operations for one decode step of {builtin.num_layers} layers")

# %% [markdown]
# A model with 28 layers has several times as many. Python prepares each of these operations and launches
# it, one by one (this is called *eager* mode), and every launch takes microseconds of the CPU. With long
# prompts, many rows or a large model, kernels run longer than their launches take, and the GPU is busy.
# With few rows of a small model they are done sooner than Python can send the next. So a step consists of
# scheduling, packing, hundreds of launches, sampling, and a wait for the tokens, and at small batches **the
# GPU waits for Python most of the time**. Stage 5 removes that: it records the launches of a decode step
# once, as a CUDA graph, fuses what is small, and schedules the next step while this one runs.
#
# ## What stage 3 will do about the rest
#
# A thousand users share one system prompt; a conversation sends its whole history with every turn. What
# does a prompt cost that the engine has just computed for someone else?

# %%
shared = text[:512]
times = []
for i in range(4):
    engine.add(Request(f"user {i}", shared, SamplingParams(max_tokens=2, ignore_eos=True)))
    times.append(1000 * seconds(engine.step))

same, others = engine._table.running[0].pages, engine._table.running[1].pages
keys = engine._runner._attention._cache.keys
assert not set(same) & set(others)
torch.testing.assert_close(keys[:, same], keys[:, others])
table(["user", "prefill, ms"], [(i + 1, f"{ms:.0f}") for i, ms in enumerate(times)], "rr")
print(f"{len(same)} pages a user, and the same keys in them")

# %% [markdown]
# All pay the full price, in time and in memory, and the assertion says that their pages hold the same. The
# pages are there, full of what is needed; the engine only does not know what is in them, and forgets them
# as soon as their request ends. Stage 3 lays a radix tree over the pages, so that a prefix is found, shared
# and kept.
#
# ## Exercises
#
# Stubs are in `docs/exercises/stage2.py`; `python -m docs.exercises.stage2` in the repository's root checks
# what you filled in.
#
# 1. **Find it.** From positions and a page table, compute locations in the cache, for several sequences at
#    once.
# 2. **Waste it.** Give the number of tokens' places that a page size wastes on sequences of given lengths.
#    Which page size would you take, and why not 1?
# 3. **Attend by the page.** Compute attention of one query while the pages come one at a time and are gone
#    afterwards. You will need to keep a maximum, a sum and a weighted sum: the idea in the middle of
#    FlashAttention.
# 4. **Wait for the slowest.** Write a `StaticScheduler` that admits new requests only when nobody runs. The
#    tokens do not change. The checker says what it costs.
#
# ## What to read next
#
# - `stages/stage2_paged/request_table.py`, all of it: `commit` and `_release` are what this page left out.
# - `stages/stage2_paged/assembly.py`: how the room for pages is measured.
# - `stages/stage2_paged/attention/flashinfer.py`: what a plan needs to know.
# - The [glossary](../glossary.md) has the new words, and [Start here](../start.md) the new flags.
#
# [^vllm]: W. Kwon et al., *Efficient Memory Management for Large Language Model Serving with PagedAttention*,
#     2023.
# [^orca]: G.-I. Yu et al., *Orca: A Distributed Serving System for Transformer-Based Generative Models*,
#     2022.
# [^flash]: T. Dao, *FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning*, 2023.
# [^flashinfer]: Z. Ye et al., *FlashInfer: Efficient and Customizable Attention Engine for LLM Inference
#     Serving*, 2025.
