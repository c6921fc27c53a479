"""Which models are taken for hybrid ones, and masks that are no tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.adapters.reference import HYBRID, shared
from tokprune.adapters.base import Adapter, get_adapter
from tokprune.errors import UnsupportedModelError
from tokprune.runtime.attention_row import attention_row
from tokprune.runtime.cache_keys import narrow_mask
from tokprune.testing import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_hybrid_families(family: str) -> None:
    assert get_adapter(shared(family).model).hybrid == (family in HYBRID)


class Fake(Adapter):
    """An adapter of nothing but layer kinds or layers."""

    def __init__(self, kinds: Any = None, layers: Any = ()) -> None:
        text = SimpleNamespace(layer_types=kinds)
        self._told = SimpleNamespace(get_text_config=lambda: text), SimpleNamespace(layers=layers)

    config = property(lambda self: self._told[0])
    text_model = property(lambda self: self._told[1])


class SomeAttention(nn.Module):
    pass


class SomeLinearAttention(nn.Module):
    pass


class SomeMamba(nn.Module):
    pass


@pytest.mark.parametrize(
    ("kinds", "hybrid"),
    [
        (["full_attention", "sliding_attention"], False),
        (["full_attention", "conv"], True),  # LFM2
        (["mamba", "attention"], True),
        (["full_attention", "linear_attention"], True),
        (["hybrid"], True),
        (["something new"], True),
    ],
)
def test_kinds_that_are_not_known_to_be_attention(kinds: list[str], hybrid: bool) -> None:
    assert Fake(kinds).hybrid is hybrid


def test_layers_that_are_not_known_to_be_attention() -> None:
    attention, other = nn.Sequential(SomeAttention(), nn.Linear(2, 2)), nn.Sequential(SomeMamba())
    assert not Fake(layers=[attention]).hybrid
    assert Fake(layers=[attention, other]).hybrid
    assert Fake(layers=[nn.Sequential(SomeLinearAttention())]).hybrid
    assert Fake(layers=[nn.Sequential(SomeAttention(), nn.Conv1d(2, 2, 1))]).hybrid


class BlockMask:
    """Stands for flex attention's mask object, which is no tensor."""


def test_mask_objects_of_other_kernels_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="BlockMask"):
        narrow_mask(BlockMask(), torch.zeros(1, 2, dtype=torch.long), False, "flex_attention", torch.float32)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="sdpa"):
        attention_row(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 3, 4), 1.0, BlockMask())  # type: ignore[arg-type]
