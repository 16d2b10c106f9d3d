"""Which part of every weight a rank holds: tensor parallelism as in Megatron-LM (Shoeybi et al. 2019).

Of two matrix products in a row the first is cut by rows of its weight, so that each rank computes some of
the heads (or of the MLP's channels) from the whole input, and the second by columns, so that each rank adds
its part to the whole output. Only that sum needs the other ranks: once after attention, once after the MLP.
The embedding and the head are cut by rows too, which are the vocabulary's tokens, and get rows of zeros at
the end until their number divides. Norms are whole everywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from stages.stage1_naive.config import ModelConfig
from stages.stage1_naive.model import Ops, Transformer
from stages.stage1_naive.weights import Checkpoint, Read, load_model, random_reader, tensor_shapes


def check_divisible(config: ModelConfig, size: int) -> None:
    """Whether a model of this shape can be cut for `size` ranks.

    Raises:
        ValueError: it cannot; the message says what does not divide and which sizes would do.
    """
    if problems := list(_problems(config, size)):
        fitting = [n for n in range(1, config.num_heads + 1) if not any(_problems(config, n))]
        raise ValueError(
            f"the model cannot be cut for tp {size}: {', '.join(problems)}; "
            f"tp may be {', '.join(map(str, fitting))}"
        )


def _problems(config: ModelConfig, size: int) -> Iterator[str]:
    for name in ("num_heads", "intermediate_size"):
        if getattr(config, name) % size:
            yield f"its {name} ({getattr(config, name)}) is no multiple of that"
    if config.num_kv_heads % size and size % config.num_kv_heads:
        yield f"its num_kv_heads ({config.num_kv_heads}) is neither a multiple nor a divisor of it"


@dataclass(frozen=True)
class Shard:
    """Part `rank` of `size`. Query heads, MLP channels and tokens are dealt out evenly; key/value heads too,
    but where ranks outnumber them several ranks hold the same one."""

    rank: int
    size: int

    def cut(self, config: ModelConfig) -> ModelConfig:
        """The shape of the weights that this rank holds, of a model that `check_divisible` passed."""
        return replace(
            config,
            num_heads=config.num_heads // self.size,
            num_kv_heads=max(1, config.num_kv_heads // self.size),
            intermediate_size=config.intermediate_size // self.size,
            vocab_size=-(-config.vocab_size // self.size),
        )

    def reader(self, checkpoint: Checkpoint, config: ModelConfig) -> Read:
        """Reads this rank's part of a tensor and nothing else of it. `config` is the whole model's.

        The bias of a product whose parts are summed is the first rank's; the others have zeros for it.
        """
        cut = self.cut(config)
        padded = replace(config, vocab_size=cut.vocab_size * self.size)
        wholes, parts = tensor_shapes(padded), tensor_shapes(cut)

        def read(name: str) -> Tensor:
            with safe_open(checkpoint.files[name], framework="pt") as tensors:
                sizes = zip(wholes[name], parts[name], strict=True)
                ranges = tuple(slice(*self._range(whole, part)) for whole, part in sizes)
                part: Tensor = tensors.get_slice(name)[ranges]  # up to the end, if that comes first
            if self.rank and name.endswith(("o_proj.bias", "down_proj.bias")):
                return torch.zeros_like(part)
            if missing := parts[name][0] - len(part):
                return F.pad(part, (0, 0, 0, missing))
            return part.contiguous()  # columns are a view until then

        return read

    def _range(self, whole: int, part: int) -> tuple[int, int]:
        """Where this rank's `part` of `whole` rows or columns begins and ends.

        The r-th of even parts begins at r * part. K key/value heads of P rows each (`part` is P then) among
        more ranks: rank r has head r * K // size, the one that its query heads attend to.
        """
        if part == whole:
            return 0, whole
        start = self.rank * whole // self.size // part * part
        return start, start + part

    def load(
        self, path: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, random: bool = False
    ) -> Transformer:
        """This rank's part of a model, or `random` weights of that shape. Its config has the vocabulary's
        whole size again, without padding, as whoever samples needs it; the other sizes are the part's."""
        cut = self.cut(config)
        if random:
            read = random_reader(cut, device, dtype, seed=self.rank)
        else:
            read = self.reader(Checkpoint(path, config), config)
        model = load_model(cut, Ops(), read, dtype, device, progress=self.rank == 0)
        return replace(model, config=replace(cut, vocab_size=config.vocab_size))
