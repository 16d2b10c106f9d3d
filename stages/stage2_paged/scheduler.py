"""Which requests compute in the next step: continuous batching (Orca, Yu et al. 2022)."""

from collections.abc import Iterable
from typing import Protocol

from stages.stage2_paged.batch import Batch, Row, Sequence
from stages.stage2_paged.request_table import RequestTable


class AnyScheduler(Protocol):
    """Decides what the next step computes. Stage 4 swaps it."""

    def schedule(self) -> Batch | None:
        """The next batch, or None if there is nothing to compute. A batch returned is always launched."""


class Scheduler:
    """Whole prompts first, in order of arrival, as soon as they fit; else one token for everyone who runs."""

    def __init__(self, table: RequestTable, prefill_budget: int) -> None:
        self._table = table
        self._prefill_budget = prefill_budget

    def schedule(self) -> Batch | None:
        if rows := self._prefill():
            return Batch(rows, num_decode=0)
        rows = decode_rows(self._table, list(self._table.running))
        return Batch(rows, num_decode=len(rows)) if rows else None

    def _prefill(self) -> list[Row]:
        """Prompts from the head of the queue. The first goes whatever its length; none overtakes another."""
        table, rows, budget = self._table, list[Row](), self._prefill_budget
        while table.waiting and table.free_slots and not table.blocked:
            sequence = table.waiting[0]
            if sequence.in_flight:  # preempted while a token was sampled; only a scheduler that decodes
                break  # first can meet it, and must wait until that token is known
            prefix = table.match(sequence)
            cost = sequence.length - len(prefix.pages) * table.page_size
            if (rows and cost > budget) or not table.admit(sequence, prefix):
                break
            budget -= cost
            rows.append(place(sequence, cost, first_new_page=0))
            table.share(sequence)
        return rows


def decode_rows(table: RequestTable, sequences: Iterable[Sequence]) -> list[Row]:
    """The next position of these running requests. The oldest come first, and are the first to get a page."""
    rows = []
    for sequence in sequences:
        if sequence.slot is None or sequence.length == sequence.limit:
            continue  # preempted just now, or its last token is in flight
        num_pages = len(sequence.pages)
        if sequence.scheduled < num_pages * table.page_size or _add_page(table, sequence):
            rows.append(place(sequence, 1, first_new_page=num_pages))
    return rows


def place(sequence: Sequence, length: int, first_new_page: int) -> Row:
    """The next `length` positions of a running sequence; counts them, and the token they sample."""
    assert sequence.slot is not None, "a row needs a slot"
    start = sequence.scheduled
    sequence.scheduled += length
    samples = sequence.scheduled == sequence.length
    sequence.length += samples
    return Row(sequence, sequence.slot, start, length, first_new_page, samples)


def _add_page(table: RequestTable, sequence: Sequence) -> bool:
    """One more page, at the cost of the youngest requests; False if that came to be `sequence` itself."""
    while (pages := table.take_pages(1)) is None:
        youngest = table.running[-1]  # rows are placed oldest first: it has none yet
        table.preempt(youngest)
        if youngest is sequence:
            return False
    sequence.pages += pages
    return True
