"""FLOPs in closed form: our exact count of a decoder, and the formulas that pruning papers print, each under its name.

The papers' numbers count a multiply-add once ("FLOPs" there are multiply-adds) and leave out the vision tower, the head
and often the text. Use `exact_*` for real FLOPs and the `formula_*` functions only beside a paper's table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from tokprune.schedule import Schedule
from tokprune.types import ModelConfig


@dataclass(frozen=True)
class DecoderShape:
    """What the cost of a decoder depends on. ffn_matrices: 3 for a gated MLP (LLaMA, Qwen, Gemma), else 2."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    ffn_matrices: int = 3

    @staticmethod
    def of(config: ModelConfig | SimpleNamespace) -> DecoderShape:
        """The shape that a transformers text config (or a config that holds one) describes."""
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        heads = int(text.num_attention_heads)
        return DecoderShape(
            int(text.num_hidden_layers),
            int(text.hidden_size),
            heads,
            int(getattr(text, "num_key_value_heads", None) or heads),
            int(getattr(text, "head_dim", None) or text.hidden_size // heads),
            int(text.intermediate_size),
            int(text.vocab_size),
        )

    @property
    def matrices(self) -> int:
        """Weights of one layer's projections and MLP, biases and norms aside."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + self.ffn_matrices * self.width * self.ffn

    def per_layer(self, tokens: int | Sequence[int]) -> list[int]:
        """One count for each layer, from one for all or as many."""
        counts = [tokens] * self.layers if isinstance(tokens, int) else list(tokens)
        if len(counts) != self.layers:
            raise ValueError(f"{len(counts)} token counts for {self.layers} layers; give one count, or one per layer.")
        return counts


def exact_layer(shape: DecoderShape, n: int, past: int = 0) -> int:
    """FLOPs (2 per multiply-add) of one decoder layer over n tokens with `past` cached ones; equals torch's counter."""
    return 2 * n * shape.matrices + 4 * n * (n + past) * shape.heads * shape.head_dim


def exact_prefill(shape: DecoderShape, tokens: int | Sequence[int], head: bool = True) -> int:
    """FLOPs of a prefill; `tokens` is one count for all layers or one count per layer (decoder-stage pruning).

    head: the output head on the last position is included. The rotary table (head_dim FLOPs per token, once) is not.
    """
    body = sum(exact_layer(shape, n) for n in shape.per_layer(tokens))
    return body + (2 * shape.width * shape.vocab if head else 0)


def exact_decode(shape: DecoderShape, past: int | Sequence[int], head: bool = True) -> int:
    """FLOPs of one decode step with `past` cached tokens, in all layers or per layer."""
    body = sum(exact_layer(shape, 1, p) for p in shape.per_layer(past))
    return body + (2 * shape.width * shape.vocab if head else 0)


def layer_tokens(schedule: Schedule | None, visual: int, layers: int, text: int = 0) -> list[int]:
    """Tokens that each of `layers` decoder layers works on, for `exact_prefill` and `formula_total`.

    visual: tokens that enter the LLM. text: tokens beside them, which stay. A layer in front of which tokens are
    dropped counts with what is left; SparseVLM's own averages count the layer before it so, too (192.0 for 206.5).
    """
    steps = [] if schedule is None else list(zip(schedule.layers, schedule.counts(visual), strict=True))
    return [text + next((n for at, n in reversed(steps) if at <= i), visual) for i in range(layers)]


def prefill_share(schedule: Schedule, shape: DecoderShape, visual: int, text: int = 0) -> float:
    """Exact FLOPs of the decoder layers' prefill under a schedule, over those without one; the head is left out."""
    pruned, full = (
        exact_prefill(shape, layer_tokens(s, visual, shape.layers, text), head=False) for s in (schedule, None)
    )
    return pruned / full


def formula_fastv(n: int, d: int, m: int) -> int:
    """One layer over n tokens after FastV (Chen et al., ECCV 2024, section 4.1): 4nd² + 2n²d + 2ndm multiply-adds, a
    two-matrix MLP.

    d: width, m: MLP width. DivPrune's tables use the same.
    """
    return 4 * n * d * d + 2 * n * n * d + 2 * n * d * m


def formula_gated(n: int, d: int, m: int) -> int:
    """One layer with a gated MLP: 4nd² + 2n²d + 3ndm multiply-adds (SparseVLM, PyramidDrop, FitPrune)."""
    return 4 * n * d * d + 2 * n * n * d + 3 * n * d * m


def formula_gqa(n: int, d: int, m: int, d_kv: int) -> int:
    """The gated formula with grouped keys and values of width d_kv: 2nd² + 2nd·d_kv + 2n²d + 3ndm multiply-adds."""
    return 2 * n * d * d + 2 * n * d * d_kv + 2 * n * n * d + 3 * n * d * m


def formula_total(layer: Callable[..., int], tokens: int | Sequence[int], shape: DecoderShape) -> int:
    """A paper formula summed over the layers: `tokens` once for all or per layer (FastV: T - K layers run with fewer).

    layer: formula_fastv, formula_gated or formula_gqa.
    """
    more = (shape.kv_heads * shape.head_dim,) if layer is formula_gqa else ()
    return sum(layer(n, shape.width, shape.ffn, *more) for n in shape.per_layer(tokens))


#: The formulas by the names that reports print.
FORMULAS: dict[str, Callable[..., int]] = {
    "fastv (4nd²+2n²d+2ndm)": formula_fastv,
    "gated (4nd²+2n²d+3ndm)": formula_gated,
    "gqa (2nd²+2nd·d_kv+2n²d+3ndm)": formula_gqa,
}
