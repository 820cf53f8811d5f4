"""The fuzz targets with their seeds and what is a few random steps away from them: quick, always the same."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.fuzz.targets import TARGETS

_STEPS = {"ledger": 40, "intake": 40}
_MOST_BYTES = 1 << 15


def mutations(seeds: list[bytes], count: int) -> Iterator[bytes]:
    """The seeds, then as many changed ones: bytes flipped, cut out, doubled, put together from two."""
    yield from seeds
    rng = random.Random(0)
    for _ in range(count):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data) + 1)
            match rng.randrange(5):
                case 0 if data:
                    data[min(at, len(data) - 1)] = rng.randrange(256)
                case 1:
                    del data[at : at + rng.randint(1, 16)]
                case 2:
                    data[at:at] = data[at : at + rng.randint(1, 64)]
                case 3:
                    data[at:] = rng.choice(seeds)[at:]
                case _:
                    data[at:at] = rng.randbytes(rng.randint(1, 8))
        yield bytes(data[:_MOST_BYTES])


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_but_the_errors_that_are_meant_comes_out(name: str) -> None:
    target = TARGETS[name]
    for data in mutations(target.seeds(), _STEPS.get(name, 300)):
        target.one(data)


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_at_all_is_an_input_too(name: str) -> None:
    TARGETS[name].one(b"")
