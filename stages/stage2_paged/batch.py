"""What one step computes: rows of requests, as plain Python objects."""

from dataclasses import dataclass, field
from functools import cached_property

from stages.interface import Request, TokenLogprobs
from stages.stage1_naive.mask import RequestMask
from stages.stage2_paged.prefix_cache import Prefix


@dataclass(eq=False)
class Sequence:
    """A request on its way through the engine.

    `length` counts the tokens that exist or are being sampled, `scheduled` the positions that were given
    to batches. A token in flight is counted by `length`, but not in `tokens` yet: its value is known when
    its batch is committed.
    """

    request: Request
    arrival: int
    limit: int  # tokens at which it ends, whatever they are
    tokens: list[int] = field(default_factory=list)  # prompt, then output
    length: int = 0
    scheduled: int = 0
    slot: int | None = None  # its row in the device tables, while it runs
    pages: list[int] = field(default_factory=list)  # in order of position
    prefix: Prefix = field(default_factory=Prefix)  # the part of `pages` that the prefix cache has, locked
    cached_tokens: int | None = None  # of its prompt, in the prefix cache when it was first admitted
    done: bool = False
    mask: RequestMask | None = None  # of a request that may not draw everything
    prompt_logprobs: list[TokenLogprobs] | None = None  # collected until its first output takes them along

    @property
    def in_flight(self) -> bool:
        """Whether a token is being sampled that is not committed."""
        return self.length > len(self.tokens)

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]


@dataclass(frozen=True)
class Row:
    """Positions `start` to `start + length` of one sequence, computed in one step."""

    sequence: Sequence
    slot: int
    start: int
    length: int
    first_new_page: int  # index in `sequence.pages` of the first page that the slot's page table lacks
    samples: bool  # whether its last position predicts a new token

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def enters(self) -> bool:
        """Whether it is its sequence's first row in this slot."""
        return self.first_new_page == 0

    @property
    def masked(self) -> bool:
        """Whether not all tokens may be drawn. Known before the row is computed."""
        mask = self.sequence.mask
        return mask is not None and mask.needed(self.end - len(self.sequence.request.prompt))

    @property
    def scored(self) -> int:
        """How many of its positions, from the first on, say how probable the next token of the prompt is."""
        if self.sequence.prompt_logprobs is None:
            return 0
        return max(0, min(self.end, len(self.sequence.request.prompt) - 1) - self.start)


@dataclass(frozen=True)
class Batch:
    """Rows of one step: those that decode (one position each) first, then those that prefill."""

    rows: list[Row]
    num_decode: int

    @cached_property
    def sampling(self) -> list[Row]:
        return [row for row in self.rows if row.samples]

    @cached_property
    def masked(self) -> bool:
        """Whether to sample from it takes the tokens of all batches before."""
        return any(row.masked for row in self.sampling if row.sequence.mask)
