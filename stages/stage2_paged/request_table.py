"""Who is waiting, who runs, and what they hold: slots and pages."""

from bisect import insort
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from stages.interface import Request, Statistics, TokenLogprobs, TokenOutput
from stages.stage1_naive.limits import Limits
from stages.stage2_paged.batch import Batch, Sequence
from stages.stage2_paged.kv_cache import PageAllocator
from stages.stage2_paged.prefix_cache import Prefix, PrefixCache


@dataclass(frozen=True)
class SampledToken:
    """What the device returned for one row."""

    token_id: int  # -1: none could be drawn
    logprobs: TokenLogprobs | None = None


class RequestTable:
    """All requests of an engine. It depends on nothing but the calls made to it: no clock, no device.

    Every page is free, or owned by the prefix cache, or by exactly one running request.
    """

    def __init__(
        self, limits: Limits, num_pages: int, page_size: int, max_rows: int, prefix_cache: PrefixCache
    ) -> None:
        self.limits = limits
        self.page_size = page_size
        self.waiting: list[Sequence] = []  # by arrival
        self.running: list[Sequence] = []  # by arrival; each holds a slot
        self.blocked = False  # whether the head of the queue cannot be admitted before pages come back
        self._allocator = PageAllocator(num_pages)
        self._slots = list(range(max_rows - 1, -1, -1))
        self._cache = prefix_cache
        self._sequences: dict[str, Sequence] = {}  # by request id, all that are not done
        self._arrivals = 0
        self._num_pages = num_pages
        self._evicted = self._preempted = self._prompt_tokens = self._cached_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def free_slots(self) -> int:
        return len(self._slots)

    @property
    def statistics(self) -> Statistics:
        return Statistics(
            running=len(self.running),
            waiting=len(self.waiting),
            pages=self._num_pages,
            free_pages=self._allocator.free,
            cached_pages=self._cache.cached,
            evicted_pages=self._evicted,
            preemptions=self._preempted,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
        )

    def add(self, request: Request) -> None:
        """Queue a request; raises RequestRefused if it can never be served."""
        self.limits.check(request, self._sequences)
        prompt, max_tokens = list(request.prompt), request.params.max_tokens
        context = self.limits.context_length
        limit = context if max_tokens is None else len(prompt) + max_tokens
        sequence = Sequence(request, self._arrivals, limit, tokens=prompt, length=len(prompt))
        sequence.mask = self.limits.mask(request.params)
        sequence.prompt_logprobs = None if request.params.prompt_logprobs is None else []
        self._arrivals += 1
        self._sequences[request.id] = sequence
        self.waiting.append(sequence)

    def abort(self, request_id: str) -> None:
        """Forget a request wherever it is. Its row in a batch under way is dropped when that is committed.

        Not between a batch's `schedule` and its launch, which still asks for the pages that are given back.
        """
        if sequence := self._sequences.get(request_id):
            self._finish(sequence)

    def match(self, sequence: Sequence) -> Prefix:
        """What the cache has of a waiting sequence; its last token is always left to compute, and all of a
        prompt that is to be scored."""
        if sequence.prompt_logprobs is not None:
            return Prefix()
        return self._cache.match(sequence.tokens[:-1])

    def admit(self, sequence: Sequence, prefix: Prefix) -> bool:
        """Let the head of the queue run, on the pages of `prefix` and new ones for the rest.

        A slot must be free. False, and nothing happened, if pages are short: besides its own one must remain
        for each running request, else the next decode step would preempt what was admitted just now.
        """
        self._cache.lock(prefix)  # before pages are taken: these must not be evicted for it
        missing = -(-sequence.length // self.page_size) - len(prefix.pages)
        pages = self.take_pages(missing, spare=len(self.running))
        if pages is None:
            self._cache.unlock(prefix)
            self.blocked = True
            return False
        sequence.prefix = prefix
        sequence.pages = [*prefix.pages, *pages]
        sequence.scheduled = len(prefix.pages) * self.page_size
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.scheduled
            self._prompt_tokens += sequence.length
            self._cached_tokens += sequence.cached_tokens
        sequence.slot = self._slots.pop()
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_arrival)
        return True

    def take_pages(self, count: int, spare: int = 0) -> list[int] | None:
        """`count` pages, evicting cached ones if need be; None if fewer than `spare` would be left."""
        if count + spare > self._allocator.free + self._cache.evictable:
            return None
        if count > self._allocator.free:
            evicted = self._cache.evict(count - self._allocator.free)
            self._evicted += len(evicted)
            self._allocator.give(evicted)
        return self._allocator.take(count)

    def share(self, sequence: Sequence) -> None:
        """Let others find the pages that are full, or will be when the batch being made has run."""
        full = min(sequence.scheduled, len(sequence.tokens)) // self.page_size
        known = self._cache.insert(sequence.tokens[: full * self.page_size], sequence.pages[:full])
        self._cache.lock(known)
        self._cache.unlock(sequence.prefix)
        sequence.prefix = known
        self.blocked = False  # the head of the queue may find more than it did

    def preempt(self, sequence: Sequence) -> None:
        """Take a running request's pages and slot; it waits again, in order of arrival, to be recomputed."""
        self._preempted += 1
        self._release(sequence)
        sequence.scheduled = 0
        insort(self.waiting, sequence, key=_arrival)

    def commit(self, batch: Batch, sampled: Seq[SampledToken]) -> list[TokenOutput]:
        """Append what was sampled, in the order of the rows of `batch` that sample; end what is over.

        It goes by sequence, wherever that is by now: a preempted one gets its token, a done one does not.
        """
        outputs = []
        for row, new in zip(batch.sampling, sampled, strict=True):
            sequence = row.sequence
            if sequence.done:
                continue
            request, token_id = sequence.request, max(new.token_id, 0)
            sequence.tokens.append(token_id)
            count = len(sequence.tokens) - len(request.prompt)
            reason = self.limits.finish_reason(request, count, new.token_id)
            scores, sequence.prompt_logprobs = sequence.prompt_logprobs, None
            if reason == "error":
                scores = None
            cached = sequence.cached_tokens or 0
            outputs.append(TokenOutput(request.id, token_id, new.logprobs, reason, cached, scores))
            if reason is not None:
                self._finish(sequence)
        return outputs

    def _finish(self, sequence: Sequence) -> None:
        sequence.done = True
        del self._sequences[sequence.request.id]
        if sequence.slot is None:
            self.waiting.remove(sequence)
            self.blocked = False
        else:
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Give back what a running sequence holds. What the prefix cache takes over is not free."""
        self.share(sequence)
        cached = sequence.prefix.pages  # of the same positions; a duplicate stayed the sequence's own
        owned = [page for i, page in enumerate(sequence.pages) if i >= len(cached) or page != cached[i]]
        self._allocator.give(owned)
        self._cache.unlock(sequence.prefix)
        sequence.pages, sequence.prefix = [], Prefix()
        assert sequence.slot is not None, "only a running sequence holds anything"
        self._slots.append(sequence.slot)
        sequence.slot = None
        self.running.remove(sequence)


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
