"""A model that many tests use comes back unpruned after each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import tokprune
from tests.decoder.reference import touched


@pytest.fixture(autouse=True)
def unpruned_afterwards() -> Iterator[None]:
    """A failing test must not leave its pruning behind for the next one."""
    yield
    for model in touched:
        tokprune.remove(model)
    touched.clear()
