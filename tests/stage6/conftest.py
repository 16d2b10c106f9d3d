from collections.abc import Callable, Iterator

import pytest

from tests.stage6.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(2)` is a group of two, started once and kept for all tests."""
    groups: dict[int, Ranks] = {}

    def get(size: int) -> Ranks:
        if size not in groups:
            groups[size] = Ranks(size)
        return groups[size]

    yield get
    for group in groups.values():
        group.close()
