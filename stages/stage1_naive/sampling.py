"""From logits to tokens: penalties, filters, and a draw that depends on nothing but its own request.

`sample` works on rows [R, V] without a Python loop over them, so later stages sample whole batches with it.
The draw is the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014): the argmax of logits / T + noise is
distributed as softmax(logits / T). The noise of a row is a hash of its request's seed, the position and the
token id, so a text depends neither on the batch nor on the order of arrival.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.interface import MAX_LOGPROBS, Request, TokenLogprobs
from stages.stage1_naive.mask import apply_mask

_COLDEST = 1e-5  # a temperature below is greedy: dividing by it would overflow
_PIECE = 256  # rows of a prompt's logits at once: all of them would be larger than the model


@dataclass(frozen=True)
class Penalties:
    """What keeps a model from repeating itself."""

    in_prompt: Tensor  # [R, V] bool
    counts: Tensor  # [R, V] int32, how often each token was generated
    repetition: Tensor  # [R] float32
    frequency: Tensor  # [R] float32
    presence: Tensor  # [R] float32

    def apply(self, logits: Tensor) -> Tensor:
        """[R, V] -> [R, V]. Repetition as in CTRL (Keskar et al. 2019), the others as in OpenAI's API."""
        generated = self.counts > 0
        repetition = self.repetition.unsqueeze(1)
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(self.in_prompt | generated, repeated, logits)
        return logits - self.frequency.unsqueeze(1) * self.counts - self.presence.unsqueeze(1) * generated


@dataclass(frozen=True)
class Filters:
    """Which tokens may be drawn at all."""

    top_k: Tensor  # [R] int64; the vocabulary's size where it is off
    top_p: Tensor  # [R] float32
    min_p: Tensor  # [R] float32

    def apply(self, logits: Tensor) -> Tensor:
        """[R, V], divided by the temperature -> [R, V] with -inf for what is cut: by top-k, then by top-p
        (nucleus sampling, Holtzman et al. 2020), then by min-p (Nguyen et al. 2024). Tokens that tie with
        the last one kept are kept as well.
        """
        descending = logits.sort(dim=-1, descending=True).values
        rank = torch.arange(logits.shape[-1], device=logits.device)
        keep = rank < self.top_k.unsqueeze(1)
        probs = descending.masked_fill(~keep, -torch.inf).softmax(dim=-1)
        before = probs.cumsum(dim=-1) - probs  # of all more probable tokens together
        top_p = self.top_p.unsqueeze(1)
        keep &= (before < top_p) | (top_p >= 1.0)  # off must stay exactly off: a sum may round to above 1
        keep &= probs >= self.min_p.unsqueeze(1) * probs[:, :1]
        keep[:, 0] = True  # a top_p that rounds to 0 still leaves the best
        last = keep.sum(dim=-1, keepdim=True) - 1  # what is kept is a beginning of the sorted row
        return logits.masked_fill(logits < descending.gather(-1, last), -torch.inf)


@dataclass(frozen=True)
class SamplingBatch:
    """The sampling parameters of R rows, on the device. Costly parts that no row asks for are None."""

    temperature: Tensor  # [R] float32
    seeds: Tensor  # [R] int64
    positions: Tensor  # [R] int64, where in its sequence the token will stand
    penalties: Penalties | None = None
    bias: Tensor | None = None  # [R, V] float32
    mask: Tensor | None = None  # [R, ceil(V / 32)] int32, see `mask.py`
    filters: Filters | None = None
    logprobs: bool = False  # of MAX_LOGPROBS tokens a row, however few it asked for: ties depend on how many

    @classmethod
    def of(
        cls, rows: Sequence[tuple[Request, Sequence[int]]], vocab_size: int, device: torch.device
    ) -> "SamplingBatch":
        """For requests and the tokens generated for each so far."""
        params = [request.params for request, _ in rows]

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        def integers(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        penalties = bias = filters = None
        if any(p.has_penalties for p in params):
            counts = torch.stack([count_tokens(output, vocab_size) for _, output in rows])
            in_prompt = torch.stack([count_tokens(request.prompt, vocab_size) for request, _ in rows]) > 0
            penalties = Penalties(
                in_prompt=in_prompt.to(device),
                counts=counts.to(device),
                repetition=column([p.repetition_penalty for p in params]),
                frequency=column([p.frequency_penalty for p in params]),
                presence=column([p.presence_penalty for p in params]),
            )
        if any(p.logit_bias for p in params):
            bias = torch.zeros(len(rows), vocab_size)
            for row, p in enumerate(params):
                bias[row, list(p.logit_bias)] = torch.tensor(list(p.logit_bias.values()), dtype=torch.float32)
            bias = bias.to(device)
        if any(p.has_filters for p in params):
            filters = Filters(
                top_k=integers([p.top_k or vocab_size for p in params]),
                top_p=column([p.top_p for p in params]),
                min_p=column([p.min_p for p in params]),
            )
        return cls(
            temperature=column([p.temperature for p in params]),
            seeds=integers([request.seed for request, _ in rows]),
            positions=integers([len(request.prompt) + len(output) for request, output in rows]),
            penalties=penalties,
            bias=bias,
            filters=filters,
            logprobs=any(p.logprobs is not None for p in params),
        )

    def adjust(self, logits: Tensor) -> Tensor:
        """[R, V] -> [R, V]: penalised, biased and masked; in float32 or wider where something is added."""
        if self.penalties is not None:
            logits = self.penalties.apply(_wide(logits))
        if self.bias is not None:
            logits = _wide(logits) + self.bias
        return logits if self.mask is None else apply_mask(logits, self.mask)


def count_tokens(token_ids: Sequence[int], vocab_size: int) -> Tensor:
    """How often each token occurs, [V] int32."""
    return torch.tensor(token_ids, dtype=torch.int64).bincount(minlength=vocab_size).to(torch.int32)


@dataclass(frozen=True)
class Sampled:
    """One token a row, and the log-probabilities if any row asked for them."""

    tokens: Tensor  # [R] int64; -1 where none could be drawn: logits that are NaN or infinite, or all masked
    chosen: Tensor | None = None  # [R] float, the token's own
    top_ids: Tensor | None = None  # [R, n] int64, the most probable first
    top_values: Tensor | None = None  # [R, n] float

    def logprobs(self, row: int, count: int) -> TokenLogprobs:
        """Those of one row, with the `count` most probable alternatives."""
        return self.all_logprobs(count, slice(row, row + 1))[0]

    def all_logprobs(self, count: int, rows: slice = slice(None)) -> list[TokenLogprobs]:
        """Those of several rows."""
        if self.chosen is None or self.top_ids is None or self.top_values is None:
            raise ValueError("no row of this batch asked for log-probabilities")
        columns = (self.chosen[rows], self.top_ids[rows, :count], self.top_values[rows, :count])
        each = zip(*(column.tolist() for column in columns), strict=True)
        return [TokenLogprobs(own, list(zip(ids, values, strict=True))) for own, ids, values in each]


def sample(logits: Tensor, batch: SamplingBatch) -> Sampled:
    """One token for each row of `logits` [R, V]."""
    logits = _wide(logits)
    adjusted = batch.adjust(logits)
    temperature = batch.temperature.unsqueeze(1)
    scaled = adjusted / temperature.clamp(min=_COLDEST)
    if batch.filters is not None:
        scaled = batch.filters.apply(scaled)
    noisy = scaled + gumbel_noise(batch.seeds, batch.positions, logits.shape[-1], logits.dtype)
    best, tokens = torch.where(temperature < _COLDEST, adjusted, noisy).max(dim=-1)
    tokens = torch.where(best.isfinite(), tokens, -1)  # of a row with NaN that is the best, and so is inf
    return scored(logits, tokens) if batch.logprobs else Sampled(tokens)


def scored(logits: Tensor, tokens: Tensor) -> Sampled:
    """`tokens` [R] with the log-probabilities that `logits` [R, V] give them and the most probable ones."""
    logprobs = _wide(logits).log_softmax(dim=-1)
    top = logprobs.topk(min(MAX_LOGPROBS, logits.shape[-1]), dim=-1)
    chosen = logprobs.gather(-1, tokens.clamp(min=0).unsqueeze(1)).squeeze(1)
    return Sampled(tokens, chosen, top.indices, top.values)


def score_prompt(logits: Callable[[Tensor], Tensor], hidden: Tensor, tokens: Tensor) -> list[Sampled]:
    """What a model's `logits` say at P positions, `hidden` [P, H], of the `tokens` [P] that come next there:
    in pieces, one after the other."""
    pieces = zip(hidden.split(_PIECE), tokens.split(_PIECE), strict=True)
    return [scored(logits(rows), following) for rows, following in pieces]


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """Standard Gumbel noise for each token of each row: `seeds`, `positions` [R] int64 -> [R, V] `dtype`.

    The bits come from integer arithmetic alone, so every device and every kernel can make the same.
    """
    low, high, position = seeds.to(torch.int32), (seeds >> 32).to(torch.int32), positions.to(torch.int32)
    first = _mix(_mix(_mix(low) ^ high) ^ position).unsqueeze(1)  # two keys a row: 64 bits
    second = _mix(_mix(_mix(high ^ 0x5BD1E995) ^ low) ^ position).unsqueeze(1)
    tokens = torch.arange(vocab_size, dtype=torch.int32, device=seeds.device)
    bits = _mix(_mix(tokens ^ first) ^ second)  # [R, V], of which 31 are used
    uniform = (((bits >> 1) & 0x7FFFFFFF).to(dtype) + 0.5) * 2.0**-31
    uniform = uniform.clamp(max=1 - 2.0**-24)  # float32 rounds the largest to 1, whose noise is -inf
    return -torch.log(-torch.log1p(-uniform))  # log1p: exact where it matters, at the large noises


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32 bits in which every input bit flips every output bit half of the time.

    Shifts and constants are from the hash-prospector search (Wellons 2018); int32 products wrap.
    """
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x21F0AAAD
    x = (x ^ ((x >> 15) & 0x1FFFF)) * 0x735A2D97
    return x ^ ((x >> 15) & 0x1FFFF)
