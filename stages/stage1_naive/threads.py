"""How many threads a CPU computes with."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stages.stage1_naive.model import Transformer

# Multiply-adds of a step's largest matrix product. On two cores two threads made products of 3 to 12 million
# 1.4 times faster, of 50 million 1.6 and of 200 million 2 times, and of fewer than 8 rows not at all. But
# they wait for each other, and so for any program that takes a core: beside one, the built-in model made 89
# tokens a second with one thread and 30 with two, for 32 requests together 582 and 120.
_WORTH_SHARING = 50_000_000


@contextmanager
def fitting_threads(model: Transformer, tokens: int) -> Iterator[None]:
    """Within it a CPU computes small steps with one thread, and others with all that PyTorch has.

    `tokens` are what the step computes. A GPU's steps are not touched, nor any where OMP_NUM_THREADS says
    how many threads there shall be.
    """
    every = torch.get_num_threads()
    small = tokens * 2 * model.config.intermediate_size * model.config.hidden_size < _WORTH_SHARING
    if not small or every == 1 or model.embedding.is_cuda or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(every)
