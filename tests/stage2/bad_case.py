"""A model that cannot compute one token, and requests that meet it among others that do not."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from stages.interface import Request, SamplingParams
from tests.checkpoints import VOCAB_SIZE, write_checkpoint

BAD = 77  # its embedding is NaN


def write_bad(path: Path, family: str, **settings: Any) -> Path:
    """A checkpoint whose embedding of BAD is NaN. Its head is not."""
    write_checkpoint(path, family, **{"tie_word_embeddings": False, **settings})
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][BAD] = torch.nan
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def good_and_bad(lengths: Sequence[int], bad_every: int = 3) -> tuple[list[Request], list[Request]]:
    """Requests whose prompts begin alike, some of which have BAD in the prompt, or say it and read it."""
    rng = random.Random(0)
    tokens = [token for token in range(VOCAB_SIZE) if token != BAD]
    stem = rng.choices(tokens, k=20)
    good, bad = [], []
    for i, length in enumerate(lengths):
        prompt = [*stem[: length // 2], *rng.choices(tokens, k=length - length // 2)]
        bias, is_bad = {BAD: -100.0}, i % bad_every == 1
        if is_bad and i % 2:
            prompt[rng.randrange(length)] = BAD
        elif is_bad:
            bias = {BAD: 100.0}
        params = SamplingParams(logit_bias=bias, max_tokens=rng.randint(2, 12), ignore_eos=True, logprobs=1)
        (bad if is_bad else good).append(Request(str(i), prompt, params, seed=i))
    return good, bad
