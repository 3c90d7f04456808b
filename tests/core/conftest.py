from collections.abc import Callable, Iterator

import pytest

from mediator.core.policy import Policy
from tests.core.pair import THREADS, GuestSide, Pair


@pytest.fixture
def make() -> Iterator[Callable[..., Pair]]:
    """Makes pairs, and sees to it that nothing is left of each at the end."""
    pairs: list[Pair] = []

    def build(policy: str | Policy = "default", *, threads: int = THREADS, fill: int = 0) -> Pair:
        pair = Pair(policy, threads=threads, fill=fill)
        pairs.append(pair)
        return pair

    try:
        yield build
        for pair in pairs:
            pair.check()
    finally:
        for pair in pairs:
            pair.close()


@pytest.fixture
def pair(make: Callable[..., Pair]) -> Pair:
    return make()


@pytest.fixture
def guest(pair: Pair) -> GuestSide:
    return pair.guest()
