"""The model's operations on a shard: a rank's own part, and the collective that makes it whole."""

from dataclasses import replace

import torch
from torch import Tensor

from stages.stage1_naive.model import Ops
from stages.stage6_parallel.communicator import Communicator


def parallel_ops(ops: Ops, rank: int, communicator: Communicator) -> Ops:
    """`ops` with the collectives around them: two a layer, one for the embedding and one for the head.

    `linear` and `mlp` stay: they know no sizes but those of the weights that they are given.
    """

    def embed(ids: Tensor, weight: Tensor) -> Tensor:
        """`ids` [T], `weight` [V / size, H] -> [T, H]: this rank's tokens, and 0 for those of others."""
        local = ids - rank * len(weight)
        mine = (local >= 0) & (local < len(weight))
        x = ops.embed(torch.where(mine, local, 0), weight)
        return x.masked_fill_(~mine.unsqueeze(1), 0)

    def add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """`x` [T, H] is a rank's part, of the embedding or of a row-parallel product."""
        few = communicator.few_rows
        if few is not None and len(x) <= few.most_rows:
            return few.add_norm(x, residual, weight, eps)
        return ops.add_norm(communicator.all_reduce(x), residual, weight, eps)

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        """`hidden` [R, H], `weight` [V / size, H] -> [R, V], the padding of V included."""
        return communicator.all_gather(ops.head(hidden, weight))

    return replace(ops, embed=embed, add_norm=add_norm, head=head)
