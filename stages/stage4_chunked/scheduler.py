"""Chunked prefill with decodes in the same batch (Sarathi-Serve, Agrawal et al. 2024)."""

from stages.stage2_paged.batch import Batch, Row, Sequence
from stages.stage2_paged.request_table import RequestTable
from stages.stage2_paged.scheduler import decode_rows, place


class ChunkedScheduler:
    """No step computes more than `budget` tokens: one for everyone who decodes, the rest for prompts.

    Prompts go in order of arrival, several short ones or the next chunk of a long one. `budget` must be at
    least the number of slots; then a prompt always gets on, as it takes a slot that nobody decodes in.
    """

    def __init__(self, table: RequestTable, budget: int) -> None:
        self._table = table
        self._budget = budget

    def schedule(self) -> Batch | None:
        """The next batch, or None if there is nothing to compute. A batch returned is always launched."""
        table = self._table
        rows = decode_rows(table, [s for s in table.running if _left(s) == 1])
        num_decode = len(rows)
        budget = self._budget - num_decode
        for sequence in table.running:
            if budget and _left(sequence) > 1:
                budget -= self._add_chunk(rows, sequence, budget, first_new_page=len(sequence.pages))
        while budget and table.waiting and table.free_slots and not table.blocked:
            sequence = table.waiting[0]
            if sequence.in_flight:  # preempted while a token was sampled: that must be known first
                break
            if not table.admit(sequence, table.match(sequence)):
                break
            budget -= self._add_chunk(rows, sequence, budget, first_new_page=0)
        return Batch(rows, num_decode) if rows else None

    def _add_chunk(self, rows: list[Row], sequence: Sequence, budget: int, first_new_page: int) -> int:
        """As much of a prompt as the budget allows. Its full pages can be matched from now on."""
        length = min(_left(sequence), budget)
        rows.append(place(sequence, length, first_new_page))
        self._table.share(sequence)
        return length


def _left(sequence: Sequence) -> int:
    """Positions that are still to be computed: 1 for who decodes, more in the middle of a prompt."""
    return sequence.length - sequence.scheduled
