from collections.abc import Callable, Iterator

import pytest

pytest.register_assert_rewrite("tests.core.pair")

from tests.core.pair import GuestSide, Pair  # noqa: E402


@pytest.fixture
def make() -> Iterator[Callable[..., Pair]]:
    """Makes pairs, and looks after each that nothing is left."""
    pairs: list[Pair] = []

    def build(*args: object, **options: object) -> Pair:
        pair = Pair(*args, **options)  # type: ignore[arg-type]
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
