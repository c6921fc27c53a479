"""A new kind of tower is one class in a list: the encoder stage and the attention probe then know it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tokprune.adapters import tower_kinds
from tokprune.adapters.tower_parts import AttentionReader, BlockParts, Heads, Tower
from tokprune.adapters.towers import find_tower
from tokprune.errors import UnsupportedModelError
from tokprune.runtime.encoder import apply_encoder
from tokprune.runtime.probe import AttentionProbe

HEADS = 2


class ToyAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def heads(self, x: Tensor) -> Heads:
        q, k, v = self.mixer(x).unflatten(2, (HEADS, 3, 4)).permute(3, 0, 2, 1, 4)  # q, k and v of each head in turn
        return q, k, v

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        logits = q @ k.transpose(-1, -2) / 2
        weights = (logits if bias is None else logits + bias).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix, self.second, self.mlp = nn.LayerNorm(8), ToyAttention(), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.first(x))
        return x + self.mlp(self.second(x))


class ToyTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.blocks = nn.Conv2d(3, 8, 4, 4), nn.ModuleList(ToyBlock() for _ in range(4))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x


class ToyReader(AttentionReader):
    def watched(self) -> dict[str, nn.Module]:
        return {"mixer": self.attention.get_submodule("mixer")}

    def read(self, seen: Mapping[str, Tensor]) -> Heads:
        q, k, v = seen["mixer"].unflatten(2, (HEADS, 3, 4)).permute(3, 0, 2, 1, 4)
        return q, k, v

    @property
    def scale(self) -> float:
        return 0.5


class ToyKind(tower_kinds.TowerKind):
    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, ToyTower)

    def reader(self, block: nn.Module) -> AttentionReader | None:
        return ToyReader(block.mix) if isinstance(block, ToyBlock) else None

    def parts(self, block: ToyBlock) -> BlockParts:
        return BlockParts(block, block.first, ToyReader(block.mix), block.second, block.mlp)

    def tower(self, root: ToyTower, owner: nn.Module, side: int = 1) -> Tower:
        return replace(self.plain(root, owner, root.blocks), mask="bias")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ToyTower:
    monkeypatch.setattr(tower_kinds, "KINDS", (*tower_kinds.KINDS, ToyKind()))
    torch.manual_seed(0)
    return ToyTower().eval()


def test_a_tower_of_no_kind_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no vision tower"):
        find_tower(ToyTower())


@torch.no_grad()
def test_the_encoder_stage_reduces_a_new_kind(toy: ToyTower) -> None:
    pixels = torch.randn(2, 3, 16, 16)
    plain = toy(pixels)
    pruning = apply_encoder(toy, "tome", ratio=0.5)
    out = toy(pixels)
    trace = pruning.encoder.trace
    assert out.shape == plain.shape
    assert not torch.equal(out, plain)
    assert trace is not None
    assert trace.survivor.sum(1).tolist() == [8, 8]
    for image in range(2):
        assert len(out[image].unique(dim=0)) == 8  # members of a group have the group's row
    pruning.remove()
    assert torch.equal(toy(pixels), plain)


@torch.no_grad()
def test_the_probe_reads_a_new_kind(toy: ToyTower) -> None:
    pixels, seen = torch.randn(2, 3, 16, 16), []
    toy.blocks[2].mix.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with AttentionProbe(toy, [2]) as probe:
        toy(pixels)
        projections = probe.projections(2)
    expected = toy.blocks[2].mix.heads(seen[0])
    torch.testing.assert_close((projections.q, projections.k, projections.v), expected)
    attention = (expected[0] @ expected[1].transpose(-1, -2) / 2).softmax(-1)
    torch.testing.assert_close(projections.received(), attention.mean((1, 2)))
