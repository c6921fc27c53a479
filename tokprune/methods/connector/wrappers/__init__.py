"""Wrappers: take a connector method and make another one. They nest, and keep exactly as many tokens as they are asked
for.

PerTile(MergeDropped(DivPrune()))     each tile or frame on its own; what is dropped is averaged into its nearest
Protect(FasterVLM(), border=2)        the frame of the picture stays, the rest by [CLS] attention
Relevance(DivPrune(), weight=1.0)     diverse, and about the question
"""

from tokprune.methods.base import Wrapper
from tokprune.methods.connector.wrappers.merge_dropped import MergeDropped
from tokprune.methods.connector.wrappers.per_tile import PerTile
from tokprune.methods.connector.wrappers.protect import Protect
from tokprune.methods.connector.wrappers.relevance import Relevance

__all__ = ["MergeDropped", "PerTile", "Protect", "Relevance", "Wrapper"]
