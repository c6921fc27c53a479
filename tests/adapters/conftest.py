"""What all tests of models share: a model that many of them use comes back unpruned after each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import tokprune
from tests.adapters.reference import shared, used


@pytest.fixture(autouse=True)
def unpruned_afterwards() -> Iterator[None]:
    """A failing test must not leave its pruning behind for the next one."""
    yield
    for family in tuple(used):
        tokprune.remove(shared(family).model)
    used.clear()
