"""The contract of a decoder method: what it sees of one prompt in front of a layer of the LLM, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from tokprune.errors import MissingSignalError, OptionError
from tokprune.methods.base import Method, check_finite
from tokprune.methods.options import option
from tokprune.ops.topk import top
from tokprune.schedule import Schedule
from tokprune.tokens import Selection

Heads = Literal["mean", "max", "each"]


class LayerAttention(Protocol):
    """Attention of one decoder layer over the tokens of one prompt, made from its queries and keys when asked for.

    n counts the tokens of `LayerTokens`; keys of earlier turns are part of every softmax and never of the result.
    """

    @property
    def keys(self) -> Tensor:
        """Keys as the layer used them, rotated: (H', n, d)."""

    @property
    def plain_keys(self) -> Tensor:
        """Keys before their rotation: (H', n, d)."""

    @property
    def values(self) -> Tensor:
        """Values of the layer: (H', n, d)."""

    def weights(self, queries: Tensor, heads: Heads = "mean", rotary: bool = True) -> Tensor:
        """Attention probabilities of the tokens at `queries` (R,): (R, n), or (H, R, n) for heads="each". In float32.

        rotary: False leaves the positions out of queries and keys.
        """

    def logits(self, queries: Tensor, heads: Heads = "mean") -> Tensor:
        """Scaled products of queries and keys before mask and softmax, shaped as `weights`. In float32."""

    def gravity(self, queries: Tensor) -> Tensor:
        """Scaled products of all-ones queries and keys under the layer's rotation, what positions alone put into
        `logits`: (R, n). In float32.
        """

    def sums(self, queries: Tensor, heads: Heads = "mean", logits: bool = False) -> Tensor:
        """`weights` (or `logits`) summed over the queries, block by block, so that no full map is held: (n,)."""


@dataclass(frozen=True)
class LayerTokens:
    """The tokens of one prompt that a decoder layer is about to get, without filler; n of them, V visual."""

    layer: int
    """The layer (0-based) in front of which tokens may be dropped."""
    hidden: Tensor
    """(n, D) what would enter the layer."""
    columns: Tensor
    """(n,) prompt column of each token, ascending."""
    visual: Tensor
    """(V,) ascending places among the n tokens: visual tokens of this call that are left, the candidates. At least
    one (without any there is nothing to ask), and never the prompt's last token, whose state is the answer's."""
    picture: Tensor
    """(V,) number of the image or video that each candidate belongs to."""
    row: Tensor
    """(V,) row of each candidate in its picture's (tile's, frame's) grid."""
    col: Tensor
    """(V,) column of each candidate in that grid."""
    total: int
    """Visual tokens of the prompt that entered the LLM."""
    below: LayerAttention
    """Attention of the layer below, in which all n tokens still took part."""
    own: LayerAttention
    """Attention of this layer, as if nothing were dropped."""
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    """What the vision tower said of each candidate, (V, ...), by the names in the method's `needs`."""
    embeddings: Tensor | None = None
    """(n, D) what entered layer 0; where the method `reads` "embeddings"."""
    entering: Tensor | None = None
    """(n, D) what entered the layer below; where the method `reads` "entering"."""
    middle: Tensor | None = None
    """(n, D) what entered the MLP of the layer below, behind its norm; where the method `reads` "middle"."""
    normed: Tensor | None = None
    """(n, D) `hidden` behind the norm that stands before the LLM's head; where the method `reads` "normed"."""
    bound: bool = True
    """Whether ratio, budget or schedule say how many stay; where not, an adaptive method follows its own rule, is asked
    also where `keep` is all of them, and may return another number."""
    notes: dict[str, Tensor] = field(default_factory=dict)
    """What the method wrote down for itself at earlier layers of this prefill of this prompt; empty at first."""

    def signal(self, name: str) -> Tensor:
        """What the vision tower says of each candidate, (V, ...), or the error that names what is missing."""
        if name not in self.signals:
            at_hand = ", ".join(sorted(self.signals)) or "none"
            raise MissingSignalError(f"signal {name!r} is not at hand (present: {at_hand}); name it in `needs`.")
        return self.signals[name]

    def read(self, name: str) -> Tensor:
        """A state that the method `reads`, (n, D)."""
        state: Tensor | None = getattr(self, name)
        if state is None:
            raise OptionError(f"the state {name!r} is not at hand; name it in the method's `reads`.")
        return state

    @property
    def pictures(self) -> tuple[Tensor, list[int]]:
        """(V,) running number of each candidate's picture, from 0 on, and how many candidates each has left."""
        number, sizes = torch.unique_consecutive(self.picture, return_inverse=True, return_counts=True)[1:]
        return number, sizes.tolist()

    @property
    def last(self) -> Tensor:
        """(1,) place of the prompt's last token."""
        return torch.tensor([len(self.columns) - 1], device=self.columns.device)

    @property
    def behind(self) -> Tensor:
        """Places of the tokens behind the last candidate, at least one: the question, as a rule."""
        return torch.arange(int(self.visual[-1]) + 1, len(self.columns), device=self.columns.device)


def in_depth(layers: Sequence[int], depth: int, published: int = 32) -> tuple[int, ...]:
    """Layers named for an LLM of `published` layers, moved in proportion to one of `depth`: ascending, from 1 on; what
    would lie behind the last layer is left out.
    """
    out: list[int] = []
    for layer in layers:
        at = max(round(layer * depth / published), out[-1] + 1 if out else 1)
        if at < depth:
            out.append(at)
    return tuple(out)


def at_layers(given: int | Sequence[int] | None, published: Sequence[int], depth: int) -> tuple[int, ...]:
    """Layers that an option gives, as they are; where it gives none, the published ones of an LLM of 32 layers, moved
    in proportion to one of `depth`.
    """
    if given is None:
        return in_depth(published, depth) or (1,)
    return (given,) if isinstance(given, int) else tuple(given)


@dataclass(frozen=True)
class DecoderMethod(Method):
    """Base of methods that drop or merge visual tokens inside the LLM, in front of some of its layers, while it reads.

    Subclasses implement `plan` and `select`. Text is never dropped, layer 0 always sees everything.

    reads: states that `select` looks at ("embeddings", "entering", "middle", "normed"), class data like `needs`.
    positions: what happens to position ids of the tokens that are left: "keep" leaves them, "compact" numbers the
    tokens of a layer without gaps; apply(..., positions=) overrides it.
    counted_below: layers below a drop that the paper's token counts take for reduced already, though they work on all.
    """

    stage: ClassVar[str] = "decoder"
    reads: ClassVar[tuple[str, ...]] = ()
    positions: ClassVar[Literal["keep", "compact"]] = "keep"
    counted_below: ClassVar[int] = 0
    schedule: tuple[tuple[int, float], ...] | None = option(
        None, example=((2, 0.5),), hint="Pairs of a layer and the share left from it on, in place of the method's own."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule is not None:
            Schedule(self.schedule)

    @property
    def query_aware(self) -> bool:
        """Whether the question must be known as text; what the LLM itself makes of it needs no such thing."""
        return False

    def plan(self, depth: int, share: float | None) -> Schedule:
        """Where tokens are dropped, and how many, in an LLM of `depth` layers.

        share: share of the visual tokens to be left behind the last drop; None: the method's own (published) amounts.
        """
        raise OptionError(f"{type(self).__name__} does not implement plan(depth, share).")

    def select(self, tokens: LayerTokens, keep: int) -> Selection:
        """Choose `keep` (0 ... V) of the candidates; indices count among the V. Adaptive methods may return another
        number. `Selection.features` (K, D) or `weights` replace the hidden states in the slots that stay.
        """
        raise OptionError(f"{type(self).__name__} does not implement select(tokens, keep).")


@dataclass(frozen=True)
class DecoderScores(DecoderMethod):
    """Base of decoder methods that keep the tokens with the largest scores, over all pictures of the prompt.

    Of equal scores the earlier token stays, where published codes leave it to torch.topk, which promises no order.
    """

    def scores(self, tokens: LayerTokens) -> Tensor:
        """Worth of each candidate, higher = keep. Returns (V,) in float32."""
        raise OptionError(f"{type(self).__name__} does not implement scores(tokens).")

    def select(self, tokens: LayerTokens, keep: int) -> Selection:
        """The `keep` best candidates."""
        if not keep:
            return Selection(tokens.visual[:0])
        scores = check_finite(self.scores(tokens), f"the scores of {self.info.name}")
        return Selection(top(scores, keep), info={"scores": scores})
