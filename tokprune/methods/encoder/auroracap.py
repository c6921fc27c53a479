"""AuroraCap's recipe: ToMe inside a VLM's tower, told by the share of tokens that shall reach the language model."""

from __future__ import annotations

from dataclasses import dataclass

from tokprune.budget import even_steps, kept
from tokprune.errors import OptionError
from tokprune.methods.encoder_base import BlockView, EncoderMethod, Reduction
from tokprune.methods.options import Compat, option
from tokprune.ops.merge import bipartite_matching
from tokprune.registry import Checked, register_method


@register_method(
    "auroracap",
    paper="AuroraCap: Efficient, Performant Video Detailed Captioning and a New Benchmark",
    year=2025,
    url="https://arxiv.org/abs/2410.03051",
    complexity="O(LN²d)",
    memory="O(NC)",
    merges=True,
    checked=Checked(
        "rese1f/aurora",
        agrees='counts per block and the attention that sizes do not change with compat="published"',
        differs="exact counts and attention weighted by size otherwise; SigLIP's first patch, which it throws away",
    ),
)
@dataclass(frozen=True)
class AuroraCap(EncoderMethod):
    """AuroraCap (ICLR 2025): ToMe in every block of the tower, the same number each time, for a kept share of the
    tokens.

    keep: share of patches left in the end, unless `ratio` or `budget` says it. The authors advise 0.2 to 0.4 for
    captions, more than 0.5 for questions and more than 0.8 for text in pictures. compat="published" does what the
    released code does, on which its weights were trained: the count per block is truncated and computed for all blocks
    although the last one is not used (asked 0.1 of 729 patches, 48 blocks: 0.162 stay), and its proportional attention
    adds a number that is the same for all keys, so that attention is not weighted at all.
    """

    keep: float = option(0.4, above=0, high=1)
    compat: Compat = "corrected"

    @property
    def size_bias(self) -> bool:
        return self.compat != "published"

    def check(self, depth: int, target: bool) -> None:
        if target and self.compat == "published":
            raise OptionError(
                "compat='published' rounds as the published code does; give the share as keep, not as ratio or budget."
            )

    def count(self, block: BlockView) -> int:
        """Rows that this block merges away."""
        if self.compat == "published":
            return int(block.start * (1 - self.keep) / block.blocks)
        target = block.target if block.target is not None else kept(block.start, self.keep)
        return even_steps(block.start - target, block.depth)[block.index]

    def reduce(self, block: BlockView) -> Reduction | None:
        matching = bipartite_matching(block.metric(), self.count(block), block.prefix)
        return None if matching.rep.shape[1] == block.x.shape[1] else Reduction.merged(block, matching)
