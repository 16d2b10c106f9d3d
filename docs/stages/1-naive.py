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
# # A decode loop
#
# A language model does one thing: it reads a list of tokens and says, for every token of its vocabulary, how
# well that token would come next. Chat, streaming and servers are built around a loop of five lines:
#
# ```python
# tokens = prompt
# while tokens[-1] != END:
#     scores = model(tokens)         # one number for every token of the vocabulary
#     token = choose(scores)         # the best one, or a draw
#     tokens = tokens + [token]
# ```
#
# This lesson reads an engine that runs this loop for real checkpoints: Llama 3, Qwen2.5, Qwen3 and Mistral.
# It is complete and correct, and at the end you will have measured why nobody serves with it. Every block
# of code on this page is either the repository's own, with its path and line numbers, or a cell that was
# executed when the page was built, with what it printed below it.

# %% tags=["hide-input"]
import math
import time
from dataclasses import fields, replace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from docs.lesson import BLUE, GREY, ORANGE, canvas, code, machine, publish, show, table, token
from minisgl.builtin import PATH
from stages.interface import Engine, EngineConfig, Request, SamplingParams, TokenOutput
from stages.stage1_naive.attention import QKV, NaiveAttention, rope_table
from stages.stage1_naive.config import ModelConfig
from stages.stage1_naive.detokenizer import Detokenizer
from stages.stage1_naive.engine import NaiveEngine, build
from stages.stage1_naive.model import Layer, Ops, Transformer
from stages.stage1_naive.sampling import Filters, gumbel_noise, sample
from stages.stage1_naive.tokenizer import Tokenizer
from stages.stage1_naive.weights import Checkpoint, load_model

torch.set_num_threads(1)  # several wait for each other whenever another program takes a core

# %% [markdown]
# ## The nouns
#
# Four names carry the whole course. A **`Request`** is one sequence to continue:

# %% tags=["hide-input"]
show(Request)

# %% [markdown]
# Its `params` are **`SamplingParams`**: temperature, filters, penalties, when to stop. What comes back, one
# token at a time, is a **`TokenOutput`**:

# %% tags=["hide-input"]
show(TokenOutput)

# %% [markdown]
# And an **`Engine`** turns the one into the other, a step at a time:

# %% tags=["hide-input"]
show(Engine)

# %% [markdown]
# Two decisions hide in these lines. An engine knows token ids and no text, so it never waits for a tokenizer.
# And `step` returns a *list* of outputs, of any requests, although this stage brings one at a time. Every
# stage keeps this interface, and the server above never notices which one it drives.
#
# ## Text to tokens
#
# A tokenizer cuts text into pieces that it knows and numbers them. A chat needs one more thing: the model
# must see who said what. Each model comes with a *chat template* that writes the turns, and the marks
# between them, as one text. Here is a question to the model that ships with this repository:

# %%
tokenizer = Tokenizer(PATH)
prompt = tokenizer.chat([{"role": "user", "content": "Why is the first engine so slow?"}])

print("".join(tokenizer.token(t) for t in prompt))

# %% [markdown]
# The text ends where the assistant's turn begins: whatever the model finds likely now *is* the answer. What
# the model gets to see are the ids:

# %%
for t in prompt:
    print(f"{t:5}  {tokenizer.token(t)!r}")

# %% [markdown]
# The way back has a trap. The vocabulary is made of bytes[^bpe], and a character may be several, so one
# token can be part of a character. The `Detokenizer` holds such a part back until the rest has come:

# %%
detokenizer = Detokenizer(tokenizer, prompt)
[detokenizer.push(t) for t in tokenizer.encode("cache 🌳!")]

# %% [markdown]
# ## The Transformer, from top to bottom
#
# The model is a *decoder-only Transformer*[^transformer] in the shape that Llama gave it[^llama]. This is
# all of it; `T` is the number of tokens, `H` the size of the vector that stands for each:

# %% tags=["hide-input"]
show(Transformer.hidden)
show(Transformer.logits)

# %% [markdown]
# Read it as a stream. `embed` looks up a vector for each token. Then every layer adds to that vector
# twice: first *attention*, which moves information between positions, then an *MLP*, which works on each
# position alone. The sum is called the residual stream; each part reads a normalised copy of it, so
# `add_norm` does both, adding the last result and normalising for the next reader. At the end `logits`
# compares the final vector with every token's row of the `head`.
#
# The model calls everything through `ops` and `attend`. That is how later stages make it faster without
# touching it, and it also lets us watch. We load the built-in model, keep one layer, and wrap each
# function so that it writes down the shapes it sees:

# %%
config, cpu = ModelConfig.load(PATH), torch.device("cpu")
read = Checkpoint(PATH, config).read
model = load_model(config, Ops(), read, torch.float32, cpu, progress=False)
attend = NaiveAttention(QKV(config, rope_table(config, config.context_length, cpu)))
seen = []


def shapes(values):
    return ", ".join(str(list(v.shape)) for v in values if isinstance(v, Tensor))


def watched(name, function):
    def call(*args):
        result = function(*args)
        results = result if isinstance(result, tuple) else (result,)
        seen.append((code(name), shapes(args), shapes(results)))
        return result

    return call


ops = Ops(**{f.name: watched(f.name, getattr(Ops, f.name)) for f in fields(Ops)})
one_layer = replace(model, layers=model.layers[:1], ops=ops)
hidden = one_layer.hidden(torch.tensor(prompt), torch.arange(len(prompt)), watched("attend", attend))
scores = one_layer.logits(hidden[-1:])

# %% tags=["hide-input"]
table(["call", "tensors in", "tensors out"], seen)

# %% [markdown]
# The sizes are those of the built-in model:

# %% tags=["hide-input"]
sizes = {
    "H, hidden": config.hidden_size,
    "layers": config.num_layers,
    "N, query heads": config.num_heads,
    "K, key/value heads": config.num_kv_heads,
    "D, head size": config.head_dim,
    "I, intermediate": config.intermediate_size,
    "V, vocabulary": config.vocab_size,
}
table(list(sizes), [list(sizes.values())], "r" * len(sizes))

# %% [markdown]
# Follow the first `linear`. Attention needs three projections of the same input: a query, a key and a value
# for every head. A checkpoint stores three matrices; ours were stacked into one when they were loaded:

# %% tags=["hide-input"]
show(Layer)

# %% [markdown]
# **Why fused?** Rows of a matrix product do not know of each other, so stacking three matrices gives exactly
# the three results side by side. But the input is read once instead of three times, there is one kernel to
# launch instead of three, and one large product keeps a GPU busier than three small ones. Gate and up of
# the MLP[^swiglu] are stacked for the same reason.
#
# That result goes to `attend` as it is. Inside, it is cut into heads; q and k are normalised (in Qwen3),
# then turned by an angle that grows with their position, which is how attention knows order (RoPE[^rope]):

# %% tags=["hide-input"]
show(QKV.__call__)
show(NaiveAttention.__call__)

# %% [markdown]
# Several query heads share one key/value head[^gqa], and `is_causal` hides every later position. Remember
# this mask: what a position computes depends on itself and what stands *before* it, and on nothing else.
#
# **Why does `attend` take the raw product?** Because what happens between that product and the answer of the
# attention is what the course is about. This stage attends and forgets. The next one will store k and v; a
# later one will split, normalise, rotate and store in a single kernel. With the border drawn here, none of
# them has to reach into the model.
#
# ## From logits to a token
#
# The `head` gave one number a token, the *logits*; `softmax` makes them probabilities. Taking the largest is
# called greedy. To draw instead, three knobs shape the distribution first. To see them at work we need a
# question that can be answered in many ways. Here is how an answer to "Which one?" might begin:

# %% tags=["hide-input"]
question = "Which one?"
ids = torch.tensor(tokenizer.chat([{"role": "user", "content": question}]))
logits = model.logits(model.hidden(ids, torch.arange(len(ids)), attend)[-1:])


def probabilities(temperature=1.0, top_k=config.vocab_size, top_p=1.0):
    filters = Filters(torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([0.0]))
    return filters.apply(logits / temperature).softmax(-1)[0]


plain = probabilities()
best = plain.topk(12).indices.tolist()
labels = [token(tokenizer.token(t)) for t in best]
panels = {
    "temperature": [("0.5", BLUE, probabilities(0.5)), ("1", GREY, plain), ("2", ORANGE, probabilities(2.0))],
    "top_k = 5": [("before", GREY, plain), ("after", BLUE, probabilities(top_k=5))],
    "top_p = 0.7": [("before", GREY, plain), ("after", BLUE, probabilities(top_p=0.7))],
}
figure, axes = canvas(7.6, 3.8, columns=3, sharey=True)
for axis, (title, series) in zip(axes, panels.items(), strict=True):
    height = 0.8 / len(series)
    for i, (label, colour, p) in enumerate(series):
        rows = [row - 0.4 + (i + 0.5) * height for row in range(len(best))]
        axis.barh(rows, p[best], height=height, color=colour, label=label)
    axis.set_title(title)
    axis.set_xlabel("probability")
    axis.tick_params(left=False)
    axis.legend(loc="lower right")
axes[0].set_yticks(range(len(best)), labels)
axes[0].invert_yaxis()
publish(
    figure,
    "Bar charts of the most probable next tokens under three temperatures, top-k and top-p",
    f"The {len(best)} most probable first tokens of an answer to “{question}”. What top-k or top-p cut gets "
    "nothing; the others share what it had.",
)

# %% [markdown]
# *Temperature* divides the logits: below 1 the favourites gain, above 1 the others do. *Top-k* keeps the k
# most probable tokens. *Top-p*[^nucleus] keeps the fewest that together hold the probability p, so it cuts
# much where the model is sure and little where it is not.
#
# Then comes the draw. The usual way is to build cumulative sums and see where a random number falls. This
# engine uses the *Gumbel-max trick*[^gumbel]. It adds random noise to each logit and takes the argmax. If the
# noise is `-log(-log(u))` with `u` uniform, the winner is distributed exactly as the softmax says:

# %% tags=["hide-input"]
show(sample)

# %% [markdown]
# "Exactly" can be checked. We draw the same position with many seeds, and count:

# %%
draws = 4000
noise = gumbel_noise(torch.arange(draws), torch.full((draws,), len(ids)), config.vocab_size, torch.float32)
counts = (logits + noise).argmax(-1).bincount(minlength=config.vocab_size)

table(
    ["token", "softmax", f"share of {draws} draws"],
    [(code(token(tokenizer.token(t))), f"{plain[t]:.3f}", f"{counts[t] / draws:.3f}") for t in best[:6]],
    "lrr",
)

# %% [markdown]
# The trick is not there for speed. It is there because the noise is a pure function:

# %% tags=["hide-input"]
show(gumbel_noise)

# %% [markdown]
# A generator with a state would give its next number to whoever asks next, and your text would depend on
# who else is being served. Here the noise is a hash of the request's seed, the position and the token, and
# of nothing else. A request that is alone, shares a batch, or is stopped and computed again gets the same
# tokens. Below, the noise of one request is made alone, and as the second row of three:

# %%
position, size = 21, 5
alone = gumbel_noise(torch.tensor([7]), torch.tensor([position]), size, torch.float32)
batch = gumbel_noise(torch.tensor([1, 7, 3]), torch.tensor([80, position, 5]), size, torch.float32)

print(alone[0])
print(batch[1])
assert torch.equal(alone[0], batch[1])

# %% [markdown]
# ## The engine
#
# Now all parts are there, and the engine is short. `build` puts them together. It is the function to open
# first in every stage, because it names the parts:

# %% tags=["hide-input"]
show(build)

# %% [markdown]
# Requests wait in a dictionary, which keeps the order of arrival. A step serves the oldest:

# %% tags=["hide-input"]
show(NaiveEngine.step)
show(NaiveEngine._next_token)

# %% [markdown]
# Here is our loop of five lines again. `token_ids` is the *whole* sequence, prompt and output so far;
# `hidden` runs all of it through the model; and of all those rows, only the last one is used, since it alone
# predicts a token that does not exist yet.
#
# ## A first answer
#
# Time to let it speak. Greedy, so that the answer is always the same, and with log-probabilities, to see what
# the model thought of each token:

# %%
engine = build(EngineConfig(model=str(PATH), device="cpu"))
engine.add(Request("first", prompt, SamplingParams(temperature=0, logprobs=3, max_tokens=200)))

answer = []
while engine.has_work:
    answer += engine.step()

assert answer[-1].finish_reason == "stop"
print(tokenizer.decode([output.token_id for output in answer]))


# %% tags=["hide-input"]
def named(token_id):
    return code(token(tokenizer.token(token_id)))


rows = []
for number, output in enumerate(answer[:12], start=1):
    top = [(t, math.exp(logprob)) for t, logprob in output.logprobs.top if t != output.token_id]
    others = ", ".join(f"{named(t)} {p:.1%}" for t, p in top if p >= 0.001)
    chosen = math.exp(output.logprobs.chosen)
    rows.append((number, named(output.token_id), f"{chosen:.1%}", others or "nothing"))
table(["", "token", "probability", "what else it might have said"], rows, "rlrl")
print(f"{len(prompt)} prompt tokens, {len(answer)} answer tokens, finish_reason {answer[-1].finish_reason!r}")

# %% [markdown]
# The table shows the first tokens; a blank is written ␣. A model this small knows its answers by heart: it
# decides which one to give within a few tokens, and recites. Large models hesitate more often, but the
# loop around them is the same.
#
# A server that forwards each `TokenOutput` at once is *streaming*. The last token is the template's
# end-of-turn mark. It is counted but not shown, and its `finish_reason` is "stop": the model has decided
# that it is done.
#
# ## What it costs
#
# The answer was an example of what it speaks about. For each of its tokens the engine read the question
# again, and everything written since. So the more has been said, the longer the next token takes. We
# measure one step at several lengths:


# %%
def seconds_per_token(length, repeats):
    times = []
    for _ in range(repeats):
        engine.add(Request("probe", text[:length], one_token))
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    return min(times)  # what others do on this machine can only add


text = prompt * 100  # the question again and again: only the length matters here
one_token = SamplingParams(max_tokens=1)
lengths = [1, 16, 32, 64, 128, 256, 384, 512, 640, 768, 896, 1024]
milliseconds = [1000 * seconds_per_token(length, repeats=5) for length in lengths]

# %% tags=["hide-input"]
figure, axis = canvas(8, 3.6)
axis.plot(lengths, milliseconds, color=ORANGE, marker="o", markersize=5)
axis.axhline(milliseconds[0], color=BLUE, linestyle="--")
for text, height, colour, shift, side in (
    ("stage 1: the whole sequence", milliseconds[-1], ORANGE, (-12, 0), "center"),
    ("a single token, read alone", milliseconds[0], BLUE, (0, 6), "bottom"),
):
    place = {"xytext": shift, "textcoords": "offset points", "ha": "right", "va": side}
    axis.annotate(text, (lengths[-1], height), color=colour, **place)
axis.set_xlim(0, None)
axis.set_ylim(0, None)
axis.set_xlabel("tokens so far")
axis.set_ylabel("milliseconds for the next")
publish(
    figure,
    f"The time for one token grows from {milliseconds[0]:.0f} to {milliseconds[-1]:.0f} milliseconds",
    f"Time for one more token, the fastest of 5 steps. After {lengths[-1]} tokens it takes "
    f"{milliseconds[-1] / milliseconds[0]:.0f} times as long as after one.",
)
table(
    ["tokens so far", "ms per token", "tokens per second"],
    [
        (n, f"{ms:.1f}", f"{1000 / ms:.0f}")
        for n, ms in zip(lengths, milliseconds, strict=True)
        if n in (1, 16, 64, 256, 1024)
    ],
    "rrr",
)
table(["measured on", ""], [*machine(), ("model", "built-in, float32"), ("command", code("make docs"))])

# %% [markdown]
# The curve bends upwards. The matrix products grow in proportion to the length; attention compares every
# token with every earlier one, so it grows with the square.
#
# How much of this work is wasted? Because of the causal mask, nothing that comes later changes what an
# earlier position computed. Reading the finished text *once* would compute every key and value that the
# whole answer ever needed. PyTorch can count the operations of both:

# %%
sequence = [*prompt, *(output.token_id for output in answer[:-1])]  # what the last step read

with FlopCounterMode(display=False) as loop:
    engine.add(Request("again", prompt, SamplingParams(temperature=0, max_tokens=len(answer))))
    while engine.has_work:
        engine.step()

with FlopCounterMode(display=False) as once:
    engine.add(Request("once", sequence, SamplingParams(temperature=0, max_tokens=1)))
    engine.step()

# %% tags=["hide-input"]
steps = range(len(prompt), len(prompt) + len(answer))
done, needed = loop.get_total_flops(), once.get_total_flops()
table(
    ["", "positions", "floating-point operations"],
    [
        ("read anew for every token (stage 1)", sum(steps), f"{done / 1e9:.2f} billion"),
        ("every position once", len(sequence), f"{needed / 1e9:.2f} billion"),
        ("repeated for nothing", sum(steps) - len(sequence), f"**{1 - needed / done:.1%}**"),
    ],
    "lrr",
)

# %% [markdown]
# (The counter counts attention's masked half too, on both lines.) And this was a short answer to a short
# question. An answer of `n` tokens needs about `n²/2` positions: twice the text is four times the work.
#
# ## What stage 2 does about it
#
# The waste names its own remedy: keep the keys and values of every position, and let each step push only
# the *new* token through the model. That store is the **KV cache**. It turns a problem of arithmetic into
# one of memory: a cache for each request, which grows by a row a step, and nobody knows for how long.
# [Lesson 2](2-paged.md) cuts that memory into pages, as operating systems do, and uses what it gains to
# serve many requests in one batch. This engine stays: it is so simple that one can see that it is right,
# and so every later stage will be tested against it, token for token.
#
# ## Exercises
#
# The file `docs/exercises/stage1.py` has a stub for each. Fill it in and run
# `python -m docs.exercises.stage1` in the repository's root; it checks them against the engine.
#
# 1. **Unfuse it.** Compute query, key and value by three products from `layer.qkv`. Where does each begin?
# 2. **Count it.** Give a formula for the positions that stage 1 pushes through the model. Test it on the
#    table above.
# 3. **Score it.** Compute the log-probability of a whole answer with *one* call of `model.hidden`. Why is
#    that possible for a text that exists, but not for one that is being written?
# 4. **Take turns.** Write a `RoundRobin` engine that gives a token to each request in turn. Nobody's tokens
#    may change. Who is better off, and does any request finish sooner than before?
#
# ## What to read next
#
# - `stages/stage1_naive/engine.py`, all of it. You know every name in it now.
# - `stages/stage1_naive/weights.py`: how a folder of safetensors becomes the fused matrices.
# - `stages/stage1_naive/sampling.py`: penalties and min-p, which this page left out.
# - The [glossary](../glossary.md) has the terms of this lesson, and [Start here](../start.md) shows how to
#   put this engine behind a server.
#
# [^bpe]: R. Sennrich, B. Haddow, A. Birch, *Neural Machine Translation of Rare Words with Subword Units*,
#     2016, brought byte pair encoding to language; A. Radford et al., *Language Models are Unsupervised
#     Multitask Learners*, 2019, applied it to bytes.
# [^transformer]: A. Vaswani et al., *Attention Is All You Need*, 2017.
# [^llama]: H. Touvron et al., *LLaMA: Open and Efficient Foundation Language Models*, 2023. The norm is
#     B. Zhang and R. Sennrich, *Root Mean Square Layer Normalization*, 2019.
# [^swiglu]: N. Shazeer, *GLU Variants Improve Transformer*, 2020.
# [^rope]: J. Su et al., *RoFormer: Enhanced Transformer with Rotary Position Embedding*, 2021.
# [^gqa]: J. Ainslie et al., *GQA: Training Generalized Multi-Query Transformer Models from Multi-Head
#     Checkpoints*, 2023.
# [^nucleus]: A. Holtzman et al., *The Curious Case of Neural Text Degeneration*, 2020.
# [^gumbel]: E. J. Gumbel, *Statistical Theory of Extreme Values and Some Practical Applications*, 1954;
#     C. J. Maddison, D. Tarlow, T. Minka, *A\* Sampling*, 2014.
