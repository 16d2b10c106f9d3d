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
# # A budget for every step
#
# [Lesson 3](3-radix.md) ended with an answer that stops in the middle of a sentence. Someone else had sent a
# long prompt that nobody had sent before, and a step takes whole prompts: until this one was read, no one
# got a token. The longer the prompt, the longer everyone waits, and the more memory that one step takes.
#
# Stage 4 gives each step a budget of tokens. Whoever is being answered gets one first, prompts share the
# rest, and a prompt that does not fit is cut into chunks. What it swaps in is one scheduler of about forty
# lines. The model, the kernels, the pages and the tree stay what they were.

# %% tags=["hide-input"]
import difflib
import inspect
import json
import time
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from statistics import median

import numpy as np
import torch

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
from stages.interface import Request, SamplingParams
from stages.stage1_naive.limits import Limits
from stages.stage1_naive.model import Layer, Ops, Transformer
from stages.stage1_naive.tokenizer import Tokenizer
from stages.stage2_paged.assembly import load, make_runner
from stages.stage2_paged.attention import torch as torch_backend
from stages.stage2_paged.attention.backend import PagedAttention
from stages.stage2_paged.engine import PagedEngine
from stages.stage2_paged.request_table import RequestTable, SampledToken
from stages.stage2_paged.runner import ModelRunner
from stages.stage2_paged.scheduler import decode_rows, place
from stages.stage3_radix import engine as stage3
from stages.stage3_radix.prefix_cache import RadixPrefixCache
from stages.stage4_chunked import engine as stage4
from stages.stage4_chunked.engine import EngineConfig
from stages.stage4_chunked.scheduler import ChunkedScheduler

torch.set_num_threads(1)  # several wait for each other whenever another program takes a core

# %% [markdown]
# ## The stall
#
# How long is it? Four requests are being answered by stage 3's engine when a prompt arrives. The gap that
# all four notice is the step that reads it:

# %%
PAGE = 16
UNLIMITED = None  # stage 3's scheduler, which takes whole prompts
tokenizer = Tokenizer(PATH)
text = tokenizer.chat([{"role": "user", "content": "Why is the first engine so slow?"}]) * 120


def make(budget, **more):
    """An engine of stage 4 with this budget, or one of stage 3."""
    stage = stage3 if budget is UNLIMITED else stage4
    options = {"num_pages": 512, "max_rows": 8, **more}
    if budget is not UNLIMITED:
        options["prefill_budget"] = budget
    return stage.build(stage.EngineConfig(model=str(PATH), device="cpu", page_size=PAGE, **options))


def forever(name, prompt):
    return Request(name, prompt, SamplingParams(max_tokens=400, ignore_eos=True))


def milliseconds(step):
    start = time.perf_counter()
    step()
    return 1000 * (time.perf_counter() - start)


def with_readers(engine, readers=4):
    """The same engine, with requests that are being answered."""
    for i in range(readers):
        engine.add(forever(f"reader {i}", text[i : i + 32]))
    for _ in range(8):
        if engine.has_work:
            engine.step()
    return engine


engine = with_readers(make(UNLIMITED))
usual = median(milliseconds(engine.step) for _ in range(20))
rows = []
for length in (64, 250, 500, 1000, 2000):
    engine.add(Request("long", [length, *text[1:length]], SamplingParams(max_tokens=1)))  # nobody has sent it
    gap = milliseconds(engine.step)
    rows.append((f"{length:,}", f"{gap:.0f}", f"{gap / usual:.0f}"))
print(f"without a prompt a token takes {usual:.1f} ms")
table(["tokens of the prompt", "gap, ms", "times as long"], rows, "rrr")

# %% [markdown]
# Nothing bounds it but the context length. And it comes at random: whether your answer flows depends on what
# others happen to send. (Twice the prompt is more than twice the gap here, since attention compares each
# position with all before it.)
#
# ## What a step costs
#
# One could run the prompt in pieces, with a step of decoding between two of them. There is something better,
# because of what the two kinds of work are bound by. A decode step reads all weights to compute a few
# positions. A prefill step reads the same weights and is busy with arithmetic. If a batch holds both, the
# weights are read once, and the fixed costs of a step are paid once. So the decode rows cost less than a step
# of their own:

# %%
CHUNK = 120


def step_time(readers, chunk):
    """The fastest step with so many decode rows and so many positions of a prompt."""
    engine, times = with_readers(make(max(8, readers + chunk)), readers), []
    for i in range(12):
        if chunk:
            engine.add(Request("long", [i, *text[: 2 * chunk]], SamplingParams(max_tokens=1)))
        times.append(milliseconds(engine.step))
        engine.abort("long")
    return min(times)


decode, chunk, both = step_time(4, 0), step_time(0, CHUNK), step_time(4, CHUNK)
table(
    ["a step with", "ms"],
    [
        ("4 decode rows", f"{decode:.1f}"),
        (f"{CHUNK} positions of a prompt", f"{chunk:.1f}"),
        ("one after the other", f"{decode + chunk:.1f}"),
        ("**both in one batch**", f"**{both:.1f}**"),
    ],
    "lr",
)

# %% [markdown]
# This is the idea of Sarathi-Serve[^sarathi]. It cuts prompts into chunks, and lets each chunk share its step
# with everyone who decodes. How long such a step takes is decided by the number of its tokens, so one number
# bounds it: the **budget**.
#
# ## The scheduler
#
# First one token for everyone who decodes, then prompts in order of arrival, as long as there is budget. That
# may be several short ones, or the next chunk of a long one:

# %% tags=["hide-input"]
show(ChunkedScheduler.schedule)
show(ChunkedScheduler._add_chunk)

# %% [markdown]
# The rows of those who decode come from a function that stage 2's scheduler uses as well. It is here that
# somebody may be preempted when pages run out, before anything else is placed:

# %% tags=["hide-input"]
show(decode_rows)

# %% [markdown]
# A prompt gets the pages for *all* of its positions when it is admitted, so its later chunks need none. And
# the budget must be at least the number of slots. Then a prompt always gets on: it takes a slot itself, so
# those who decode cannot use up the budget.
#
# Let us watch it decide. No model is needed; three requests, and a budget of 10:


# %%
def drive(prompts, budget, num_pages=40):
    """What each step computes of requests with these prompts and lengths of answers."""
    requests = RequestTable(Limits(100, 64, frozenset()), num_pages, 4, 4, RadixPrefixCache(4))
    scheduler, steps = ChunkedScheduler(requests, budget), []
    for name, (prompt, answer) in prompts.items():
        requests.add(Request(name, prompt, SamplingParams(max_tokens=answer)))
    while requests.has_work:
        batch = scheduler.schedule()
        requests.commit(batch, [SampledToken(1)] * len(batch.sampling))
        steps.append(batch)
    return steps


steps = drive({"short": ([1] * 3, 5), "long": ([2] * 25, 3), "last": ([3] * 4, 2)}, budget=10)


def positions(row):
    last = f" to {row.end - 1}" if row.length > 1 else ""
    return f"{row.sequence.request.id}: {row.start}{last}"


def rows_of(batch):
    kinds = batch.rows[: batch.num_decode], batch.rows[batch.num_decode :]
    return [", ".join(map(positions, rows)) for rows in kinds]


table(
    ["step", "decode rows", "prefill rows", "tokens", "rows that sample"],
    [
        (i, *rows_of(batch), sum(r.length for r in batch.rows), len(batch.sampling))
        for i, batch in enumerate(steps, start=1)
    ],
    "rllrr",
)
assert max(sum(row.length for row in batch.rows) for batch in steps) <= 10

# %% [markdown]
# “Short” gets a token in every step from its first to its last. “Last” has to wait behind “long”, but shares
# the step in which that ends. Where a single position of a prompt is left, it goes among the decode rows: to
# the kernel it looks like one.
#
# The last column is smaller than the number of rows while a prompt is half read. A chunk in its middle
# predicts a token that the prompt has already, so nothing is sampled there. `place` knows:

# %% tags=["hide-input"]
show(place)

# %% [markdown]
# In the runner, one index does the rest. Of all hidden states only those of rows that sample become logits:

# %% tags=["hide-input"]
show(ModelRunner.forward)

# %% [markdown]
# What else changes? Nothing in the model. In a matrix product, rows do not notice each other, and attention
# has been ready since stage 2. Up to now, every batch left by one of the two early returns; now the last
# lines run too. Decode rows go through the decode kernel, and chunks through the one for prefill:

# %% tags=["hide-input"]
show(PagedAttention.__call__)

# %% [markdown]
# The new `build` is the old one with another scheduler:

# %%
sources = (inspect.getsource(stage.build).splitlines() for stage in (stage3, stage4))
changes = list(difflib.unified_diff(*sources, "stage 3's build", "stage 4's build", lineterm="", n=0))
print("\n".join(line for line in changes if not line.startswith("@@")))

# %% [markdown]
# ## The same tokens
#
# A position needs the keys and values of those before it, and does not care when they were computed. If they
# come from an earlier chunk, they are in the cache since an earlier step. If they belong to the same chunk,
# every layer stores them before it attends. What the queries of a chunk may see is a rectangle without
# one corner, and the pieces of all chunks make up the triangle of the whole prompt:

# %%
PROMPT, PART = 40, 12
pieces, end = [], 0
while end < PROMPT:
    start, end = end, min(end + PART, PROMPT)
    mask = torch_backend._causal(end - start, end, torch.device("cpu"))  # as the torch backend makes it
    pieces.append(torch.nn.functional.pad(mask, (0, PROMPT - end)))
assert torch.equal(torch.cat(pieces), torch_backend._causal(PROMPT, PROMPT, torch.device("cpu")))

# %% tags=["hide-input"]
figure, axes = canvas(8, 4, columns=2, sharey=True)
for axis, title, lengths in (
    (axes[0], "whole", [PROMPT]),
    (axes[1], f"in chunks of {PART}", [len(piece) for piece in pieces]),
):
    end = 0
    for i, length in enumerate(lengths):
        colour = (BLUE, ORANGE, GREEN, PURPLE)[i % 4]
        end += length
        axis.broken_barh([(0, end)], (end - length, length), color=colour, alpha=0.18, linewidth=0)
        edges, seen = range(end - length, end + 1), [*range(end - length + 1, end + 1), end]
        axis.fill_betweenx(edges, seen, step="post", color=colour, alpha=0.8, linewidth=0)
        label = {"ha": "left", "va": "center", "color": colour}
        axis.text(end + 0.7, end - length / 2, f"step {i + 1}", **label)
    axis.set_title(title)
    axis.set_xlabel("position attended to")
    axis.set_xlim(0, PROMPT + 6)
    axis.set_ylim(PROMPT, 0)
    axis.set_xticks(range(0, PROMPT + 1, PART))
    axis.set_yticks(range(0, PROMPT + 1, PART))
axes[0].set_ylabel("position that attends")
computed = sum((i + 1) * PART * len(piece) for i, piece in enumerate(pieces[:-1])) + PROMPT * len(pieces[-1])
publish(
    figure,
    "A causal mask as one triangle in a square, and the same triangle cut into rectangles by chunks",
    f"A prompt of {PROMPT} tokens. Full colour is what attention needs; pale is what a rectangle holds "
    f"besides. Whole: {PROMPT**2:,} pairs, in chunks: {computed:,}.",
)

# %% [markdown]
# The rectangles explain a number below. The `torch` backend computes all of a rectangle and then hides the
# masked part, so on this machine chunks *save* work: the pale area shrinks. The GPU's kernels skip masked
# tiles, whole or not. There, chunks cost a little, since each reads again the keys of all chunks before it.
#
# Now the assertion, in float64. A prompt is read whole, then in chunks that do not care where pages end. Both
# caches must hold the same keys:


# %%
def keys_of(engine):
    """Keys [layers, positions, KV heads, head_dim] of the only request, once its prompt is read."""
    engine.add(Request("probe", text[:100], SamplingParams(max_tokens=2, ignore_eos=True)))
    steps = 1
    while not engine.step():
        steps += 1
    keys = engine._runner._attention._cache.keys[:, engine._table.running[0].pages]
    return keys.flatten(1, 2)[:, :100], steps


(whole, once), (parts, many) = keys_of(make(UNLIMITED, dtype="float64")), keys_of(make(23, dtype="float64"))
torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
print(f"{once} step and {many} steps; the keys differ by at most {float((whole - parts).abs().max()):.0e}")

# %% [markdown]
# ## Before and after
#
# Now the load of the beginning, on a clock. Four requests are being answered. Then a prompt of 1,500 tokens
# arrives, and right behind it a short question. Stage 3's engine serves them, then stage 4's with a budget
# of 128. The loop writes down when each step began and ended, and what each request did in it:

# %%
LONG, ANSWER, ARRIVES = 1500, 76, 12
QUESTIONS = ["What is a page?", "What is a token?", "What is a batch?", "What is a KV cache?"]


@dataclass
class Run:
    """What happened: steps as (start, end, states), and each request's tokens and when they came."""

    steps: list = field(default_factory=list)
    tokens: dict = field(default_factory=dict)
    times: dict = field(default_factory=dict)
    arrival: float = 0.0  # of the long prompt


def question(name, content, most):
    prompt = tokenizer.chat([{"role": "user", "content": content}])
    return Request(name, prompt, SamplingParams(max_tokens=most, ignore_eos=True), seed=len(content))


readers = [question(f"reader {i + 1}", content, ANSWER) for i, content in enumerate(QUESTIONS)]
long = Request("long prompt", text[:LONG], SamplingParams(max_tokens=20, ignore_eos=True), seed=9)
short = question("short question", "What is preemption?", 20)


def what_they_do(table, batch):
    states = {s.request.id: "waiting" for s in table.waiting}
    for s in table.running:
        states[s.request.id] = "waiting" if s.length - s.scheduled > 1 else "stalled"
    for i, row in enumerate(batch.rows):
        states[row.sequence.request.id] = "decode" if i < batch.num_decode else "prefill"
    return states


def serve(engine, late):
    """Answer the readers; after some steps the requests in `late` arrive."""
    run, schedule = Run(), engine._scheduler.schedule
    for request in readers:
        engine.add(request)

    def watched():
        batch = schedule()
        states.append(what_they_do(engine._table, batch))
        return batch

    engine._scheduler.schedule, states = watched, []
    while engine.has_work:
        start = time.perf_counter()
        if len(run.steps) == ARRIVES:
            run.arrival = start
            for request in late:
                engine.add(request)
        outputs = engine.step()
        end = time.perf_counter()
        run.steps.append((start, end, states[-1]))
        for output in outputs:
            run.tokens.setdefault(output.request_id, []).append(output.token_id)
            run.times.setdefault(output.request_id, []).append(end)
    return run


BUDGET = 128
before, after = (serve(make(budget), [long, short]) for budget in (UNLIMITED, BUDGET))
exact = [serve(make(budget, dtype="float64"), [long, short]).tokens for budget in (UNLIMITED, BUDGET)]
assert exact[0] == exact[1], "chunks must not change a token"
print(f"{sum(map(len, exact[0].values()))} tokens in float64, the same from both stages")

# %% tags=["hide-input"]
LOOKS = {"prefill": (ORANGE, 1.0), "decode": (BLUE, 1.0), "stalled": (BLUE, 0.25), "waiting": (GREY, 0.4)}
NAMES = [request.id for request in (*readers, long, short)]


def draw_run(axis, run):
    """A request in each line; a bar is what it did in one step, as wide as the step took."""
    for state, (colour, alpha) in LOOKS.items():
        for line, name in enumerate(NAMES):
            spans = [
                (1000 * (start - run.arrival), 1000 * (end - start) - (0 if state == "stalled" else 2))
                for start, end, states in run.steps
                if states.get(name) == state
            ]
            axis.broken_barh(spans, (line - 0.36, 0.72), color=colour, alpha=alpha, linewidth=0)
    axis.axvline(0, color=RED, linewidth=1)
    axis.set_yticks(range(len(NAMES)), NAMES)
    axis.set_ylim(len(NAMES) - 0.5, -0.5)
    axis.tick_params(axis="y", left=False)
    axis.spines["left"].set_visible(False)


figure, axes = canvas(8, 5.2, rows=2, sharex=True)
titles = "Stage 3: whole prompts first", f"Stage 4: a budget of {BUDGET} tokens a step"
for axis, title, run in zip(axes, titles, (before, after), strict=True):
    draw_run(axis, run)
    axis.set_title(title)
ends = [1000 * (run.steps[-1][1] - run.arrival) for run in (before, after)]
axes[1].set_xlim(1000 * (min(r.steps[0][0] - r.arrival for r in (before, after))), max(ends))
axes[1].set_xlabel("milliseconds since the long prompt arrived")
for state, (colour, alpha) in LOOKS.items():
    axes[0].bar(0, 0, color=colour, alpha=alpha, label={"stalled": "stalled by a prefill"}.get(state, state))
figure.legend(loc="outside upper center", ncols=4, handlelength=1.2)
publish(
    figure,
    "Two timelines: four answers stop while a long prompt is read, and four go on beside its chunks",
    "The same requests in both stages. A bar is a step, as wide as it took; the red line is where the two "
    "prompts arrive.",
)

# %% [markdown]
# Above, one step stops all four. Below, they slow down while the chunks run beside them, but none stands
# still. The short question shows what a budget does not do. It is behind the long prompt in the queue, and
# no prompt overtakes another, so it waits until the last chunk leaves room. One could let it pass. But then
# something must keep a long prompt from being passed for ever. Exercise 4 is about that.
#
# ## How large a budget
#
# One number to choose. We serve the same readers and the same long prompt with several budgets, and look at
# the gaps between a reader's tokens: at their median (p50), at the 99th percentile (p99), and at the longest.
# They are counted over the 60 tokens that each reader gets next after the prompt's arrival. (The four share
# their steps, so one long step makes four long gaps, and p99 finds it.)

# %%
GAPS = 60
BUDGETS = [32, 64, 128, 256, 1024, UNLIMITED]


def gaps_of(run):
    """Milliseconds between the readers' tokens, from the long prompt's arrival on."""
    gaps = []
    for reader in readers:
        times = run.times[reader.id][ARRIVES - 1 :][: GAPS + 1]
        gaps += [1000 * (b - a) for a, b in pairwise(times)]
    return gaps


def took(run):
    return run.steps[-1][1] - run.arrival


runs = {budget: min((serve(make(budget), [long]) for _ in range(2)), key=took) for budget in BUDGETS}
summary = {
    budget: {
        "steps": sum(states.get(long.id) == "prefill" for _, _, states in run.steps),
        "gaps": np.percentile(gaps_of(run), [50, 99, 100]).tolist(),
        "first": 1000 * (run.times[long.id][0] - run.arrival),
        "rate": sum(t > run.arrival for times in run.times.values() for t in times) / took(run),
    }
    for budget, run in runs.items()
}


# %% tags=["hide-input"]
def name_of(budget):
    return "unlimited (stage 3)" if budget is UNLIMITED else f"{budget:,}"


table(
    [
        "budget",
        "chunks",
        "gap p50, ms",
        "p99",
        "longest",
        "first token of the long prompt, ms",
        "output tokens/s",
    ],
    [
        (
            name_of(budget),
            s["steps"],
            *(f"{gap:.0f}" for gap in s["gaps"]),
            f"{s['first']:.0f}",
            f"{s['rate']:.0f}",
        )
        for budget, s in summary.items()
    ],
    "lrrrrrr",
)
table(["measured on", ""], [*machine(), ("model", "built-in, float32"), ("command", code("make docs"))])

# %% tags=["hide-input"]
figure, axis = canvas(8, 3.3)
places = range(len(BUDGETS))
for values, colour, label in (
    ([s["first"] for s in summary.values()], ORANGE, "first token of the long prompt"),
    ([s["gaps"][2] for s in summary.values()], BLUE, "longest gap of a reader"),
):
    axis.plot(places, values, color=colour, marker="o", markersize=5, label=label)
axis.set_xticks(places, ["unlimited" if budget is UNLIMITED else f"{budget:,}" for budget in BUDGETS])
axis.set_ylim(0, None)
axis.set_xlabel("budget, tokens a step")
axis.set_ylabel("milliseconds")
axis.legend(loc="upper center")
publish(
    figure,
    "The longest gap grows with the budget; the long prompt's first token is late with the smallest budgets",
    "Two users, two wishes: the readers want a small budget, the sender of the long prompt wants one that is "
    "not too small.",
)

# %% [markdown]
# The longest gap is a step that fills the budget, so it falls with the budget, until what a step costs anyway
# is most of it. What a small budget takes in return is the time of whoever sent the prompt: more steps, each
# with its fixed price, each with the readers' rows in it. (Towards the largest budgets the first token comes
# later again. That is the pale area of the `torch` backend, and no law.) The output tokens per second,
# over all five until the last one is done, say the same: too small a budget wastes steps.
#
# So the rule is: take the smallest budget that still keeps the device busy. A GPU needs far more tokens than
# this CPU until its arithmetic is the limit, so its budget is larger. We come to that.
#
# ## Memory
#
# The second thing that a budget bounds. Inside a step, everything has a row for each of its `T` tokens: the
# residual stream is `[T, H]`, and the widest tensor is the MLP's product of gate and up, `[T, 2·I]`.
# With whole prompts, `T` is as long as the longest prompt, and its memory must be set aside beforehand, or
# the server fails on the day when someone sends it. For Qwen3-0.6B and a prompt of 128,000 tokens:

# %%
BYTES, T = 2, 128_000  # bfloat16
BUDGET_THERE = next(f.default for f in fields(EngineConfig) if f.name == "prefill_budget")
table(
    ["tensor", "of the whole prompt", f"of {BUDGET_THERE:,} tokens"],
    [
        (name, *(f"{tokens * width * BYTES / 2**20:,.0f} MiB" for tokens in (T, BUDGET_THERE)))
        for name, width in (
            ("gate and up, [T, 2·I]", 2 * 3072),
            ("logits, if all rows had them, [T, V]", 151_936),
        )
    ],
    "lrr",
)

# %% [markdown]
# The second line is why `launch` picks the rows that sample *before* it multiplies by the head.
#
# We can measure it. PyTorch's profiler records each allocation. We read prompts of several lengths, whole and
# with a budget of 128, and take the peak of what was allocated at once during a step. The `torch` backend
# writes all scores of attention to memory, which the GPU's kernels never do. So we measure twice: all of it,
# and without the inside of attention.


# %%
def peak_bytes(step):
    """The most bytes that were allocated at once, above what was there before the step."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as record:
        step()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(np.cumsum(sizes))  # what is freed has a negative size


def peak_of_prompt(length, budget, scores):
    engine = make(budget)
    if not scores:
        engine._runner._attention._prefill.attend = lambda layer, q: torch.empty_like(q)
    engine.add(Request("probe", text[:length], SamplingParams(max_tokens=1)))
    peak = 0
    while engine.has_work:
        peak = max(peak, peak_bytes(engine.step))
    return peak


LENGTHS = [128, 500, 1000, 1500, 2000]
peaks = {
    (budget, scores): [peak_of_prompt(n, budget, scores) for n in LENGTHS]
    for budget in (UNLIMITED, BUDGET)
    for scores in (True, False)
}

# %% tags=["hide-input"]
figure, axes = canvas(8, 3.4, columns=2)
for axis, scores, title in zip(axes, (False, True), ("without attention's inside", "all of it"), strict=True):
    for budget, colour in ((UNLIMITED, ORANGE), (BUDGET, BLUE)):
        values = [peak / 2**20 for peak in peaks[budget, scores]]
        axis.plot(LENGTHS, values, color=colour, marker="o", markersize=4)
        label = "whole" if budget is UNLIMITED else f"budget {budget}"
        place = {"xytext": (-8, 8), "textcoords": "offset points", "ha": "right"}
        axis.annotate(label, (LENGTHS[-1], values[-1]), color=colour, **place)
    axis.set_title(title)
    axis.set_xlabel("tokens of the prompt")
    axis.set_xlim(0, None)
    axis.set_ylim(0, 1.12 * max(peak / 2**20 for peak in peaks[UNLIMITED, scores]))
axes[0].set_ylabel("peak of a step, MiB")
publish(
    figure,
    "Peak memory grows with the prompt where it is read whole and stays flat with a budget",
    f"Peak memory of a step's activations while a prompt is read. At {LENGTHS[-1]:,} tokens, a whole "
    f"one takes {peaks[UNLIMITED, False][-1] / peaks[BUDGET, False][-1]:.0f} times as much as its chunks "
    f"on the left, and {peaks[UNLIMITED, True][-1] / peaks[BUDGET, True][-1]:.0f} times on the right.",
)

# %% [markdown]
# On the left, the line of whole prompts is straight, and that of chunks is flat: the peak depends on the
# budget alone. On the right, the scores are added. Whole, they are as many as the prompt is
# long, squared; in chunks, the budget times the length, so a slope is left. A kernel that works by tiles has
# none.
#
# What is not set aside for activations can be pages. `build` measures the largest step before it sizes the
# cache, as lesson 2 said; with a budget this step is known, and it is small. What grows with a prompt is now
# only its keys and values, and these it has in any case.
#
# ## Chunks and the tree
#
# `_add_chunk` calls `share` after each chunk. So the full pages of a prompt that is half read are in the tree
# already, under the rule of lesson 3: whoever finds them runs in the same batch or later. So an abort in
# mid-prompt loses less than a page of what was computed. Two requests with the same beginning; the first
# goes away during its second step:


# %%
def serve_two(budget, abort):
    engine = make(budget, dtype="float64", max_rows=2)
    for i, name in enumerate(("first", "second")):
        prompt = [*text[:90], *tokenizer.encode(f" {name}")]
        engine.add(Request(name, prompt, SamplingParams(max_tokens=8, ignore_eos=True), seed=i))
    table, steps, tokens = engine._table, [], {"first": [], "second": []}
    while engine.has_work:
        batch = engine._scheduler.schedule()
        pending = engine._runner.launch(batch)
        if abort and len(steps) == 1:
            engine.abort("first")
        for output in table.commit(batch, pending.wait()):
            tokens[output.request_id].append(output.token_id)
        steps.append((batch, engine.statistics))
    return steps, tokens


_, expected = serve_two(UNLIMITED, abort=False)
stays, tokens = serve_two(32, abort=False)
assert tokens == expected
leaves, tokens = serve_two(32, abort=True)
assert tokens == {"first": [], "second": expected["second"]}

for title, steps in (("nobody leaves", stays), ("“first” leaves in step 2", leaves)):
    prefills = [
        (i, batch, s) for i, (batch, s) in enumerate(steps, start=1) if len(batch.rows) > batch.num_decode
    ]
    table(
        ["step", title, "tokens", "pages in the tree"],
        [
            (i, "; ".join(filter(None, rows_of(batch))), sum(r.length for r in batch.rows), s.cached_pages)
            for i, batch, s in prefills
        ],
        "rlrr",
    )

# %% [markdown]
# In the first table “second” is admitted beside the last chunk of “first”, and finds all full pages, some
# of which this same batch is about to fill. In the second table it starts where “first” was when it
# left. The pages were nobody's then, and in the tree; the tokens of “second” are the same as ever.
#
# ## On a GPU
#
# The same with the shape of Qwen3-0.6B and random weights. Requests are being answered when a long prompt
# arrives. Here only the time until its first token is counted, in gaps and in output tokens per second. So
# where it is read whole, there is one gap for everyone, and hardly a token:

# %% tags=["hide-input"]
measured = json.loads((ROOT / "benchmarks/results/stage4-h200.json").read_text())


def results(words):
    """The results of a workload, by budget; unlimited comes last."""
    found = [r for r in measured["results"] if words in r["workload"]]
    return sorted(found, key=lambda r: (r["budget"] is None, r["budget"] or 0, r.get("prompt_tokens", 0)))


meets = results("meets")
if meets:
    print(meets[0]["workload"])
table(
    ["budget", "gap p50, ms", "p99", "longest", "first token of the long prompt, s", "output tokens/s"],
    [
        (
            name_of(r["budget"]),
            *(f"{r['gap_ms'][key]:.1f}" for key in ("p50", "p99", "max")),
            f"{r['first_token_seconds']:.2f}",
            f"{r['tokens_per_second']:,.0f}",
        )
        for r in meets
    ],
    "lrrrrr",
)
by_budget = {r["budget"]: r for r in meets}
if {UNLIMITED, BUDGET_THERE} <= by_budget.keys():
    theirs, ours = by_budget[UNLIMITED], by_budget[BUDGET_THERE]
    gap = ours["gap_ms"]["max"] / theirs["gap_ms"]["max"]
    wait = ours["first_token_seconds"] / theirs["first_token_seconds"]
    print(f"{BUDGET_THERE:,} tokens against whole prompts:")
    print(f"the longest gap is {gap:.2f} times as long, the wait for the first token {wait:.2f} times")

# %% [markdown]
# Then the peak of memory, above weights and cache, while one prompt is read:

# %% tags=["hide-input"]
memory = {}
for r in results("peak memory"):
    memory.setdefault(r["budget"], []).append((r["prompt_tokens"], r["peak_bytes"] / 2**30))
figure, axis = canvas(8, 3.2)
hues = iter((BLUE, GREEN, PURPLE, TEAL))
for budget, points in memory.items():
    colour = ORANGE if budget is UNLIMITED else next(hues, GREY)
    axis.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=5)
    label = "whole" if budget is UNLIMITED else f"budget {budget:,}"
    place = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center"}
    axis.annotate(label, points[-1], color=colour, **place)
lengths = sorted({n for points in memory.values() for n, _ in points})
axis.set_xlabel("tokens of the prompt")
axis.set_ylabel("peak of a step, GiB")
axis.set_xlim(0, 1.1 * max(lengths, default=1))
axis.set_ylim(0, 1.2 * max((peak for points in memory.values() for _, peak in points), default=1))
axis.xaxis.set_major_formatter(lambda n, _: f"{n:,.0f}")
publish(
    figure,
    "Peak activation memory on a GPU over the length of the prompt, whole and with a budget",
    "Peak memory of activations on the GPU while a prompt is read.",
)

# %% [markdown]
# And what a budget costs when nobody minds gaps, and only throughput counts. This is how the default was
# chosen:

# %% tags=["hide-input"]
offline = results("offline")
best = max((r["tokens_per_second"] for r in offline), default=1)
table(
    ["budget", "tokens/s", "of the best"],
    [
        (
            name_of(r["budget"]) + (" (default)" if r["budget"] == BUDGET_THERE else ""),
            f"{r['tokens_per_second']:,.0f}",
            f"{r['tokens_per_second'] / best:.1%}",
        )
        for r in offline
    ],
    "lrr",
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
# ## What stage 5 will do about the rest
#
# Long steps are tamed. What about the short ones? Between two prompts, an engine does nothing but decode.
# Here is one such step, part by part, for 1 and for 8 requests. *Upload* packs the batch, *launch* calls
# every operation of the model, *wait* fetches the tokens.
#
# On this machine the device is the CPU itself, so *launch* also holds the arithmetic. To tell the two apart,
# the step runs a second time with a model of as many layers and operations, in which every matrix is
# tiny. What is left then is the price of asking:


# %%
def tiny_engine(hidden=16):
    """The built-in model's operations on hardly any numbers."""
    config = EngineConfig(model=str(PATH), device="cpu", num_pages=512, page_size=PAGE, max_rows=8)
    loaded = load(config)
    shape = replace(loaded.model.config, hidden_size=hidden, intermediate_size=hidden, head_dim=hidden)
    heads = shape.num_heads + 2 * shape.num_kv_heads

    def layer(i):
        one, norm = torch.ones(hidden), torch.randn
        o = norm(hidden, shape.num_heads * hidden)
        qkv, gate_up, down = norm(heads * hidden, hidden), norm(2 * hidden, hidden), norm(hidden, hidden)
        return Layer(i, one, qkv, None, one, one, o, one, gate_up, down)

    weights = torch.randn(shape.vocab_size, hidden)
    layers = tuple(map(layer, range(shape.num_layers)))
    model = Transformer(shape, Ops(), weights, layers, torch.ones(hidden), weights)
    requests = RequestTable(loaded.limits, config.num_pages, PAGE, config.max_rows, RadixPrefixCache(PAGE))
    runner = make_runner(config, replace(loaded, model=model), config.num_pages)
    return PagedEngine(requests, ChunkedScheduler(requests, 2048), runner)


def parts_of_a_step(engine, steps=60):
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


PARTS = {"schedule": PURPLE, "upload": GREEN, "launch": BLUE, "wait": GREY, "commit": RED}
parts = {
    (model, readers): parts_of_a_step(with_readers(make_engine(), readers))
    for readers in (1, 8)
    for model, make_engine in (("built-in", lambda: make(2048)), ("tiny", tiny_engine))
}

# %% tags=["hide-input"]
figure, axis = canvas(8, 2.6)
labels = [f"{n} request{'s' * (n > 1)}, {model}" for model, n in parts]
for line, times in enumerate(parts.values()):
    left = 0
    for colour, width in zip(PARTS.values(), times, strict=True):
        axis.broken_barh([(left, width)], (line - 0.34, 0.68), color=colour, linewidth=0)
        left += width
for part, colour in PARTS.items():
    axis.bar(0, 0, color=colour, label=part)
axis.set_yticks(range(len(parts)), labels)
axis.set_ylim(len(parts) - 0.5, -0.5)
axis.set_xlabel("milliseconds since the step began")
axis.tick_params(axis="y", left=False)
axis.spines["left"].set_visible(False)
figure.legend(loc="outside upper center", ncols=5, handlelength=1.2)
publish(
    figure,
    "One decode step as a bar of its parts: launch is most of it, even where there is nothing to compute",
    "One decode step, from left to right. In the tiny model there is next to nothing to compute.",
)
table(
    ["step", *(f"{part}, ms" for part in PARTS), "sum"],
    [
        (label, *(f"{t:.2f}" for t in times), f"{sum(times):.2f}")
        for label, times in zip(labels, parts.values(), strict=True)
    ],
    "l" + "r" * 6,
)

# %% tags=["hide-input"]
model = load(EngineConfig(model=str(PATH), device="cpu")).model
tensors = [model.embedding, model.norm, *(t for layer in model.layers for t in vars(layer).values())]
size = sum(t.numel() for t in tensors if isinstance(t, torch.Tensor))
asking, share = sum(parts["tiny", 1]), sum(parts["tiny", 1]) / sum(parts["built-in", 1])
reading = 1000 * 2 * size / 4.3e12  # in bfloat16, at the speed of a copy on an H200
print(f"to ask for one step takes {asking:.1f} ms, {share:.0%} of the whole step on this CPU")
print(f"to read all {size / 1e6:.1f} million weights once takes an H200 {reading:.4f} ms")

# %% [markdown]
# Read the tiny bars as what Python and PyTorch need for a step, whatever the device does. (With 8 requests it
# is more, since the `torch` backend goes row by row.) On a CPU it adds to the arithmetic. A GPU does the
# arithmetic in a small part of that time, so it waits for the rest: while a step is scheduled, packed and
# committed it has nothing at all, and during *launch* it is done with each operation before the next one
# comes. Chunks hide this, since a full budget keeps a GPU busy for longer than Python
# needs. But a long answer is hundreds of decode steps, and a prompt only a few chunks.
#
# Stage 5 attacks both halves. *Launch* becomes one call, by recording a decode step once as a CUDA graph. And
# the rest moves beside the device's work: the next batch is scheduled and packed while this one runs.
#
# ## Exercises
#
# Stubs are in `docs/exercises/stage4.py`; `python -m docs.exercises.stage4` in the repository's root checks
# what you filled in.
#
# 1. **Foresee it.** Given what everyone has left to compute, say which rows the next step has.
# 2. **Attend from the middle.** Compute attention of a chunk whose past lies in a cache. Put together, the
#    chunks must give what the whole prompt gives.
# 3. **Choose it.** Given what a step costs, find the largest budget with which no step of a long prompt takes
#    longer than a limit. Which step is the longest?
# 4. **Let the short one pass.** Write a `ShortestFirst` scheduler, which spends the budget on whoever has
#    least left of a prompt. The checker says how long short prompts wait. Who pays? And what if short ones
#    never stop coming?
#
# ## What to read next
#
# - `stages/stage4_chunked/scheduler.py`: you have seen nearly all of it. `_left` is the rest.
# - `tests/stage4/test_scheduler.py`: what must be true of every batch, whatever arrives, leaves or is
#   preempted in the middle of a prompt.
# - `stages/stage2_paged/assembly.py`: `_run_largest_steps`, which takes the scheduler as an argument. Now you
#   know why.
# - The [glossary](../glossary.md) has the new words.
#
# [^sarathi]: A. Agrawal et al., *Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve*,
#     OSDI 2024.
