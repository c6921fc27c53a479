"""Random choice: the baseline that a method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.methods.base import ScoreMethod
from tokprune.methods.options import Seed
from tokprune.registry import register_method
from tokprune.tokens import VisualTokens


def random_ranks(n: int, seed: int) -> Tensor:
    """A shuffled 0 … n-1 that depends on `n` and `seed` alone. Returns (n,) on the CPU; the global generator stays
    untouched.
    """
    # Spread neighbouring seeds and lengths over the 63 bits that the generator takes.
    mixed = (seed * 0x9E3779B97F4A7C15 + n * 0x2545F4914F6CDD1D) % (1 << 63)
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed))


@register_method("random", paper="baseline: uniformly random tokens", complexity="O(N log N)", memory="O(N)")
@dataclass(frozen=True)
class Random(ScoreMethod):
    """Keep a uniformly random subset, drawn from `seed` and the stream's length alone.

    So a stream's choice depends neither on its neighbours in a batch nor on the order of calls, beams repeat it, and a
    smaller budget keeps a subset of what a larger one keeps. Run several seeds for error bars.
    """

    seed: Seed = 0

    def scores(self, tokens: VisualTokens) -> Tensor:
        """A random rank for each token. Returns (N,), no two equal."""
        return random_ranks(len(tokens), self.seed).to(tokens.features.device, torch.float32)
