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
# # A prefix, once
#
# [Lesson 2](2-paged.md) ended with four users who sent the same 512 tokens. Each of them paid the full price,
# and the pages of all four held the same keys. This is no rare case. A service puts one system prompt before
# everything that its users write, and a chat sends its whole history again with every turn. Much of what such
# an engine is asked to compute, it has computed before, for someone else or a minute ago.
#
# Stage 3 keeps the pages of what was computed, finds them again by their tokens, and lets everyone use them
# at once. The model does not notice, and neither do the kernels. What it swaps in is one data structure:
# plain Python, without a tensor in it.

# %% tags=["hide-input"]
import difflib
import inspect
import json
import random
import time
from array import array
from dataclasses import dataclass
from statistics import median

import torch

from docs.lesson import BLUE, GREY, ORANGE, RED, ROOT, canvas, code, machine, publish, show, table
from minisgl.builtin import PATH
from stages import interface
from stages.interface import Request, SamplingParams
from stages.stage1_naive import engine as stage1
from stages.stage1_naive.limits import Limits
from stages.stage1_naive.tokenizer import Tokenizer
from stages.stage2_paged import engine as stage2
from stages.stage2_paged.prefix_cache import NoPrefixCache, PrefixCache
from stages.stage2_paged.request_table import RequestTable
from stages.stage2_paged.scheduler import Scheduler
from stages.stage3_radix import engine as stage3
from stages.stage3_radix.engine import EngineConfig
from stages.stage3_radix.prefix_cache import RadixPrefixCache
from stages.stage3_radix.radix_tree import Node, RadixTree

torch.set_num_threads(1)  # several wait for each other whenever another program takes a core

# %% [markdown]
# ## What can be shared
#
# Because of the causal mask, what a position computes depends on its own token and on those before it, and on
# nothing else. Hence two sequences that *begin* with the same tokens have the same keys and values as far as
# they agree. Hence also the limit: the same words after another beginning are something else.
#
# We can look. Three requests run in stage 2's engine: two with the same beginning, and one in which the same
# 16 tokens come after 16 others. How far apart are the values (V) of these 16, layer by layer?

# %%
PAGE = 16
tokenizer = Tokenizer(PATH)
SYSTEM = (
    "You answer questions about LLM serving. Explain things in simple words and keep answers short. "
    "You are an expert."
)


def chat(*turns):
    """Token ids of a chat: the system prompt, then questions and answers in turn."""
    roles = ["system", *("user", "assistant") * len(turns)]
    return tokenizer.chat([{"role": r, "content": t} for r, t in zip(roles, (SYSTEM, *turns), strict=False)])


def small_engine(stage, **config):
    return stage.build(EngineConfig(model=str(PATH), device="cpu", page_size=PAGE, max_rows=8, **config))


one, other = chat("What is a page?"), chat("Why is the first engine so slow?")
assert one[:PAGE] == other[:PAGE]
engine = small_engine(stage2, num_pages=64)
for name, prompt in (("one", one), ("other", other), ("later", other[-PAGE:] + one)):
    engine.add(Request(name, prompt, SamplingParams(max_tokens=2, ignore_eos=True)))
engine.step()

values = engine._runner._attention._cache.values  # [layers, pages, page_size, KV heads, head_dim]
first, same, moved = (
    values[:, s.pages[page]] for s, page in zip(engine._table.running, (0, 0, 1), strict=True)
)
apart = [
    (layer + 1, *(f"{float((v[layer] - first[layer]).abs().max()):.6f}" for v in (same, moved)))
    for layer in range(len(first))
]
table(["layer", "same beginning", "same 16 tokens, later"], apart, "rrr")
torch.testing.assert_close(same, first)

# %% [markdown]
# In the first layer a value is made from its own token alone. From the second layer on it has seen what came
# before, and no longer fits anywhere else. (A key is turned by its position, so it would not fit even in the
# first.) Only a **prefix** can be shared, and what identifies it is *all* of its tokens. A shared prefix is
# not an approximation: the numbers are those that would be computed anyway. (On a GPU, a kernel that is given
# less of a prompt may round the rest a little differently. Nothing else changes.)
#
# Two more limits come with pages:
#
# - **Whole pages.** A page has one writer. If two sequences shared a half-filled one, both would go on to
#   write into its second half. So what is shared ends where a page ends, and the rest, less than a page, is
#   computed again.
# - **One token is left.** Keys and values do not say what comes next: the logits of the last position do.
#   So even if all of a prompt is known, at least its last token has to be computed.
#
# The second is a slice in stage 2's `RequestTable`, which has asked its prefix cache all along:

# %% tags=["hide-input"]
show(RequestTable.match)

# %% [markdown]
# ## A tree of pages
#
# We need a structure that is asked with a thousand tokens and answers with the pages of the longest known
# prefix. A **radix tree** does this. It is a trie, in which sequences with a common beginning share a path
# from the root, but an edge carries a whole run of tokens instead of one. As a cache of keys and values it
# was introduced by SGLang under the name RadixAttention[^radix]. Here an edge holds whole pages:

# %% tags=["hide-input"]
show(Node)

# %% [markdown]
# The children of a node differ in their first page, so the tokens of one page are the key to the right
# child. To **match** is to walk down from the root. Each edge is compared with a slice of the prompt; where
# they part in the middle of an edge, that edge is split:

# %% tags=["hide-input"]
show(RadixTree.match)
show(RadixTree._split)

# %% [markdown]
# **Why does a question change the tree?** The answer is pages *and a node*, and someone is about to use
# these pages and no others. After the split there is a node that stands for exactly them, and a lock on this
# node will protect what is used and leave the rest of the old edge free to go.
#
# To **insert** is to match, and to hang what is new below the place where that ended:

# %% tags=["hide-input"]
show(RadixTree.insert)

# %% [markdown]
# Two requests may have computed the same page, each into its own. Then the tree keeps the one that it has,
# and the caller keeps (and later frees) the duplicate.
#
# The cost of both is that of comparing and hashing the tokens that were given. What else the tree holds
# does not matter: at each node, one lookup in a dictionary picks one child among any number.
#
# The rest is assembly. Stage 2 drew a border around what it did not have yet:

# %% tags=["hide-input"]
show(PrefixCache)

# %% [markdown]
# `RadixPrefixCache` fills it with the tree. This is all that changes in `build`:

# %%
sources = (inspect.getsource(stage.build).splitlines() for stage in (stage2, stage3))
changes = list(difflib.unified_diff(*sources, "stage 2's build", "stage 3's build", lineterm="", n=0))
print("\n".join(line for line in changes if not line.startswith("@@")))

# %% [markdown]
# ## The tree of a running engine
#
# Three users talk to the built-in model: Ana first; then Ben and Cleo, who arrive together; then Ana again.
# The figure reads the tree from inside the engine at three moments.


# %%
@dataclass
class Strip:
    """A node as the figure draws it, or the pages that a running request has to itself."""

    start: int  # in pages from the beginning of the sequence
    pages: list[int]
    parent: int | None  # row of the strip above
    locks: int
    used: int
    text: str
    owner: str | None = None


def snapshot(engine):
    """The engine's tree as it is now: parents before children, in the order in which they came."""
    strips = []

    def walk(node, start, parent):
        row, start = len(strips), start + len(node.pages)
        if node.parent is not None:
            text = tokenizer.decode(node.tokens).replace("\n", " ⏎ ")
            strips.append(
                Strip(start - len(node.pages), list(node.pages), parent, node.locks, node.last_used, text)
            )
            parent = row
        for s in engine._table.running:
            if s.prefix.node is node and len(s.pages) > start:
                strips.append(Strip(start, s.pages[start:], parent, 0, 0, "", s.request.id))
        for child in node.children.values():
            walk(child, start, parent)

    walk(engine._table._cache.tree.root, 0, None)
    return strips


answers = {}


def ask(engine, name, *turns):
    engine.add(Request(name, chat(*turns), SamplingParams(temperature=0, max_tokens=40)))
    answers[name] = []


def work(engine, steps=1000):
    while engine.has_work and steps:
        steps -= 1
        for output in engine.step():
            answers[output.request_id].append(output.token_id)


QUESTION = "The cache is cut into pages. What is a page table?"
live = small_engine(stage3, num_pages=20)
moments = {}

ask(live, "Ana", QUESTION)
work(live)
moments["After Ana's first turn, nobody runs"] = snapshot(live)

ask(live, "Ben", "What is a radix tree?")
ask(live, "Cleo", "What is a token?")
work(live, steps=12)
moments["Ben and Cleo are being answered"] = snapshot(live)

work(live)
ask(live, "Ana again", QUESTION, tokenizer.decode(answers["Ana"]), "What is preemption?")
work(live, steps=8)
moments["They have their answers, Ana is in her second turn"] = snapshot(live)
work(live)


# %% tags=["hide-input"]
def draw_tree(axis, title, strips, note, gone=frozenset()):
    """Each strip on a row of its own: a cell is a page with its number; `gone` ones are crossed out."""
    for row, strip in enumerate(strips):
        colour, strength = (ORANGE, 0.9) if strip.owner else (BLUE, 0.9 if strip.locks else 0.22)
        if strip.parent is not None:
            axis.plot([strip.start] * 2, [strip.parent + 0.36, row + 0.36], color=GREY, linewidth=1)
        for x, page in enumerate(strip.pages, start=strip.start):
            lost = page in gone and not strip.owner
            axis.broken_barh(
                [(x + 0.03, 0.94)],
                (row - 0.36, 0.72),
                color=RED if lost else colour,
                alpha=strength,
                linewidth=0,
            )
            ink = {"color": "white"} if strength > 0.5 else {}
            axis.text(x + 0.5, row, str(page), ha="center", va="center_baseline", fontsize=8, **ink)
            if lost:
                axis.plot([x + 0.15, x + 0.85], [row + 0.28, row - 0.28], color=RED, linewidth=1.5)
        label = (strip.owner and f"of {strip.owner}") or note(strip)
        end = strip.start + len(strip.pages)
        axis.text(end + 0.25, row, label, va="center_baseline", fontsize=8.5)
    axis.set_title(title)
    axis.set_xlim(0, 18)
    axis.set_ylim(len(strips) - 0.4, -0.6)
    axis.set_axis_off()


def shorten(text, most):
    return f"“{text}”" if len(text) <= most else f"“{text[:most].rstrip()} …”"


def locks_and_text(strip):
    locks = f"{strip.locks} lock{'s' * (strip.locks > 1)} · " if strip.locks else ""
    return locks + shorten(strip.text.strip(), 44)


def tree_figure(panels, note, gone=frozenset()):
    heights = [len(strips) for strips in panels.values()]
    size = 0.28 * sum(heights) + 0.4 * len(panels)
    figure, axes = canvas(8, size, rows=len(panels), gridspec_kw={"height_ratios": heights})
    for i, (axis, (title, strips)) in enumerate(zip(axes, panels.items(), strict=True)):
        draw_tree(axis, title, strips, note, gone if i == 0 else frozenset())
    return figure


figure = tree_figure(moments, locks_and_text)
for colour, strength, label in (
    (BLUE, 0.22, "in the tree, at rest"),
    (BLUE, 0.9, "in the tree, locked"),
    (ORANGE, 0.9, "a running request's own"),
):
    figure.axes[0].bar(0, 0, color=colour, alpha=strength, label=label)
figure.legend(loc="outside upper center", ncols=3, handlelength=1.2)
publish(
    figure,
    "Three states of the radix tree: one path, then a path with branches in use, then more branches",
    f"A cell is a page of {PAGE} tokens with its number, a strip is a node, a line leads to its children. "
    "Beside it the text that begins there (without the template's marks). Tree and pages are read from the "
    "engine.",
)

# %% [markdown]
# In the first panel there are two nodes: the pages of the prompt went into the tree as Ana's request began,
# and those of her answer when it ended. Where Ben and Cleo join, her first node was split: the shared
# beginning now stands alone, and has a lock from each of them. Look where it ends: not with the
# system prompt, but where a page does. The tree knows nothing of messages, and what is left over, less than
# a page, each of them computes again.
#
# In the third panel, Ana's second turn holds a lock on every whole page of her first one, **the answer
# included**. Nobody prefilled this answer: its keys and values were stored one by one, as it was written.
# Its last token is the exception. It was sampled and sent, but never put through the model, so it has no
# keys yet. And what a new turn sends must agree with what was cached *in tokens*, not only in text. That
# depends on the template and the tokenizer, and here it does.
#
# ## Locks
#
# A page in the tree belongs to the tree. A request that uses some of them takes a **lock** on the node where
# its prefix ends, and the lock holds for the whole path above it, since a page in use is of no use without
# those before it:

# %% tags=["hide-input"]
show(RadixTree.lock)
show(RadixTree.unlock)

# %% [markdown]
# So `locks` counts the running requests at or below a node. Pages on no locked path are **evictable**: kept
# while there is room, and given up when there is not. An idle engine has no others. They cost nothing, as
# free memory is of no use to anyone. Whoever needs pages asks for them in one place:

# %% tags=["hide-input"]
show(RequestTable.take_pages)

# %% [markdown]
# So to the rest of the engine an evictable page is as good as a free one. No request waits, and none is
# preempted, for the sake of what is only remembered.
#
# ## Eviction
#
# Which page goes first? The one used longest ago (*least recently used*, LRU) is a good guess at the one
# needed last. But only **leaves** may go: a page without those before it could never be found again. And a
# leaf gives its last pages first, for the same reason:

# %% tags=["hide-input"]
show(RadixTree.evict)

# %% [markdown]
# Finding the oldest leaf by walking over the tree would cost more, the more is cached. So leaves wait in a
# heap, ordered by their last use. To take a leaf out when it is used, locked or gets children would need a
# search; instead it is looked at again when its turn comes, and put back or dropped. Recency is a counter and
# not a clock, so that the same requests always make the same tree.
#
# Let us see it happen. The engine above has a small cache, and a new user, Dan, with an unrelated prompt
# needs more pages than are free:

# %%
taken, evict = [], live._table._cache.evict


def watched_evict(count):
    pages = evict(count)
    taken.extend(pages)
    return pages


live._table._cache.evict = watched_evict
before, then = snapshot(live), live.statistics
dan = tokenizer.chat([{"role": "user", "content": "Tell me why GPUs wait, please. " * 16}])
live.add(Request("Dan", dan, SamplingParams(max_tokens=1)))
answers["Dan"] = []
work(live)
after, now = snapshot(live), live.statistics
live._table._cache.evict = evict

table(
    ["", "pages", "free", "cached", "evicted so far"],
    [
        (label, s.pages, s.free_pages, s.cached_pages, s.evicted_pages)
        for label, s in (("before Dan", then), ("after him", now))
    ],
    "lrrrr",
)
print(f"Dan's prompt has {len(dan)} tokens; evicted for it, in this order: {taken}")
assert taken, "the cache should be too small"

# %% tags=["hide-input"]
figure = tree_figure(
    {"Before Dan": before, "After him": after},
    lambda strip: f"used at {strip.used} · {shorten(strip.text.strip(), 38)}",
    frozenset(taken),
)
publish(
    figure,
    "The tree before and after an eviction: the leaves used longest ago lose their pages",
    "The same tree before and after. Red and struck through: what was evicted. “Used at” is the tree's "
    "counter: the smaller, the longer ago.",
)

# %% [markdown]
# The leaf used longest ago goes first, from its end; then its parent, which has become a leaf; then the next.
# What Ana came back to has a higher counter. And the shared system prompt cannot go as long as anything hangs
# below it, which is as it should be: of all pages it is the likeliest to be wanted again.
#
# ## A cache too small
#
# Now with several users at once. Here a cache serves eight requests that cannot all fit. As in lesson 2 it
# runs in float64, so that its tokens can be compared with stage 1's, one by one:


# %%
def tokens_of_stage1(requests):
    """What each of these requests must get."""
    oracle = stage1.build(interface.EngineConfig(model=str(PATH), device="cpu", dtype="float64"))
    tokens = {request.id: [] for request in requests}
    for request in requests:
        oracle.add(request)
    while oracle.has_work:
        for output in oracle.step():
            tokens[output.request_id].append(output.token_id)
    return tokens


questions = [  # when it arrives, how much it may say, and the question
    (0, 40, "What is a KV cache?"),
    (0, 48, "What is a radix tree?"),
    (0, 32, "What is continuous batching?"),
    (4, 32, "What is a token?"),
    (4, 32, "What is preemption?"),
    (48, 16, "What is a system prompt?"),
    (54, 24, "What is LRU eviction?"),
    (76, 8, "What is a KV cache?"),
]
queue = [
    (at, Request(str(i), chat(text), SamplingParams(max_tokens=most), seed=i))
    for i, (at, most, text) in enumerate(questions)
]
expected = tokens_of_stage1([request for _, request in queue])

engine = small_engine(stage3, num_pages=13, dtype="float64")
schedule, cache = engine._scheduler.schedule, engine._table._cache
rows, history, tokens = [], [], {request.id: [] for _, request in queue}


def watched_schedule():
    batch = schedule()
    rows.extend((len(history), row) for row in batch.rows)
    return batch


engine._scheduler.schedule = watched_schedule
while queue or engine.has_work:
    while queue and queue[0][0] <= len(history):
        engine.add(queue.pop(0)[1])
    for output in engine.step() if engine.has_work else ():
        tokens[output.request_id].append(output.token_id)
    history.append((engine.statistics, cache.evictable))

assert tokens == expected, "stage 3 must give stage 1's tokens"
s = engine.statistics
assert s.evicted_pages
assert s.preemptions
print(f"{len(history)} steps, {sum(map(len, tokens.values()))} tokens, the same as stage 1's")
print(f"{s.evicted_pages} pages evicted, {s.preemptions} preemptions, hit rate {s.hit_rate:.0%}")

# %% tags=["hide-input"]
figure, (upper, lower) = canvas(8, 4.4, rows=2, sharex=True, gridspec_kw={"height_ratios": [4, 1]})
steps = [0, *range(1, len(history) + 1)]
layers = [
    ("owned by running requests", ORANGE, 0.9, [s.pages - s.free_pages - s.cached_pages for s, _ in history]),
    ("in the tree, locked", BLUE, 0.9, [s.cached_pages - evictable for s, evictable in history]),
    ("in the tree, evictable", BLUE, 0.25, [evictable for _, evictable in history]),
    ("free", GREY, 0.12, [s.free_pages for s, _ in history]),
]
below = [0] * len(history)
for label, colour, strength, counts in layers:
    upper.stairs(
        [b + c for b, c in zip(below, counts, strict=True)],
        steps,
        baseline=below,
        fill=True,
        color=colour,
        alpha=strength,
        linewidth=0,
        label=label,
    )
    below = [b + c for b, c in zip(below, counts, strict=True)]
assert set(below) == {s.pages}
upper.set_ylim(0, s.pages)
upper.set_ylabel("pages")
evictions, preemptions = (
    [b - a for a, b in zip([0, *counts], counts, strict=False)]
    for counts in ([s.evicted_pages for s, _ in history], [s.preemptions for s, _ in history])
)
lower.bar([i + 0.5 for i in range(len(history))], evictions, width=1, color=RED, linewidth=0)
for i, count in enumerate(preemptions):
    if count:
        lower.annotate("▼", (i + 0.5, max(evictions)), color=RED, ha="center", va="bottom", fontsize=8)
lower.set_ylabel("evicted")
lower.set_ylim(0, max(evictions) + 1)
lower.set_yticks([0, max(evictions)])
lower.set_xlim(0, len(history))
lower.set_xlabel("step")
figure.legend(loc="outside upper center", ncols=4, handlelength=1.2, columnspacing=1.4)
publish(
    figure,
    "Pages over time, stacked: owned, locked, evictable and free; below, when pages were evicted",
    "Whose the pages were after each step. Below, pages evicted in it; a triangle is a preemption.",
)

# %% [markdown]
# At every step the four add up to all pages. While few run, the tree keeps what is over; when they need
# room, the pale part shrinks first, and only when it is gone is anyone preempted.
#
# A preempted request gives its pages to the tree, as a finished one does. When it comes back it may find its
# own prefix there, as far as nobody needed those pages meanwhile. In stage 2 it computed everything again.
# Here are the prefills of those who were preempted:

# %% tags=["hide-input"]
entered = {}
for step, row in rows:
    if row.enters:
        entered.setdefault(row.sequence.request.id, []).append((step, row.start, row.end))
again = {name: times for name, times in entered.items() if len(times) > 1}
assert all(start > 0 for times in again.values() for _, start, _ in times[1:])
assert entered["2"][0][:2] == (0, 2 * PAGE), "the text below says so"
table(
    ["request", "prefilled at step", "tokens", "found", "computed"],
    [
        (name if i == 0 else "", step, end, start, end - start)
        for name, times in again.items()
        for i, (step, start, end) in enumerate(times)
    ],
    "lrrrr",
)

# %% [markdown]
# ## Together
#
# Until now a prefix was found, so it seems, because someone had *finished* computing it. But users who share
# a prompt may arrive in the same instant, and stage 2's scheduler puts them into one batch. Nobody has
# computed anything then. Must each of them pay?
#
# No, and the table above has shown it: three requests began at step 0, and the third of them found two pages.
# The scheduler places one row after the other, and after each it calls `share`:

# %% tags=["hide-input"]
show(Scheduler._prefill)
show(RequestTable.share)

# %% [markdown]
# `scheduled` counts the positions given to batches, not those computed. So a page enters the tree when the
# row that *will* fill it is placed, before the next request is matched. Four requests, 16 tokens in common
# and two of their own, pages of 4; without a model, as scheduling needs none:


# %%
def first_batch(cache):
    requests = RequestTable(Limits(100, 64, frozenset()), 40, 4, 8, cache)
    for i in range(4):
        requests.add(Request(f"user {i}", [*range(16), 30 + i, 40], SamplingParams(max_tokens=4)))
    return Scheduler(requests, 100).schedule()


alone, shared = first_batch(NoPrefixCache()), first_batch(RadixPrefixCache(4))
table(
    ["request", "stage 2 computes", "stage 3 computes"],
    [
        (a.sequence.request.id, f"{a.start} to {a.end - 1}", f"{b.start} to {b.end - 1}")
        for a, b in zip(alone.rows, shared.rows, strict=True)
    ],
    "lrr",
)
for name, batch in (("stage 2", alone), ("stage 3", shared)):
    pages = [row.sequence.pages for row in batch.rows[:2]]
    print(f"{name}: {sum(row.length for row in batch.rows)} positions; pages of the first two:", *pages)

# %% [markdown]
# Three of these requests read pages that are empty as they are scheduled. Why is this safe?
#
# - **Within a batch**, every layer stores the keys and values of *all* rows before any row attends. Lesson 2
#   showed the two lines in `PagedAttention` that do this. When user 1 reads the shared pages in some layer,
#   user 0's keys of that layer are in them.
# - **Between batches**, the rule is this: a batch that `schedule()` returned is always launched, and batches
#   are launched in order. Whoever finds a page in the tree is in the same batch or in a later one than the
#   row that fills it.
#
# The rule covers eviction too. This engine waits for each batch before it makes the next. Stage 5 will not,
# and may give away a page that a batch under way has yet to read; but the new owner writes into it in a later
# batch, so after that read.
#
# And if the request that computes for everyone goes away? An abort may come at the worst moment, with the
# batch launched and its tokens not yet read. The row is computed all the same. Only its token is dropped:

# %%
trio = [
    Request(name, chat(text), SamplingParams(max_tokens=12), seed=i)
    for i, (name, text) in enumerate(
        [("a", "What is a page?"), ("b", "What is a token?"), ("c", "What is a batch?")]
    )
]
expected = tokens_of_stage1(trio[1:])
engine = small_engine(stage3, num_pages=64, dtype="float64")
for request in trio:
    engine.add(request)

batch = engine._scheduler.schedule()
starts = {row.sequence.request.id: row.start for row in batch.rows}
pending = engine._runner.launch(batch)
engine._table.abort("a")
outputs = engine._table.commit(batch, pending.wait())
while engine.has_work:
    outputs += engine.step()

tokens = {name: [o.token_id for o in outputs if o.request_id == name] for name in "abc"}
print("first position computed:", starts)
print("tokens:", {name: len(t) for name, t in tokens.items()})
assert not tokens["a"]
assert all(tokens[name] == expected[name] for name in expected)

# %% [markdown]
# ## What it brings
#
# Lesson 2's four users once more, one after the other. The prompt is the same for all; each asks for two
# tokens, and what is measured is the step that reads the prompt:

# %%
text = tokenizer.chat([{"role": "user", "content": "Why is the first engine so slow?"}]) * 100


def seconds(step):
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def four_users(stage):
    engine = small_engine(stage, num_pages=1024)
    engine.add(Request("warm-up", text[1:65], SamplingParams(max_tokens=1)))  # another beginning
    engine.step()
    times = []
    for i in range(4):
        engine.add(Request(f"user {i}", text[:512], SamplingParams(max_tokens=2, ignore_eos=True)))
        times.append(1000 * seconds(engine.step))
    pages = {page for sequence in engine._table.running for page in sequence.pages}
    return times, len(pages), engine.statistics.hit_rate


(two, pages2, _), (three, pages3, _) = four_users(stage2), four_users(stage3)
table(
    ["user", "stage 2, ms", "stage 3, ms"],
    [(i + 1, f"{a:.1f}", f"{b:.1f}") for i, (a, b) in enumerate(zip(two, three, strict=True))]
    + [("pages of all", pages2, pages3)],
    "lrr",
)

# %% [markdown]
# The first pays, the others compute what is left: the last page, since at least one token must be, and
# positions are found by pages. They save memory as well as time, so more of them fit.
#
# Then a chat of eight turns. What its user feels is the **time to first token**: how long it takes from
# sending a question until the answer begins. Every turn sends the system prompt, all questions and all
# answers before it:

# %%
TALK = [
    *("What is a KV cache?", "What is a page?", "How large is a page?", "What is a radix cache?"),
    *("When is a radix tree node split?", "What is LRU eviction?"),
    *("What is time to first token?", "What is chunked prefill?"),
]


def talk(stage):
    """For each turn: seconds to the first token, how many tokens were cached, the prompt and the answer."""
    engine, turns, measured = small_engine(stage, num_pages=128), [], []
    engine.add(Request("warm-up", text[1:65], SamplingParams(max_tokens=1)))
    engine.step()
    for i, question in enumerate(TALK):
        prompt = chat(*turns, question)
        engine.add(Request(str(i), prompt, SamplingParams(temperature=0, max_tokens=60)))
        answer = []
        first = seconds(lambda out=answer: out.extend(engine.step()))
        while engine.has_work:
            answer += engine.step()
        written = [output.token_id for output in answer]
        measured.append((first, answer[0].cached_tokens, prompt, written))
        turns += [question, tokenizer.decode(written)]
    return measured


talks = {name: [talk(stage) for _ in range(2)] for name, stage in (("stage 2", stage2), ("stage 3", stage3))}
first_token = {
    name: [1000 * min(turn[0] for turn in turns) for turns in zip(*runs, strict=True)]
    for name, runs in talks.items()
}
sizes = [(len(prompt), cached) for _, cached, prompt, _ in talks["stage 3"][0]]
sent, found = (sum(column) for column in zip(*sizes, strict=True))
print(f"{sent:,} prompt tokens were sent in {len(TALK)} turns; stage 3 found {found / sent:.0%} of them")


# %% tags=["hide-input"]
def draw_turns(series, unit, alt, caption):
    figure, axis = canvas(8, 3.2)
    turns = range(1, len(TALK) + 1)
    for (label, values), colour in zip(series.items(), (ORANGE, BLUE), strict=True):
        axis.plot(turns, values, color=colour, marker="o", markersize=5)
        place = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
        axis.annotate(label, (turns[-1], values[-1]), color=colour, **place)
    axis.set_ylim(0, None)
    axis.set_xlim(0.8, len(TALK) + 0.9)
    axis.set_xlabel("turn of the chat")
    axis.set_ylabel(unit)
    publish(figure, alt, caption)


draw_turns(
    first_token,
    "ms to the first token",
    "In stage 2 the time to the first token grows with every turn; in stage 3 it stays nearly flat",
    f"Time to first token in a chat of {len(TALK)} turns with the built-in model, the faster of two runs.",
)
table(
    ["turn", "tokens sent", "found", "stage 2, ms", "stage 3, ms", "ratio"],
    [
        (i + 1, prompt, cached, f"{a:.1f}", f"{b:.1f}", f"{a / b:.1f}")
        for i, ((prompt, cached), a, b) in enumerate(
            zip(sizes, first_token["stage 2"], first_token["stage 3"], strict=True)
        )
    ],
    "rrrrrr",
)

# %% [markdown]
# The column “found” is `TokenOutput.cached_tokens`, which the server reports in each answer's usage. Its sum,
# divided by that of the tokens sent, is the **hit rate**; `engine.statistics` has it. What stage 3 still
# computes is what a turn adds. The history costs it only what attention takes to read it.
#
# Page size is part of this bargain. The same prompts against a tree alone, with the page sizes of
# `--page-size`:

# %%
shares = []
for size in (1, 16, 64, 256):
    tree, found = RadixTree(size), 0
    for _, _, prompt, answer in talks["stage 3"][0]:
        found += size * len(tree.match(prompt[:-1])[0])
        computed = [*prompt, *answer[:-1]]
        full = len(computed) // size
        tree.insert(computed[: full * size], range(full))
    shares.append((size, f"{found:,}", f"{found / sent:.0%}"))
table(["page size", "found", "hit rate"], shares, "rrr")

# %% [markdown]
# Small pages find more, by up to a page for each request. With a page size of 1 nothing is lost; but the
# page tables are longest, and of the kernels some are slower with it.
#
# Last, what the tree itself costs. Prompts of 1,000 random tokens, so that none shares anything, which
# makes the root as wide as it gets. How long does one take to be matched or inserted when so many are there?

# %%
WORDS = list(range(50_000))


def tree_costs(prompts, samples=400):
    """Median microseconds of a match, of an insert, and of an eviction, per page."""
    draw, tree, size = random.Random(0), RadixTree(PAGE), 1000 // PAGE
    stored, inserts, matches, evictions = [], [], [], []
    for i in range(prompts):
        tokens = draw.choices(WORDS, k=1000)
        pages = list(range(i * size, (i + 1) * size))
        inserts.append(seconds(lambda t=tokens, p=pages: tree.insert(t[: size * PAGE], p)))
        stored.append(tokens)
    for tokens in draw.sample(stored, samples):
        equal = array("i", tokens).tolist()  # other objects, as a new request brings them
        matches.append(seconds(lambda t=equal: tree.match(t)))
    for _ in range(samples):
        evictions.append(seconds(lambda: tree.evict(8)) / 8)
    return [1e6 * median(times) for times in (matches, inserts[-samples:], evictions)]


crowds = [500, 1000, 5000]
costs = [tree_costs(n) for n in crowds]
table(
    ["prompts cached", "match, µs", "insert, µs", "evict, µs per page"],
    [(f"{n:,}", *(f"{us:.1f}" for us in line)) for n, line in zip(crowds, costs, strict=True)],
    "rrrr",
)
table(["measured on", ""], [*machine(), ("model", "built-in, float32"), ("command", code("make docs"))])

# %% [markdown]
# Neither walks over what is there, and ten times as many prompts are far from making them ten times as slow.
# What counts is the length of the one prompt that comes in, and the price is paid once for a request, not at
# every step.
#
# ## On a GPU
#
# The same engines with the shape of Qwen3-0.6B and random weights. First many requests with one long shared
# prefix, both as a crowd and in single file:

# %% tags=["hide-input"]
measured = json.loads((ROOT / "benchmarks/results/stage3-h200.json").read_text())
by_workload = {}
for result in measured["results"]:
    by_workload.setdefault(result["workload"], {})[result.get("stage")] = result
talk_name, tree_name = "chat of 8 turns", "radix tree"
table(
    ["workload", "stage 2, tokens/s", "stage 3, tokens/s", "ratio", "hit rate"],
    [
        (
            workload,
            f"{r[2]['tokens_per_second']:,.0f}",
            f"{r[3]['tokens_per_second']:,.0f}",
            f"{r[3]['tokens_per_second'] / r[2]['tokens_per_second']:.1f}",
            f"{r[3]['hit_rate']:.1%}",
        )
        for workload, r in by_workload.items()
        if workload not in (talk_name, tree_name)
    ],
    "lrrrr",
)

# %% [markdown]
# Then a chat:

# %% tags=["hide-input"]
gpu = {f"stage {n}": [1000 * s for s in by_workload[talk_name][n]["first_token_seconds"]] for n in (2, 3)}
draw_turns(
    gpu,
    "ms to the first token",
    "Time to first token on a GPU by turn of a chat, stages 2 and 3",
    "Time to first token on the GPU, median by turn; the prompts' lengths are in the table.",
)
table(
    ["turn", "tokens sent", "stage 2, ms", "stage 3, ms", "ratio"],
    [
        (i + 1, f"{length:,}", f"{a:.1f}", f"{b:.1f}", f"{a / b:.1f}")
        for i, (length, a, b) in enumerate(
            zip(by_workload[talk_name][3]["prompt_tokens"], gpu["stage 2"], gpu["stage 3"], strict=True)
        )
    ],
    "rrrrr",
)

# %% [markdown]
# And the tree on that machine's CPU:

# %% tags=["hide-input"]
tree_result = next(iter(by_workload[tree_name].values()))
table(
    ["prompts cached", "match, µs", "insert, µs", "evict, µs per page"],
    [
        (
            f"{tree_result['prompts']:,}",
            *(f"{tree_result[key]:.1f}" for key in ("match_us", "insert_us", "evict_us_per_page")),
        )
    ],
    "rrrr",
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
# A prefix cache saves prefill and nothing else. An answer takes as many steps as before, and in single file
# these are what takes the time. And a turn that finds everything still costs one step, which for few tokens
# is limited by its launches, as lesson 2 counted them. What is saved shows where prompts are long or many.
#
# ## What stage 4 will do about the rest
#
# A cache helps with what was seen before. Somebody has to be the first. Here a user is being answered when
# another sends a prompt of 1,500 tokens; and later, when a third sends it again:

# %%
LONG, EVERY, TOKENS = 1500, 24, 72
engine = small_engine(stage3, num_pages=512)
engine.add(Request("reader", chat("What is a page?"), SamplingParams(max_tokens=TOKENS, ignore_eos=True)))
engine.step()

arriving = [EVERY, 2 * EVERY]
gaps, last = [], time.perf_counter()
while engine.has_work:
    if arriving and len(gaps) == arriving[0]:
        engine.add(Request(f"long {arriving.pop(0)}", text[:LONG], SamplingParams(max_tokens=1)))
    if any(output.request_id == "reader" for output in engine.step()):
        now = time.perf_counter()
        gaps.append(1000 * (now - last))
        last = now

# %% tags=["hide-input"]
figure, axis = canvas(8, 2.8)
axis.bar(
    range(1, len(gaps) + 1),
    gaps,
    width=0.8,
    color=[ORANGE if i in (EVERY, 2 * EVERY) else BLUE for i in range(len(gaps))],
    linewidth=0,
)
for index, label in ((EVERY, "a new long prompt"), (2 * EVERY, "the same prompt again")):
    place = {"xytext": (6, 4), "textcoords": "offset points", "color": ORANGE}
    axis.annotate(f"{label}: {gaps[index]:.0f} ms", (index + 1, gaps[index]), **place)
axis.set_xlabel("token of the reader")
axis.set_ylabel("ms since the last")
axis.set_ylim(0, 1.15 * max(gaps))
publish(
    figure,
    "The time between a reader's tokens, with one gap far above all others where a long prompt was read",
    f"Time between the tokens of one answer. After {EVERY} of them a prompt of {LONG:,} tokens arrives, and "
    f"after {2 * EVERY} the same one again.",
)
print(
    f"a token takes {median(gaps):.1f} ms; with the long prompt {gaps[EVERY]:.0f} ms, "
    f"{gaps[EVERY] / median(gaps):.0f} times as long"
)

# %% [markdown]
# The second time, the tree has it, and the reader waits for one short prefill. The first time, the answer
# stops in the middle of a sentence: a step takes whole prompts, and lets no one decode meanwhile. The stall
# grows with the longest prompt, and so does the memory for its activations. Stage 4 gives each step a budget
# of tokens, spends it first on one token for everyone who is being answered, and fills the rest with prompts,
# cut into chunks where they are too long.
#
# ## Exercises
#
# Stubs are in `docs/exercises/stage3.py`; `python -m docs.exercises.stage3` in the repository's root checks
# what you filled in.
#
# 1. **Count it.** Given prompts that arrive together, how many positions does their batch compute? Mind the
#    whole pages, and the token that is left.
# 2. **Foresee it.** Say which pages `evict` will give, and in which order, without touching the tree.
# 3. **Overtake.** Write a `LongestPrefixFirst` scheduler, which admits first whoever finds most in the
#    cache. The checker says what it brings when the cache is small. Who pays for it?
# 4. **Without a tree.** Write a prefix cache as one dictionary with an entry for each page. What must a key
#    stand for, and how do you keep it short? Which question does the tree answer that a dictionary cannot?
#
# ## What to read next
#
# - `stages/stage3_radix/radix_tree.py`, all of it: `_shared_pages` compares by halves, `_trim` shortens a
#   leaf.
# - `tests/stage3/test_radix_tree.py`: the tree against a dictionary, with random calls in random order.
# - `stages/stage2_paged/request_table.py`: read `admit` and `_release` again. Now the locks in them mean
#   something.
# - The [glossary](../glossary.md) has the new words.
#
# [^radix]: L. Zheng et al., *SGLang: Efficient Execution of Structured Language Model Programs*, 2024.
