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
# # A model in slices
#
# [Lesson 5](5-overlap.md) left a GPU that seldom waits for Python. What a step takes now is what the GPU
# needs to read its weights, and what a GPU can hold is what it was built with. Both are limits of *one* GPU.
#
# Stage 6 cuts every large matrix into slices, gives each GPU one, and lets them compute each layer together:
# tensor parallelism. Each slice has a process of its own, a *rank*. The model, the scheduler, the tree and
# the step ahead stay as they are: a rank is stage 5's engine with smaller matrices and with operations that
# talk to the other ranks.

# %% tags=["hide-input"]
import gc
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from math import prod
from pathlib import Path

import msgspec
import torch
import torch.nn.functional as F
from matplotlib.patches import Rectangle

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
    kernels,
    machine,
    publish,
    show,
    table,
)
from minisgl.bench.limits import Machine
from minisgl.bench.shapes import SHAPES
from minisgl.builtin import PATH
from stages.interface import EngineFailed, Request, SamplingParams
from stages.stage1_naive import model as plain
from stages.stage1_naive.attention import QKV, NaiveAttention, rope_table
from stages.stage1_naive.config import ModelConfig
from stages.stage1_naive.model import Ops
from stages.stage1_naive.tokenizer import Tokenizer
from stages.stage1_naive.weights import tensor_shapes
from stages.stage2_paged.assembly import load_whole
from stages.stage2_paged.kv_cache import PagedKVCache
from stages.stage2_paged.request_table import SampledToken
from stages.stage5_overlap import engine as stage5
from stages.stage6_parallel import engine as stage6
from stages.stage6_parallel.ops import parallel_ops
from stages.stage6_parallel.sharding import Shard, check_divisible
from stages.stage6_parallel.watch import SERVING, TICK_S

torch.set_num_threads(1)

# %% [markdown]
# ## What stage 5 left
#
# An H200 has 141 GB of memory. The engine takes 90% of that (`memory_fraction`), for weights, activations and
# KV cache together. What do models need? The shapes are those of `minisgl/bench/shapes.py`, in bfloat16. The
# time is that of reading all weights that a step multiplies with, once, at the 4.3 TB/s that a copy reaches
# on an H200: no step of one row can be faster.

# %%
GPU_BYTES, FRACTION = 141e9, stage6.EngineConfig.memory_fraction
H200 = Machine(flops=790e12, bandwidth=4.3e12)  # what a product and a copy reached; lesson 5's limits


def config_of(shape):
    """The engine's own reading of a `config.json`."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(SHAPES[shape]))
        return ModelConfig.load(Path(folder))


configs = {shape: config_of(shape) for shape in SHAPES}


def weight_bytes(config, size=1):
    """What each of `size` ranks holds."""
    return 2 * sum(map(prod, tensor_shapes(Shard(0, size).cut(config)).values()))


def read_bytes(config, size=1):
    """What each of them reads in a step: of an embedding that is no head it reads a few rows only."""
    local = Shard(0, size).cut(config)
    return weight_bytes(config, size) - (
        0 if config.tied_embeddings else 2 * prod((local.vocab_size, local.hidden_size))
    )


def kv_bytes(config, size=1):
    """Keys and values of one token, on each of them."""
    return PagedKVCache.bytes_per_page(Shard(0, size).cut(config), 1, torch.bfloat16)


def room(config, size=1):
    """Tokens that the cache has room for, if a step took no memory."""
    return int((FRACTION * GPU_BYTES - weight_bytes(config, size)) // kv_bytes(config, size))


table(
    ["shape", "weights, GB", "of an H200", "KV of a token, kB", "room, tokens", "read once, ms"],
    [
        (
            name,
            f"{weight_bytes(c) / 1e9:.1f}",
            f"{weight_bytes(c) / GPU_BYTES:.0%}",
            f"{kv_bytes(c) / 1e3:.0f}",
            f"{room(c):,}" if room(c) > 0 else "none",
            f"{1e3 * read_bytes(c) / H200.bandwidth:.2f}",
        )
        for name, c in configs.items()
        if name in ("qwen3-0.6b", "qwen3-14b", "qwen3-32b", "llama-3.1-70b")
    ],
    "lrrrrr",
)
middle, large = configs["qwen3-32b"], configs["llama-3.1-70b"]
assert weight_bytes(large) > GPU_BYTES
assert 233_000 < room(middle) < 256 * 1024
assert room(middle) < 2 * middle.context_length
assert H200.bandwidth / read_bytes(middle) < 70

# %% [markdown]
# - **Llama-3.1-70B does not fit**: its weights alone are more than all of the memory.
# - **Qwen3-32B fits, but not with its users.** Beside the weights there is room for 234,000 tokens, fewer
#   than 256 requests of 1,024 tokens have. Two requests of its full context of 131,072 do not fit.
# - **It is slow for one user.** Its weights are read for every token: 15 ms each, so fewer than 70 tokens
#   a second, however good the kernels are.
#
# Two GPUs have twice the memory, and twice the bandwidth if both read at the same time, each another half.
#
# ## Two ways to cut a matrix
#
# A product `y = x Wᵀ` can be cut in two ways. Small numbers first, in float64:

# %%
torch.manual_seed(0)
x, w = torch.randn(2, 6, dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64)  # [T, in], [out, in]
whole = F.linear(x, w)

by_rows = [F.linear(x, part) for part in w.chunk(2, dim=0)]  # each: all of x, half of the outputs
assert torch.allclose(torch.cat(by_rows, dim=1), whole, rtol=0, atol=1e-14)

halves = zip(x.chunk(2, dim=1), w.chunk(2, dim=1), strict=True)
by_columns = [F.linear(*half) for half in halves]  # each: half of x, a part of every output
assert torch.allclose(sum(by_columns), whole, rtol=0, atol=1e-14)
assert not torch.allclose(by_columns[0], whole)

# %% [markdown]
# Cut by rows of the weight, every rank needs all of `x` and has some of the outputs, whole. Cut by columns,
# every rank needs only some of the inputs and has a *part* of all outputs, and the parts must be added.
#
# Megatron-LM[^megatron] puts one after the other: what the first way leaves on a rank is just what the second
# way needs there. It names them after `x W`, the transpose of ours: the first is *column-parallel*, the
# second *row-parallel*. A layer has two such pairs:
#
# - **qkv, then o.** Cut between heads. A rank computes q, k and v of its heads, attends with them, keeps
#   their K and V in its own cache, and multiplies with its columns of `o`.
# - **gate-up, then down.** Cut between channels: channel `i` of gate, up and `SiLU(gate) · up` is all one
#   rank's.
#
# Here are the matrices of the built-in model, as two ranks hold them. What is drawn is what `Shard` says:

# %%
config = ModelConfig.load(PATH)


def ranges(name, rank, size):
    """The rows and columns of a tensor in the checkpoint that a rank holds."""
    wholes, parts = tensor_shapes(config)[name], tensor_shapes(Shard(0, size).cut(config))[name]
    return [Shard(rank, size)._range(*sizes) for sizes in zip(wholes, parts, strict=True)]


layer_names = {
    "embedding, head": ["model.embed_tokens"],
    "qkv": [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"],
    "o": ["model.layers.0.self_attn.o_proj"],
    "gate-up": [f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up")],
    "down": ["model.layers.0.mlp.down_proj"],
}

# %% tags=["hide-input"]
RANKS = (BLUE, ORANGE, GREEN, PURPLE)
figure, axis = canvas(8, 3.6)
left, after = (
    0,
    {"embedding, head": "→ sum →", "qkv": "→ attention →", "o": "→ sum →", "gate-up": "→ SiLU · up →"},
)
for title, names in layer_names.items():
    columns = tensor_shapes(config)[names[0] + ".weight"][1]
    top = 0
    for name in names:
        rows = tensor_shapes(config)[name + ".weight"][0]
        for rank in range(2):
            (a, b), (c, d) = ranges(name + ".weight", rank, 2)
            axis.add_patch(
                Rectangle(
                    (left + c, top + a), d - c, b - a, facecolor=RANKS[rank], edgecolor="none", alpha=0.8
                )
            )
        axis.add_patch(Rectangle((left, top), columns, rows, fill=False, edgecolor=GREY, linewidth=1.2))
        if len(names) > 1:
            axis.text(left + columns / 2, top + rows / 4, name.split(".")[-1][:-5], ha="center", va="center")
        top += rows
    axis.text(left + columns / 2, -190, title, ha="center", weight="bold", fontsize=9)
    axis.text(left + columns / 2, -60, f"[{top:,}, {columns}]", ha="center", fontsize=8)
    gap = 560
    axis.text(left + columns + gap / 2, 110, after.get(title, "→ sum →"), ha="center", fontsize=8)
    left += columns + gap
for rank in range(2):
    axis.add_patch(Rectangle((3700, 1500 + 200 * rank), 120, 130, facecolor=RANKS[rank], alpha=0.8))
    axis.text(3880, 1620 + 200 * rank, f"rank {rank}")
axis.set_xlim(-250, left)
axis.set_ylim(2080, -330)
axis.set_aspect("equal")
axis.axis("off")
publish(
    figure,
    "Five matrices, coloured by rank: embedding, qkv and gate-up cut by rows, o and down cut by columns",
    "The weights of a layer of the built-in model, [out, in], drawn to scale and coloured by rank. q, k and "
    "v are cut before they are joined, and so are gate and up, so a joined matrix has stripes.",
)

# %% [markdown]
# The same with the model's real weights. `Shard.load` reads a rank's slices from the checkpoint, and nothing
# else of it; the result is a `Transformer` like any other, with fewer heads and channels. So each rank's part
# is computed by stage 1's own functions, and only at the end there is a sum:

# %%
cpu = torch.device("cpu")
prompt = Tokenizer(PATH).chat([{"role": "user", "content": "What is tensor parallelism?"}])
ids, positions = torch.tensor(prompt), torch.arange(len(prompt))


def attention(model, layer, x):
    """qkv, attention and o of one layer, with the heads that this model has."""
    attend = NaiveAttention(QKV(model.config, rope_table(model.config, len(x), cpu)))
    return F.linear(attend(layer, F.linear(x, layer.qkv), positions), layer.o)


rows = []
for dtype in (torch.float64, torch.bfloat16):
    model = load_whole(PATH, config, dtype, cpu)
    x = plain.rms_norm(F.embedding(ids, model.embedding), model.layers[0].input_norm, config.norm_eps)
    for size in (2, 4):
        shards = [Shard(rank, size).load(PATH, config, dtype, cpu) for rank in range(size)]
        for name, compute, matrices in (
            ("qkv, attention, o", attention, ("qkv", "o")),
            ("gate-up, down", lambda _, layer, x: plain.mlp(layer, x), ("gate_up", "down")),
        ):
            whole = compute(model, model.layers[0], x)
            parts = [compute(shard, shard.layers[0], x) for shard in shards]
            error = float((sum(parts) - whole).abs().max() / whole.abs().max())
            alone = float((parts[0] - whole).abs().max() / whole.abs().max())
            shapes = (str(list(getattr(shards[0].layers[0], m).shape)) for m in matrices)
            rows.append((name, str(dtype)[6:], size, *shapes, f"{alone:.2f}", f"{error:.0e}"))
            assert error < (1e-14 if dtype == torch.float64 else 2e-2)
            assert alone > 0.1
table(
    ["pair", "numbers", "ranks", "first, a rank's", "second, a rank's", "off: one part", "off: their sum"],
    rows,
    "llrllrr",
)

# %% [markdown]
# *Off* is the largest difference from the whole model's output, as a share of its largest value. One part
# alone is far off; the sum is the output, up to rounding. It is a sum in another order, so in bfloat16 its
# last bits differ, and where two tokens are nearly equal, another one may win. In float64 the difference is
# far too small for that, so there we can ask for equal tokens.
#
# Why not the other way round, first by columns and then by rows? Because between the two is something that
# does not go with sums. Each rank would have a part of the gate, and SiLU of parts is not part of the SiLU:

# %%
a, b = torch.randn(2, 1000, dtype=torch.float64)
print(f"{(F.silu(a + b) - F.silu(a) - F.silu(b)).abs().max():.2f} is the largest of 1,000 differences")

# %% [markdown]
# ### Key and value heads
#
# Query heads share key/value heads (grouped queries), so a query head must be where its key/value head is.
# With as many ranks as key/value heads or fewer, consecutive heads stay together by themselves. With more
# ranks than that, several hold the same one. The built-in model has 4 query heads and 2 key/value heads:

# %%
d = config.head_dim
rows = []
for size in (1, 2, 4):
    for rank in range(size):
        (q, _), (k, _) = (ranges(f"model.layers.0.self_attn.{x}_proj.weight", rank, size) for x in "qk")
        queries, keys = range(q[0] // d, q[1] // d), range(k[0] // d, k[1] // d)
        assert {n * config.num_kv_heads // config.num_heads for n in queries} == set(keys)
        rows.append((size, rank, ", ".join(map(str, queries)), ", ".join(map(str, keys))))
table(["ranks", "rank", "query heads", "key/value heads"], rows, "rrll")

# %% [markdown]
# Four ranks hold each key/value head twice, in weights and in the cache: from there on, more ranks do not
# make the cache on a rank smaller. This is what `Shard` does, and what it cannot cut is refused before any
# process is started:

# %% tags=["hide-input"]
show(Shard.cut)
show(Shard._range)

# %%
for name, c, size in (("built-in", config, 3), ("qwen3-14b", configs["qwen3-14b"], 16)):
    try:
        check_divisible(c, size)
    except ValueError as error:
        print(f"{name}: {error}")
    else:
        raise AssertionError("it was not refused")

# %% [markdown]
# ### Embedding and head
#
# Both are cut by tokens of the vocabulary. For the embedding a rank looks up the tokens it has and puts zeros
# for the others, and again a sum makes it whole: the one at the beginning of the first `add_norm`. The head
# gives each rank the logits of its tokens, so these are not added but put side by side. If the vocabulary is
# no multiple of the ranks, the last rank's part is filled up with rows of zeros, and what they say is cut
# off. All that stage 6 adds to the model is here:

# %% tags=["hide-input"]
show(parallel_ops)

# %% [markdown]
# `linear` and `mlp` need nothing: no sum comes before the next `add_norm`, which stage 1 put behind every
# row-parallel product, and before the first of them. (`few_rows` we come to [below](#a-few-rows).) The parts
# of an embedding, and of logits:

# %%
model = load_whole(PATH, config, torch.float64, cpu)
shards = [Shard(rank, 2).load(PATH, config, torch.float64, cpu) for rank in range(2)]
parts = [parallel_ops(Ops(), rank, None).embed(ids, shard.embedding) for rank, shard in enumerate(shards)]
found = [part.any(dim=1) for part in parts]  # the tokens that this rank has
assert not (found[0] & found[1]).any()
assert torch.equal(parts[0] + parts[1], F.embedding(ids, model.embedding))
hidden = torch.randn(3, config.hidden_size, dtype=torch.float64)
logits = torch.cat([F.linear(hidden, shard.head) for shard in shards], dim=1)
assert torch.allclose(logits, F.linear(hidden, model.head), rtol=0, atol=1e-12)
print(f"of {len(ids)} tokens, rank 0 finds {found[0].sum()} and rank 1 {found[1].sum()}")

# %% [markdown]
# ## Real ranks
#
# `--tp 2` starts a process for each slice. The first, rank 0, is the one you called; it has the server above
# it and speaks for all. Here are two and four on this CPU, with the built-in model in float64, beside stage
# 5's engine. Requests come in between, one is aborted, and all that sampling can be asked for is asked for:

# %%
SETTINGS = [
    {"temperature": 0.0},
    {},
    {"top_k": 20, "top_p": 0.9},
    {"min_p": 0.1, "temperature": 0.7},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5},
    {"logit_bias": {5: 4.0}},
]
text = prompt * 20
mixed = [
    Request(
        f"request {i}", text[i : i + 9 + 17 * i], SamplingParams(max_tokens=10 + 2 * i, **setting), seed=i
    )
    for i, setting in enumerate(SETTINGS)
]
options = {
    "model": str(PATH),
    "device": "cpu",
    "dtype": "float64",
    "page_size": 16,
    "num_pages": 64,
    "max_rows": 8,
    "prefill_budget": 48,
}


def start_ranks(tp):
    return stage6.build(stage6.EngineConfig(**options, tp=tp))


def serve(engine):
    """Tokens by request. Every second step one arrives, and one that came first is aborted later."""
    outputs, coming, steps = {request.id: [] for request in mixed}, list(mixed), 0
    engine.add(Request("aborted", text[:30], SamplingParams(max_tokens=100, ignore_eos=True), seed=9))
    while engine.has_work or coming:
        if coming and steps % 2 == 0:
            engine.add(coming.pop(0))
        if steps == 5:
            engine.abort("aborted")
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output.token_id)
        steps += 1
    return outputs, steps


rows, expected = [], None
for name, make in (
    ("stage 5", lambda: stage5.build(stage5.EngineConfig(**options))),
    ("stage 6, 2 ranks", lambda: start_ranks(2)),
    ("stage 6, 4 ranks", lambda: start_ranks(4)),
):
    clock = [time.perf_counter()]
    engine = make()
    clock.append(time.perf_counter())
    outputs, steps = serve(engine)
    clock.append(time.perf_counter())
    expected = expected or outputs
    assert outputs == expected
    started, each = clock[1] - clock[0], 1000 * (clock[2] - clock[1]) / steps
    rows.append((name, f"{started:.1f}", sum(map(len, outputs.values())), steps, f"{each:.1f}"))
    del engine
    gc.collect()  # its ranks go with it
table(["engine", "started in, s", "tokens", "steps", "a step, ms"], rows, "lrrrr")

# %% [markdown]
# The tokens are the same, all of them. And it is *slower*. This is a small model on one CPU: both ranks use
# the same memory, so there is no more bandwidth than before, and every collective has to wake up other
# processes. Here ranks show what is right, not what is fast.
#
# ### Two collectives a layer
#
# How often do ranks talk, and how much do they say? For this, we start two ranks ourselves. Each runs this
# function, in a process of its own. It joins the group and builds its engine with stage 6's functions. Then
# it gives the engine four requests and takes a few steps, with PyTorch's profiler on. Note what is *not*
# there: rank 0 tells rank 1 nothing. Both simply do the same:


# %%
def a_rank(rank, size, folder, options):
    """A prefill and three decode steps of four requests: counts, batches and a trace of this rank."""
    import json
    import os
    import time
    from collections import Counter

    import torch
    from torch.distributed import FileStore
    from torch.profiler import ProfilerActivity, profile, record_function

    from stages.interface import Request, SamplingParams
    from stages.stage6_parallel.engine import EngineConfig, build_rank, connect, digest
    from stages.stage6_parallel.launcher import Place

    config = EngineConfig(**options, tp=size)
    place = Place(rank, size, rank, size, "127.0.0.1", FileStore(f"{folder}/store", size))
    communicator = connect(config, place)
    engine, steps = build_rank(config, place, communicator), []
    launch = engine._runner.launch

    def watched_launch(batch):
        steps[-1]["batch"] = [(row.sequence.request.id, row.start, row.length) for row in batch.rows]
        return launch(batch)

    engine._runner.launch = watched_launch

    def step(name):
        communicator.calls, communicator.bytes = Counter(), Counter()
        steps.append({"name": name})
        start = time.perf_counter()
        with record_function(f"step: {name}"):
            outputs = engine.step()
        steps[-1] |= {"calls": communicator.calls, "bytes": communicator.bytes}
        steps[-1] |= {"ms": 1000 * (time.perf_counter() - start)}
        steps[-1] |= {"digest": digest(outputs, engine.statistics).hex()}

    def add(round):
        for i in range(4):
            params = SamplingParams(max_tokens=8, ignore_eos=True)
            engine.add(Request(f"{round}{i}", [7 + i, *range(20, 31)], params, seed=i))

    with profile(activities=[ProfilerActivity.CPU]) as trace:
        for round in ("warm-up ", "request "):  # once before, so that nothing is done for the first time
            add(round)
            number = 0
            while engine.has_work:
                step(f"{round}{number}")
                number += 1
    trace.export_chrome_trace(f"{folder}/trace{rank}.json")
    alone = {}
    for numbers in (4 * 256, 48 * 256):  # of a decode step and of the prefill above, in float64
        x, times = torch.ones(numbers, dtype=torch.float64), []
        for _ in range(200):
            start = time.perf_counter()
            communicator.all_reduce(x.fill_(1.0))
            times.append(1000 * (time.perf_counter() - start))
        assert torch.equal(x, torch.full_like(x, size))
        alone[8 * numbers] = sorted(times)[100]
    steps.append({"name": "alone", "ms": alone})
    with open(f"{folder}/steps{rank}.json", "w") as file:
        json.dump(steps, file)
    torch.distributed.destroy_process_group()
    os._exit(0)  # not the usual way out, which the profiler's threads may turn into an abort


def run_ranks(size):
    """The steps of each rank, and its trace."""
    with tempfile.TemporaryDirectory() as folder:
        program = f"import json, sys\n\n{inspect.getsource(a_rank)}\n"
        program += f"a_rank(int(sys.argv[1]), {size}, {folder!r}, json.loads(sys.argv[2]))\n"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), *sys.path]))}
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", program, str(rank), json.dumps(options)],
                env=environment | {"OMP_NUM_THREADS": "1"},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        for rank in ranks:
            errors = rank.communicate(timeout=600)[1]
            assert rank.returncode == 0, errors
        read = [
            json.loads(Path(folder, f"{k}{r}.json").read_text())
            for k in ("steps", "trace")
            for r in range(size)
        ]
    return read[:size], [trace["traceEvents"] for trace in read[size:]]


all_steps, traces = run_ranks(2)
steps = [[step for step in rank if step["name"].startswith("request")] for rank in all_steps]
assert [step["calls"] for step in steps[0]] == [step["calls"] for step in steps[1]]
L, H, V = config.num_layers, config.hidden_size, config.vocab_size
for step in steps[0][:4]:
    positions_in, sampling = sum(row[2] for row in step["batch"]), len(step["batch"])
    assert step["calls"] == {"all_reduce": 2 * L + 1, "all_gather": 1}
    assert step["bytes"] == {
        "all_reduce": (2 * L + 1) * positions_in * H * 8,
        "all_gather": sampling * V // 2 * 8,
    }

# %% [markdown]
# The communicator counts what it is asked for. The profiler sees it from below, as `gloo` does it. gloo is
# the library that carries collectives between CPUs; between GPUs it is NCCL. For each step, from both:

# %%
spans = []  # per rank: (name, start, length) in ms
for events in traces:
    timed = [e for e in events if e.get("ph") == "X" and e["name"].startswith(("gloo:", "step: request"))]
    spans.append(sorted({(e["name"], e["ts"] / 1000, e["dur"] / 1000) for e in timed}, key=lambda s: s[1]))


def inside(rank, step):
    """What this rank's communication was in a step: (name, start, length)."""
    [(_, start, length)] = [s for s in spans[rank] if s[0] == f"step: {step['name']}"]
    return [s for s in spans[rank] if s[0].startswith("gloo:") and start <= s[1] < start + length]


rows = []
for number, step in enumerate(steps[0][:4]):
    seen = [inside(rank, step) for rank in range(2)]
    for kind, name in (("all_reduce", "all-reduce"), ("all_gather", "all-gather")):
        times = [[length for what, _, length in one if what == f"gloo:{kind}"] for one in seen]
        count, size = step["calls"][kind], step["bytes"][kind]
        assert [len(one) for one in times] == [count, count]  # what was asked for is what was done
        both = [min(pair) for pair in zip(*times, strict=True)]
        rows.append(
            (
                f"{'prefill' if number == 0 else 'decode'}, {sum(row[2] for row in step['batch'])} positions",
                name,
                count,
                f"{size // count:,}",
                *(f"{sum(one):.2f}" for one in times),
                f"{sum(both):.2f}",
                f"{step['ms']:.1f}",
            )
        )
table(
    ["step", "collective", "calls", "bytes each", "rank 0, ms", "rank 1, ms", "both there, ms", "step, ms"],
    rows,
    "llrrrrrr",
)

# %% [markdown]
# Eleven all-reduces for five layers: two a layer and one for the embedding. Then one all-gather of logits, of
# those rows only that sample. Each all-reduce carries `8 * 256` bytes a position: its hidden state, and not
# one byte more for a longer context. Keys and values never leave their rank.
#
# And alone, without an engine or a profiler? The median of 200 all-reduces of these sizes:

# %% tags=["hide-input"]
table(
    ["bytes", *(f"rank {rank}, ms" for rank in range(2))],
    [
        (f"{int(size):,}", *(f"{rank[-1]['ms'][size]:.3f}" for rank in all_steps))
        for size in all_steps[0][-1]["ms"]
    ],
    "rrr",
)

# %% [markdown]
# A rank's time in a collective includes waiting for the other to come. For each collective the shorter of the
# two times is that of the rank that came last, and *both there* adds these up. The rest was waiting. (The
# profiler slows all of this down; so do only two cores.) The shortest of the decode steps, as both
# ranks saw it:

# %% tags=["hide-input"]
figure, axis = canvas(8, 2.3)
shown = min(steps[0][1:8], key=lambda step: step["ms"])
marks = [next(s for s in spans[rank] if s[0] == f"step: {shown['name']}") for rank in range(2)]
zero = min(start for _, start, _ in marks)
for rank, (_, start, length) in enumerate(marks):
    axis.broken_barh([(start - zero, length)], (rank - 0.34, 0.68), color=GREY, alpha=0.35, linewidth=0)
    for kind, colour in (("gloo:all_reduce", RANKS[rank]), ("gloo:all_gather", RED)):
        bars = [(s - zero, n) for what, s, n in inside(rank, shown) if what == kind]
        axis.broken_barh(bars, (rank - 0.34, 0.68), color=colour, linewidth=0)
for label, colour, alpha in (
    ("computing, Python", GREY, 0.35),
    ("all-reduce, rank 0", BLUE, 1),
    ("all-reduce, rank 1", ORANGE, 1),
    ("all-gather", RED, 1),
):
    axis.bar(0, 0, color=colour, alpha=alpha, label=label)
axis.set_yticks((0, 1), ("rank 0", "rank 1"))
axis.set_ylim(1.5, -0.5)
axis.set_xlim(0, max(start + length for _, start, length in marks) - zero)
axis.set_xlabel("milliseconds")
axis.tick_params(axis="y", left=False)
axis.spines["left"].set_visible(False)
figure.legend(loc="outside upper center", ncols=4, handlelength=1.0, columnspacing=1.2)
publish(
    figure,
    "Two rows of bars that end together: whoever comes first to a collective waits for the other",
    "A decode step of four rows on two ranks, from their profilers. A collective ends for both at about the "
    "same time, however early one of them came.",
)

# %% [markdown]
# ## One program, many ranks
#
# Those two ranks exchanged hidden states and logits, and nothing else. Yet they made the same batches:

# %%
batches = [[step.get("batch") for step in rank] for rank in steps]
digests = [[step["digest"] for step in rank] for rank in steps]
assert batches[0] == batches[1]
assert digests[0] == digests[1]
assert len(set(digests[0])) > 2  # not merely a constant
for number in (0, 1, len(digests[0]) - 1):
    for rank in range(2):
        made = f"{len(batches[rank][number])} rows" if batches[rank][number] else "nothing"
        print(f"step {number}, rank {rank}: launched {made}, then stood at {digests[rank][number]}")

# %% [markdown]
# This is SPMD: a single program, run by all on different data. It works because of a rule that the engine has
# kept since stage 2: `schedule` and `commit` depend on nothing but the calls that were made. They ask no
# clock, draw no random number, and iterate over no set. Time of use in the radix tree is a counter. The noise
# of a token comes from seed, position and token id. And all ranks sample from the same gathered logits.
#
# The alternative is that rank 0 schedules and sends each batch to the others. Then a rank could not prepare a
# batch before it has been told, and there would be a second way for a batch to come to be. Instead, rank 0
# passes on the *calls*. All it does is in these few lines:

# %% tags=["hide-input"]
show(stage6.ParallelEngine.step)
show(stage6.follow)

# %% [markdown]
# What does that take? We listen to what rank 0 sends:

# %%
engine = start_ranks(2)
send, sent = engine._link.send, []


def heard(step):
    sent.append((len(msgspec.msgpack.encode(step, enc_hook=list)), step.calls, step.digest))
    send(step)


engine._link.send = heard
outputs, _ = serve(engine)
assert outputs == expected
rows = [
    (
        number,
        ", ".join(
            f"abort {c}" if isinstance(c, str) else f"add {c.id} ({len(c.prompt)} tokens)" for c in calls
        )
        or "none",
        digest.hex() or "none yet",
        size,
    )
    for number, (size, calls, digest) in enumerate(sent[:8])
]
table(["step", "calls since the last one", "digest of the last commit", "bytes"], rows, "rllr")
quiet = [size for size, calls, digest in sent if not calls and digest]
assert max(quiet) == min(quiet) < 30
print(f"{len(sent)} messages; a step without calls takes {quiet[0]} bytes")

# %% [markdown]
# Two more things have to agree. The number of pages: each rank measures how much memory it has left, and the
# smallest number counts (`Communicator.smallest`). And a request that rank 0 refuses, as too long perhaps,
# the others never hear of.
#
# ### When they disagree
#
# Another version of a library on one machine, an error in this program, a bit that flipped in memory: then
# ranks might go on with different tokens, each in its own story. So the message carries a hash of what rank
# 0's last commit brought: who got which token, and how the pages stand. A rank that has something else stops.
# Let us change one token of rank 0 behind the engine's back:

# %%
commit, changed = engine._engine._table.commit, []


def wrong_commit(batch, sampled):
    if not changed:
        changed.append(sampled[0].token_id)
        sampled = [SampledToken((changed[0] + 1) % V), *sampled[1:]]
    return commit(batch, sampled)


engine._engine._table.commit = wrong_commit
for request in mixed[:2]:
    engine.add(replace(request, id=f"again: {request.id}"))


def until_it_fails(engine):
    """What it says, after how many steps, and how long that took."""
    start, steps = time.perf_counter(), 0
    try:
        while engine.has_work:
            steps += 1
            engine.step()
    except EngineFailed as error:
        return str(error), steps, time.perf_counter() - start
    raise AssertionError("nobody noticed")


said, steps_taken, _ = until_it_fails(engine)
print(f"in step {steps_taken}: {said}")
assert "the ranks disagree about the last step" in said
assert steps_taken == 3
children = engine._link.watch._children
del engine
gc.collect()
assert all(child.poll() is not None for child in children.values())

# %% [markdown]
# Step 1 launched the prompts, step 2 launched the next batch and committed the wrong token, and step 3's
# message told the other rank. Both batches had been scheduled before the commit, so they were the same on
# both ranks; a third the other rank did not launch. Nobody can tell who is right, so the engine ends, and the
# server says why. To go on would be worse: the ranks would soon launch different batches, and the sum of two
# different hidden states looks like any other hidden state.
#
# The hash finds what makes ranks *differ*. A GPU that computes a wrong partial sum it does not find: that is
# added in everywhere, and all agree on a wrong token.
#
# ## Ranks that die
#
# A collective waits until all have come. If one rank is killed, or stopped, the others would wait for ever.
# So each rank has a thread that reports to rank 0 twice a second, and a thread on rank 0 that listens. It
# names the cause, ends the others, and makes the step raise. Two ranks, of which one is killed in the middle
# of an answer; then two, of which one is stopped, which keeps its connections open:

# %%
rows = []
for number in (signal.SIGKILL, signal.SIGSTOP):
    engine = start_ranks(2)
    for request in mixed:
        engine.add(replace(request, params=SamplingParams(max_tokens=900, ignore_eos=True), prompt=prompt))
    for _ in range(5):
        engine.step()
    children = engine._link.watch._children
    os.kill(children[1].pid, number)
    said, _, seconds = until_it_fails(engine)
    assert said.startswith("rank 1 ")
    children[1].wait(300)  # the stopped one is ended as well; else this raises
    rows.append((number.name, f"{seconds:.1f}", said))
    del engine, children
    gc.collect()
table(["sent to rank 1", "found after, s", "the engine raises"], rows, "lrl")
assert "SIGKILL" in rows[0][2]
assert "stopped or stuck" in rows[1][2]
print(f"silence is borne for {SERVING} ticks of {TICK_S} s")

# %% [markdown]
# Three choices in `watch.py` are worth a look:
#
# - **Silence is counted in the listener's own ticks**, not compared with a clock. If all ranks are stopped by
#   Ctrl-Z and continued an hour later, nobody has been silent.
# - **The first sign may come from a victim.** When rank 1 is killed, rank 0's collective fails at once, and
#   in a larger group so do all others. The cause is named a tick later, when it is known who was killed.
# - **Idle ranks wait on a socket**, not in a collective, which would time out. So a server may be idle all
#   night.
#
# The engine does not start again by itself. The cache of a lost rank is lost for all, and the requests with
# it; whoever supervises the server starts it anew.
#
# ## Memory of a rank
#
# From the same functions that load a model. Weights in GB, keys and values of one token in kB, and how many
# tokens the cache has room for on GPUs of 141 GB:

# %%
SIZES = (1, 2, 4, 8)
rows = []
for name, c in configs.items():
    for size in SIZES:
        check_divisible(c, size)
    rows.append(
        (
            name,
            *(f"{weight_bytes(c, n) / 1e9:.1f}" for n in SIZES),
            *(f"{kv_bytes(c, n) / 1e3:.0f}" for n in SIZES),
            *(f"{room(c, n) / 1e6:.2f}" if room(c, n) > 0 else "none" for n in SIZES),
        )
    )
table(
    ["shape", "GB: 1 rank", 2, 4, 8, "kB a token: 1 rank", 2, 4, 8, "million tokens: 1 rank", 2, 4, 8],
    rows,
    "l" + "r" * 12,
)
assert room(large, 2) > 0
assert kv_bytes(large, 16) == kv_bytes(large, 8)  # 8 key/value heads: two ranks hold each
gain = room(middle, 2) / room(middle)
assert 3 < gain < 3.5
print(f"Qwen3-32B on two GPUs has {gain:.1f} times the room of one")

# %% [markdown]
# Norms are whole everywhere, but they are small, so a rank holds nearly 1/n. With two GPUs the room for
# tokens is more than doubled, because weights are there once and no longer fill the first GPU. For Qwen3-32B
# it is three times as much. All these models have 8 key/value heads, so a ninth rank and more would make
# weights smaller but not the cache: Llama-3.1-70B on 16 ranks keeps as many bytes a token on each as on 8.
#
# ## When does it pay?
#
# **What follows is a calculation.** What was measured stands [behind it](#measured-on-several-gpus).
# The parts:
#
# - A decode step reads the rank's weights and its share of all keys and values at 4.3 TB/s, or multiplies
#   for longer than it reads weights, at 790 TFLOP/s. These two speeds were measured, on one H200.
# - It has `2 L + 1` all-reduces and one all-gather. We *assume* that each takes 10 µs, plus its bytes at
#   350 GB/s. NVLink's data sheet says 450 GB/s in each direction; 350 and 10 µs are guesses of what NCCL
#   makes of it, and the next table shows what depends on them.
# - All-reduce sends `2 (n-1)/n` times its bytes through each rank's link (once around to add, once to hand
#   out); all-gather sends `(n-1)/n` times the result.
# - Nothing else: no small kernels, no pauses, no Python. Real steps take longer, on one GPU too.


# %%
LATENCY, LINK = 10e-6, 350e9  # assumed


def collectives(config, tokens, rows, size, latency=LATENCY):
    """Seconds of a step's collectives: `tokens` are computed, and `rows` sample."""
    if size == 1:
        return 0.0
    reduced = 2 * (size - 1) / size * tokens * config.hidden_size * 2
    gathered = (size - 1) / size * rows * config.vocab_size * 2
    count = 2 * config.num_layers + 1
    return count * (latency + reduced / LINK) + latency + gathered / LINK


def decode(config, rows, context, size, latency=LATENCY):
    """Seconds of a step for weights, keys and values, and collectives."""
    weights = read_bytes(config, size)
    products = max(weights / H200.bandwidth, rows * weights / H200.flops)  # 2 bytes, 2 operations a weight
    cache = rows * context * kv_bytes(config, size) / H200.bandwidth
    return products, cache, collectives(config, rows, rows, size, latency)


def fits(config, rows, context, size):
    return rows * context <= room(config, size)


CONTEXT = 1000
NAMES = ("qwen3-0.6b", "llama-3.1-8b", "qwen3-32b", "llama-3.1-70b")

# %% [markdown]
# First, what does not depend on the guesses. With two ranks, half of the reading goes away, and `2 L + 2`
# collectives come. If one of them takes longer than this, one request is slower on two GPUs than on one:

# %%
rows, limits = [], {}
for name in NAMES:
    c = configs[name]
    for size in SIZES[1:]:
        saved = sum(decode(c, 1, CONTEXT, 1)[:2]) - sum(decode(c, 1, CONTEXT, size)[:2])
        limits[name, size] = saved / (2 * c.num_layers + 2)
    rows.append((name, 2 * c.num_layers + 2, *(f"{1e6 * limits[name, size]:.1f}" for size in SIZES[1:])))
table(["shape", "collectives", *(f"{n} ranks, µs each" for n in SIZES[1:])], rows, "lrrrr")
assert limits["qwen3-0.6b", 2] < 5e-6 < 30e-6 < limits["qwen3-32b", 2]

# %% [markdown]
# A collective among GPUs is a kernel that has to wait for others, so it can hardly take less than some
# microseconds. For the smallest model that is the whole gain; for the large ones there is room. Now with the
# guesses, for 1 and for 256 rows of 1,000 tokens each:

# %% tags=["hide-input"]
figure, axes = canvas(8, 4.6, columns=len(NAMES), rows=2)
for line, batch in zip(axes, (1, 256), strict=True):
    for axis, name in zip(line, NAMES, strict=True):
        c = configs[name]
        for place, size in enumerate(SIZES):
            if not fits(c, batch, CONTEXT, size):
                axis.text(place, 0, " does not fit", ha="center", va="bottom", fontsize=7, rotation=90)
                continue
            bottom = 0.0
            for part, colour in zip(decode(c, batch, CONTEXT, size), (BLUE, TEAL, RED), strict=True):
                axis.bar(place, 1000 * part, 0.7, bottom=bottom, color=colour)
                bottom += 1000 * part
        axis.set_xticks(range(4), SIZES)
        axis.set_xlim(-0.6, 3.6)
        axis.set_ylim(0, 1.08 * axis.dataLim.ymax)
        axis.set_title(f"{name}\n{batch} row{'s' if batch > 1 else ''}", fontsize=8)
for axis in axes[:, 0]:
    axis.set_ylabel("ms a step")
for axis in axes[1]:
    axis.set_xlabel("ranks")
for label, colour in (("weights", BLUE), ("keys and values", TEAL), ("collectives (assumed)", RED)):
    axes[0, 0].bar(0, 0, color=colour, label=label)
figure.legend(loc="outside upper center", ncols=3, handlelength=1.0)
publish(
    figure,
    "Stacked bars: time of a decode step by number of ranks, for four models and two batch sizes",
    "A decode step as calculated, not measured. Each axis has its own scale.",
)

# %%
rows = []
for name in NAMES:
    c = configs[name]
    for batch in (1, 32, 256):
        times = {n: sum(decode(c, batch, CONTEXT, n)) for n in SIZES if fits(c, batch, CONTEXT, n)}
        share = decode(c, batch, CONTEXT, 8)[2] / times[8]
        rows.append(
            (
                name,
                batch,
                *(f"{1e3 * times[n]:.2f}" if n in times else "does not fit" for n in SIZES),
                f"{share:.0%}",
            )
        )
table(
    ["shape", "rows", *(f"{n} rank{'s' if n > 1 else ''}, ms" for n in SIZES), "collectives of 8"],
    rows,
    "lrrrrrr",
)

# %% [markdown]
# And as one would ask it with eight GPUs: one engine on all of them, or several, each with a copy of the
# model and a share of the requests? For 64, 512 and 4,096 requests of 1,000 tokens:

# %%
rows, best = [], {}
for name in NAMES:
    c = configs[name]
    for requests in (64, 512, 4096):
        rates = {}
        for size in SIZES:
            each = requests * size // 8
            if fits(c, each, CONTEXT, size):
                rates[size] = requests / sum(decode(c, each, CONTEXT, size))
        best[name, requests] = max(rates, key=rates.get, default="none")
        rows.append(
            (
                name,
                f"{requests:,}",
                *(f"{rates[n]:,.0f}" if n in rates else "does not fit" for n in SIZES),
                best[name, requests],
            )
        )
table(
    ["shape", "requests", *(f"{8 // n} of {n}, tokens/s" for n in SIZES), "best size"],
    rows,
    "lrrrrrr",
)
balance = H200.flops / H200.bandwidth
assert round(balance) == 184
print(f"from {balance:.0f} rows on, products take longer than to read their weights")
assert best["qwen3-0.6b", 512] == 1
assert best["llama-3.1-8b", 64] == 8
assert best["llama-3.1-8b", 4096] == 1

# %% [markdown]
# Eight copies read the weights eight times where one engine reads them once. That matters as long as a copy
# has few rows. From 184 rows on, a step is as long as its products, so eight copies with enough rows each
# lose nothing, and they need no collectives. So, as far as a calculation goes:
#
# - **A small model, or very many requests of a model that fits**: copies of the engine.
# - **A model that does not fit**, or leaves no room for its users: as many ranks as it takes, and perhaps
#   twice that, for the room.
# - **A large model and few requests**: more ranks bring tokens faster, until collectives take the time.
#
# In prefill, there are thousands of tokens in each all-reduce, and bytes count instead of latency:

# %%
rows = []
TOKENS = 16_384  # the default budget of a step
for name in NAMES:
    c = configs[name]
    for size in (2, 8):
        products = TOKENS * read_bytes(c, size) / H200.flops  # attention left out
        carried = collectives(c, TOKENS, 16, size)
        each = TOKENS * c.hidden_size * 2
        numbers = [f"{x:.0f}" for x in (each / 1e6, 1e3 * products, 1e3 * carried)]
        rows.append((name, size, *numbers, f"{carried / (products + carried):.0%}"))
table(
    ["shape", "ranks", "an all-reduce, MB", "products, ms", "collectives, ms", "collectives' share"],
    rows,
    "lrrrrr",
)

# %% [markdown]
# Products shrink with the number of ranks, while the bytes of an all-reduce do not. A slower link makes this
# worse: over PCIe at a tenth of the bandwidth, the collectives of this table would take ten times as long.
#
# ## A few rows
#
# After each row-parallel product come two kernels: NCCL's all-reduce, which writes the sum, and `add_norm`,
# which reads it, adds the residual stream and normalises. If they were one, how many bytes would be saved?

# %%
rows = []
for name in NAMES:
    c = configs[name]
    fewer = 2 * c.num_layers  # the all-reduce of the embedding is followed by a norm without a residual
    for tokens in (1, 256, TOKENS):
        separate, joined = 5 * c.hidden_size * 2, 3 * c.hidden_size * 2
        # `add_norm` after the all-reduce wrote: write, read, read residual, write both; then the last three
        moved = fewer * tokens * (separate - joined)
        rows.append(
            (name, f"{tokens:,}", fewer, f"{moved / 1e6:,.1f}", f"{1e6 * moved / H200.bandwidth:,.1f}")
        )
table(["shape", "tokens", "kernels fewer", "MB fewer", "µs at a copy's speed"], rows, "lrrrr")

# %% [markdown]
# In prefill it is 1 to 20 ms of memory traffic, beside the products and collectives of the table above. With
# few rows the bytes do not matter. There, what counts is how often ranks wait for each other, and that
# kernels come and go.
#
# NCCL is made for large tensors, of which each rank adds up a part and hands it out. For ten kilobytes there
# is a shorter way, *one-shot*: each rank lays its part where the others can read it, says so, waits until all
# have, and adds up all parts itself. GPUs of one machine can read each other's memory over NVLink as if it
# were their own. And what a rank has then are whole rows, in registers, so the same kernel adds the residual
# stream and normalises. This is all of it, with `PDL` and `begin` as in [lesson 5](5-overlap.md):

# %% tags=["hide-input"]
one_shot = kernels("stage6_parallel/one_shot.py")
show(one_shot._reduce_add_norm)
show(one_shot._meet)

# %% [markdown]
# Three things in it are worth a thought:
#
# - **Who may write again?** A rank that is done goes on to the next all-reduce, and would overwrite its part
#   while a slower rank still reads it. So of each row there are two copies, used in turn. A rank cannot be
#   two meetings ahead: at the one between, it waited for all.
# - **Nobody resets anything.** Ranks count their meetings over each row, and a rank has come when it has
#   written the number of this one. So a CUDA graph may replay it: the numbers are in memory, not in the
#   graph.
# - **All add in the same order.** Sums of floats depend on it, and ranks whose residual streams differ in the
#   last bit would one day draw different tokens.
#
# Each rank reads `n-1` times its own bytes, where NCCL sends `2 (n-1)/n` times as many. So what would be more
# than 4 MB to read is left to NCCL.
#
# ### And the vocabulary
#
# The other collective of a step puts logits side by side: 39 MB from each of two ranks at 256 rows. But to
# draw a token takes only the best of them, logit over temperature plus noise, and the noise depends on the
# token's id, not on who draws it. So in a graph each rank draws among its own tokens, and what it hands out
# is its best of each 4,096 tokens: a score and an id. Whoever asks for log-probabilities or top-p still gets
# all logits gathered.
#
# ## Measured on several GPUs
#
# Two H200s of one machine, with NVLink. First the collectives alone, inside a CUDA graph, for the hidden size
# of Qwen3-32B (5,120 numbers a row), in microseconds:

# %% tags=["hide-input"]
RESULTS = ROOT / "benchmarks/results"
measured = json.loads((RESULTS / "stage6-collectives-2xh200.json").read_text())
columns = {
    "all_reduce": "all-reduce",
    "all_reduce, then add_norm": "all-reduce, then add_norm",
    "both in one kernel": "both in one kernel",
    "all_gather of logits": "all-gather of logits",
    "all_gather of candidates": "all-gather of the best",
}
table(
    ["rows", "kB each", *columns.values()],
    [
        (
            f"{result['rows']:,}",
            f"{result['bytes'] / 1e3:,.0f}",
            *(f"{times[name]:,.1f}" if name in times else "NCCL's" for name in columns),
        )
        for result in measured["results"]
        for times in [result["microseconds"]]
    ],
    "rr" + "r" * len(columns),
)
by_rows = {result["rows"]: result for result in measured["results"]}
few, many = by_rows[1]["microseconds"], by_rows[16_384]
assert few["both in one kernel"] < 0.6 * few["all_reduce"]
link = many["bytes"] / many["microseconds"]["all_reduce"] / 1e3  # with two ranks, 2 (n-1)/n is 1
rows_saved = 2 * configs["qwen3-32b"].num_layers + 1
saved = rows_saved * (few["all_reduce, then add_norm"] - few["both in one kernel"])
print(f"an all-reduce of {many['bytes'] / 1e6:.0f} MB: {link:.0f} GB/s, where the calculation assumes 350")
print(
    f"a step of one row of Qwen3-32B has {rows_saved} of them: {saved / 1e3:.2f} ms less in one kernel each"
)

# %% [markdown]
# The guess of 10 µs was right for NCCL; the kernel of this stage takes little more than half of it. And the
# engine, with random weights of Qwen3-32B's shape:

# %% tags=["hide-input"]
engine_file = json.loads((RESULTS / "stage6-qwen3-32b-2xh200.json").read_text())
by_size = {}
for result in engine_file["results"]:
    size = result["tp"] if result.get("one_shot", True) else "NCCL"
    by_size.setdefault(result["workload"], {})[size] = result
rows = []
for workload, found in by_size.items():
    faster = f"{found[1]['seconds'] / found[2]['seconds']:.2f}" if 1 in found else "-"
    cells = []
    for size in (1, 2):
        cells += [f"{found[size]['seconds']:.2f} s" if size in found else "-"]
        cells += [f"{found[size]['of_limit']:.0%}" if size in found else "-"]
    rows.append((workload, *cells, faster))
table(["workload", "one GPU", "of its limit", "two GPUs", "of theirs", "times as fast"], rows, "lrrrrr")
table(
    ["measured on", "collectives", "engine"],
    [
        *((name, measured[name], engine_file[name]) for name in ("hardware", "model", "commit")),
        ("command", code(measured["command"]), code(engine_file["command"])),
    ],
)
print(engine_file["note"])

# %% [markdown]
# (The *limit* is [the benchmark's](../bench.md), without any collectives, and on two GPUs half of it.)
#
# One request and 32 gain 1.74 times from the second GPU, 256 gain 1.6; the shared prompt gains least.
# Where a step of one request goes, a trace of rank 0 tells, by `--trace`:

# %% tags=["hide-input"]
traced = json.loads((RESULTS / "stage6-trace-2xh200.json").read_text())
decodes = traced["host"]["upload of a graph's inputs"]["count"]
steps = decodes + 1  # the prompt's, which has other kernels for matrix products and attention
NAMES = {
    "_linear": "matrix products",
    "_reduce_add_norm": "all-reduce + add + RMSNorm",
    "_decode": "attention",
    "nvjet_sm90_tst_192x8_64x8_2x1_v_bz_TNT": "the head",
    "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<409": "all-gather of the best tokens",
    "_draw_in_block": "the draw",
}
spent = {r["kernel"]: r for r in traced["results"]}
whole = sum(spent[kernel]["milliseconds"] for kernel in NAMES)
table(
    ["kernel", "a step has", "ms in a step", "share"],
    [
        (
            name,
            f"{spent[kernel]['count'] / count:.0f}",
            f"{spent[kernel]['milliseconds'] / count:.3f}",
            f"{spent[kernel]['milliseconds'] / whole:.1%}",
        )
        for kernel, name in NAMES.items()
        for count in [decodes if kernel in ("_linear", "_decode") else steps]
    ],
    "lrrr",
)
assert spent["_reduce_add_norm"]["count"] == steps * (2 * configs["qwen3-32b"].num_layers + 1)

# %% [markdown]
# Two collectives a layer, the embedding's and one at the end, counted: they take 7% of the step, and the GPU
# is never idle between kernels. The rest of what is lost is lost in the matrix products. In an earlier trace
# gate and up took 95 µs of each layer's 171, where their bytes take 61. With half as many rows of weights in
# a block of the kernel they take 64 µs alone, and one request got 107 tokens a second instead of 89. The
# trace here is from after that.
#
# And what does the kernel of this stage save in the engine? The same with `--no-one-shot`, where NCCL does
# every all-reduce:

# %% tags=["hide-input"]
table(
    ["workload", "NCCL, ms a step", "in one kernel", "less", "alone, it should be"],
    [
        (
            workload,
            *(f"{1e3 * x:.2f}" for x in (slow, fast, slow - fast)),
            f"{rows_saved * (alone['all_reduce, then add_norm'] - alone['both in one kernel']) / 1e3:.2f}",
        )
        for workload, found in by_size.items()
        if "NCCL" in found
        for slow, fast in [(found["NCCL"]["seconds"] / 512, found[2]["seconds"] / 512)]
        for alone in [by_rows[int(workload.split()[0])]["microseconds"]]
    ],
    "lrrrr",
)
one = by_size["1 request, 128 in, 512 out"]
assert one["NCCL"]["seconds"] > 1.05 * one[2]["seconds"]

# %% [markdown]
# (Each run has 512 steps, that of the prompts among them.) It saves more than the kernels alone would,
# perhaps because a kernel that follows NCCL's cannot come early and wait on the GPU. But these are single
# runs.
#
# Llama-3.1-70B, which one GPU cannot hold, on two:

# %% tags=["hide-input"]
larger = json.loads((RESULTS / "stage6-llama-3.1-70b-2xh200.json").read_text())
table(
    ["workload", "two GPUs", "of their limit", "new tokens a second"],
    [
        (
            r["workload"],
            f"{r['seconds']:.2f} s",
            f"{r['of_limit']:.0%}",
            "-" if "prefill" in r["workload"] else f"{r['tokens_per_second']:,.0f}",
        )
        for r in larger["results"]
    ],
    "lrrr",
)
table(
    ["measured on", ""],
    [
        *((name, larger[name]) for name in ("hardware", "model", "commit")),
        ("command", code(larger["command"])),
    ],
)

# %% [markdown]
# Both through the server, loaded from another process with `python -m minisgl.bench online`:

# %% tags=["hide-input"]
online = json.loads((RESULTS / "stage6-online-2xh200.json").read_text())
table(
    [
        "shape",
        "requests x tokens in, out",
        "tokens/s",
        "first token, p50 and p99",
        "next tokens, p50 and p99",
    ],
    [
        (
            r["shape"],
            r["workload"],
            f"{r['output_tokens_per_s']:,.0f}",
            " and ".join(f"{r['ttft_ms'][p] / 1e3:.2f}" for p in ("p50", "p99")) + " s",
            " and ".join(f"{r['itl_ms'][p]:.1f}" for p in ("p50", "p99")) + " ms",
        )
        for r in online["results"]
    ],
    "llrrr",
)
assert all(r["failed"] == 0 for r in online["results"])
table(
    ["measured on", ""],
    [
        *((name, online[name]) for name in ("hardware", "commit")),
        ("command", code(online["command"])),
    ],
)

# %% [markdown]
# The server costs nothing that these loads would show: the last one of each is as fast as the workload of
# about the same size without a server, 4,850 tokens a second beside 4,597 (4,824 in an earlier run), and
# 2,694 beside 2,659. Short answers to many prompts at once are bound by reading the prompts. In the first
# row, some of the first requests waited for what is done once, such as compiling; so did some in the
# tables above, whose runs are the first of their engine.
#
# (The server was measured when the kernel's memory was PyTorch's symmetric memory, before
# `peer_memory.py`. The kernel is the same.)
#
# ### And on four
#
# Both shapes on four H200s of one machine, one run of each without a warm-up, and of one request the second:

# %% tags=["hide-input"]
rows, origins = [], []
for name in ("qwen3-32b", "llama-3.1-70b"):
    two, four = (json.loads((RESULTS / f"stage6-{name}-{n}xh200.json").read_text()) for n in (2, 4))
    on_two = {r["workload"]: r["seconds"] for r in two["results"] if r["tp"] == 2 and r.get("one_shot", True)}
    for r in four["results"]:
        before, now = on_two[r["workload"]], r["seconds"]
        times = (f"{before:.2f} s", f"{now:.2f} s", f"{r['of_limit']:.0%}", f"{before / now:.2f}")
        rows.append((name, r["workload"], *times))
    origins.append((four["hardware"], four["model"], four["commit"], code(four["command"])))
table(["shape", "workload", "two GPUs", "four GPUs", "of their limit", "times as fast"], rows, "llrrrr")
table(["measured on", "model", "commit", "command"], origins)

# %% [markdown]
# Twice the GPUs are 1.5 to 1.8 times as fast, most where long prompts keep the matrix products large; the
# shared prompt gains less, in runs of 3 s that pay for compiling what they are the first to need. A request
# of Qwen3-32B gets 163 tokens a second, where two GPUs gave 107 and one 62. What a matrix product loses by
# being cut in four, and what the collectives of four ranks take, was not traced. (Qwen3-32B's 256 requests
# did not end in the time that there was.)
#
# **Not measured**: more than four GPUs.
#
# All that this page ran itself, it ran here:

# %% tags=["hide-input"]
table(["measured on", ""], [*machine(), ("model", "built-in, float64"), ("command", code("make docs"))])

# %% [markdown]
# ## The end, and the beginning
#
# This was the last stage. `minisgl` exports its engine, with one rank or many, and `python -m minisgl.launch
# --tp 2` serves it. From a loop that read everything again for each token, six swaps have led here, and the
# first engine is still the judge of the last.
#
# ## What to read next
#
# - `stages/stage6_parallel/engine.py`: `build`, and how a rank becomes a leader or a follower.
# - `stages/stage6_parallel/peer_memory.py`: how a GPU comes to see another's memory.
# - `stages/stage6_parallel/watch.py`: how a rank's end is noticed and its cause named.
# - `tests/stage6/test_oracle.py`: arrivals, aborts and preemptions, on one, two and four ranks.
# - `tests/stage6/test_lifecycle.py`: servers whose ranks are killed, stopped and interrupted.
# - Megatron-LM[^megatron], of which section 3 has the cuts of this page. A later paper[^sequence] replaces
#   each all-reduce by its two halves and normalises between them, on a part of the tokens each.
# - The [glossary](../glossary.md) has the new words.
#
# [^megatron]: M. Shoeybi et al., *Megatron-LM: Training Multi-Billion Parameter Language Models Using Model
#     Parallelism*, 2019.
# [^sequence]: V. Korthikanti et al., *Reducing Activation Recomputation in Large Transformer Models*, MLSys
#     2023.
