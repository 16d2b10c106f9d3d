"""Which tokens a request may draw, as bits: a row over the vocabulary for each request that has a say in it.

A row is [ceil(V / 32)] int32. Token t is bit t % 32 of word t // 32, and 1 means that it may be drawn. So all
that a step has to bring to the device is a bit a token, whoever made it.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.interface import SamplingParams

Bits = NDArray[np.int32]


def needs_mask(params: SamplingParams, num_output: int) -> bool:
    """Whether not all tokens may be the next one, after `num_output`: by counters alone, so that this is
    known when a batch is scheduled, before its tokens are."""
    always = params.allowed_token_ids is not None or len(params.bad_words_ids) > 0
    return always or num_output < params.min_tokens


def apply_mask(logits: Tensor, bits: Tensor) -> Tensor:
    """`logits` [R, V] with -inf where `bits` [R, ceil(V / 32)] int32 are 0. NaN and inf stay, and show."""
    each = 2 ** torch.arange(8, dtype=torch.uint8, device=bits.device)
    forbidden = (bits.view(torch.uint8).unsqueeze(-1) & each).flatten(1)[:, : logits.shape[-1]] == 0
    return logits.masked_fill(forbidden & (logits < torch.inf), -torch.inf)


class RequestMask:
    """Makes the rows of one request. What does not depend on its output is made once.

    `stop_tokens` are all that would end it, which it may not draw before `min_tokens`.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, stop_tokens: Iterable[int]) -> None:
        self._params = params
        allowed = np.zeros(-(-vocab_size // 32) * 32, dtype=bool)
        ids = params.allowed_token_ids
        allowed[slice(vocab_size) if ids is None else list(ids)] = True
        words = [list(word) for word in params.bad_words_ids]
        allowed[[word[0] for word in words if len(word) == 1]] = False
        self._bits = _pack(allowed)
        allowed[[token for token in stop_tokens if token < vocab_size]] = False
        self._early = _pack(allowed)
        self._words: dict[int, list[list[int]]] = {}  # those of more tokens, by their last but one
        for word in words:
            if len(word) > 1:
                self._words.setdefault(word[-2], []).append(word)

    def needed(self, num_output: int) -> bool:
        return needs_mask(self._params, num_output)

    def row(self, tokens: Sequence[int], num_prompt: int) -> Bits:
        """For the token after `tokens`, of which `num_prompt` are the prompt: words may go on from there."""
        num_output = len(tokens) - num_prompt
        bits = self._early if num_output < self._params.min_tokens else self._bits
        begun = self._words.get(tokens[-1], ()) if num_output else ()
        for word in begun:
            if len(word) <= num_output + 1 and list(tokens[1 - len(word) :]) == word[:-1]:
                bits = bits.copy()
                bits[word[-1] // 32] &= ~np.uint32(1 << word[-1] % 32)
        return bits.view(np.int32)


def _pack(allowed: NDArray[np.bool_]) -> NDArray[np.uint32]:
    return np.packbits(allowed, bitorder="little").view(np.uint32)
