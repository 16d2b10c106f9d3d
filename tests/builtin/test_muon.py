"""Muon for many matrices at once against PyTorch's, which takes one after another."""

import torch
from torch.nn import Parameter

from minisgl.builtin.muon import Muon

SHAPES = [(24, 16), (16, 24), (16, 16), (24, 16), (40, 16), (16, 16)]


def test_it_steps_as_pytorch_does() -> None:
    torch.manual_seed(0)
    ours = [Parameter(torch.randn(shape)) for shape in SHAPES]
    theirs = [Parameter(matrix.detach().clone()) for matrix in ours]
    start = [matrix.detach().clone() for matrix in ours]
    pairs = [
        (Muon(ours, weight_decay=0.1), ours),
        (torch.optim.Muon(theirs, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), theirs),
    ]
    for step in range(4):
        gradients = [torch.randn(shape) for shape in SHAPES]
        for optimizer, matrices in pairs:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (step + 1)
            for matrix, gradient in zip(matrices, gradients, strict=True):
                matrix.grad = gradient.clone()
            optimizer.step()
            optimizer.zero_grad()
    for mine, other, before in zip(ours, theirs, start, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
        assert (mine - before).abs().mean() > 0.01


def test_an_update_has_singular_values_near_one() -> None:
    torch.manual_seed(0)
    matrix = Parameter(torch.zeros(64, 32))
    matrix.grad = torch.randn(64, 32)
    optimizer = Muon([matrix], weight_decay=0.0)
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    optimizer.step()
    values = torch.linalg.svdvals(matrix.detach()) / (0.2 * 64**0.5)
    assert values.min() > 0.5
    assert values.max() < 1.5
