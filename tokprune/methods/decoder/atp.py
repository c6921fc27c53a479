"""ATP-LLaVA: thresholds of importance and of an even cover of the picture decide, prompt by prompt, what stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from tokprune.budget import round_of
from tokprune.errors import OptionError
from tokprune.methods.base import check_finite
from tokprune.methods.decoder_base import DecoderMethod, LayerTokens, at_layers
from tokprune.methods.options import option
from tokprune.ops.topk import top, top_by_tier
from tokprune.registry import Checked, register_method
from tokprune.schedule import Schedule
from tokprune.tokens import Selection

LAYERS = (8, 16, 24)
STRIDES = (2, 3, 4, 6, 8, 12)


def redundancy(tokens: LayerTokens) -> Tensor:
    """Two scores of the layer below: what visual queries say of each candidate, the mean of head-mean logits, and what
    the words behind the pictures say, the mean of head-mean probabilities. (2, V)
    """
    visual, text = tokens.visual, tokens.behind
    own = tokens.below.sums(visual, logits=True)[visual] / max(len(visual), 1)
    cross = tokens.below.sums(text)[visual] / len(text)
    return check_finite(torch.stack([own, cross]), "the attention of the layer below")


def spatial_scores(row: Tensor, col: Tensor, slope: float = 3.0) -> Tensor:
    """Worth of a token for an even cover: 1 - slope * rate of the sparsest even grid that it lies on, 0 on none.

    row, col: (V,) places. A grid of stride s takes the middle of every s x s cells, a rate of 1 / s². (V,)
    """
    out = torch.zeros(len(row), dtype=torch.float32, device=row.device)
    for stride in STRIDES:
        on = (row % stride == stride // 2) & (col % stride == stride // 2)
        out = torch.where(on, max(0.0, 1 - slope / stride**2), out)
    return out


def calibrate(
    scores: Sequence[Tensor], spatial: Sequence[Tensor], share: float, theta_spatial: float = 0.9
) -> tuple[float, float]:
    """Thresholds that keep `share` of the tokens of a few samples on average, without training.

    scores, spatial: for each sample (V,), importance in one layer and worth for the cover. theta_spatial is taken as
    it is, 2 where the cover alone would keep more. Returns (threshold of importance, threshold of the cover).
    """
    if not scores or len(scores) != len(spatial):
        raise OptionError("calibrate() needs importance and cover of the same samples, at least one.")
    if sum(float((s > theta_spatial).float().mean()) for s in spatial) > share * len(spatial):
        theta_spatial = 2.0
    values, weights = [], []
    for s, cover in zip(scores, spatial, strict=True):
        free = s[cover <= theta_spatial]
        values.append(free)
        weights.append(torch.full_like(free, 1 / (len(s) * len(scores)), dtype=torch.float64))
    order = torch.sort(torch.cat(values).double(), descending=True)
    weight = torch.cat(weights)[order.indices]
    room = share - (1 - float(weight.sum()))
    count = int((weight.cumsum(0) <= room + 1e-9).sum())
    if count == 0:
        return float(order.values[0]), theta_spatial
    if count == len(weight):
        return float(order.values[-1]) - 1, theta_spatial
    return float(order.values[count - 1] + order.values[count]) / 2, theta_spatial


class ThresholdHeads(nn.Module):
    """The learned part: thresholds of one layer from the two scores of its tokens.

    z = W [mean of the visual score, mean of the words' score]; two heads give thresholds by a sigmoid. The cover's lies
    in (0, 1); that of importance between the least and the largest importance of the prompt (ours: logits have no scale
    of their own, so that a threshold in (0, 1) may keep everything or nothing).
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.mix = nn.Linear(2, width)
        self.importance = nn.Linear(width, 1)
        self.spatial = nn.Linear(width, 1)

    def forward(self, scores: Tensor) -> Tensor:
        """scores: (..., 2, V) as `redundancy` gives them. Returns (..., 2) thresholds of importance and cover."""
        z = self.mix(scores.mean(-1))
        low, high = scores.mean(-2).aminmax(dim=-1, keepdim=True)
        importance = low + (high - low) * self.importance(z).sigmoid()
        return torch.cat([importance, self.spatial(z).sigmoid()], -1)


def save_heads(heads: Sequence[ThresholdHeads], path: str | Path) -> None:
    """Write the heads of all stages to one safetensors file."""
    from safetensors.torch import save_file

    save_file(nn.ModuleList(heads).state_dict(), str(path))


@lru_cache(maxsize=8)
def load_heads(path: str) -> tuple[ThresholdHeads, ...]:
    """The heads that `save_heads` wrote, on the CPU, in evaluation mode."""
    from safetensors.torch import load_file

    try:
        state = load_file(path)
        stages = 1 + max(int(name.split(".")[0]) for name in state)
        built = nn.ModuleList(ThresholdHeads(state[f"{i}.mix.weight"].shape[0]) for i in range(stages))
        built.load_state_dict(state)
    except Exception as error:  # a broken or foreign file fails in many ways
        raise OptionError(f"weights={path!r} holds no heads of save_heads: {error}") from error
    return tuple(h.eval().requires_grad_(False) for h in built)  # type: ignore[misc]


def soft_mask(scores: Tensor, spatial: Tensor, thresholds: Tensor, sharpness: float = 10.0) -> Tensor:
    """What training puts in place of keeping: near 1 for tokens that either threshold keeps, near 0 for the others;
    importance in units of its range over the prompt (ours).

    scores: (..., 2, V), spatial: (..., V), thresholds: (..., 2) -> (..., V), differentiable.
    """
    low, high = scores.mean(-2).aminmax(dim=-1, keepdim=True)
    above = (scores.mean(-2) - thresholds[..., :1]) / (high - low).clamp_min(1e-6)
    important = (sharpness * above).sigmoid()
    return torch.maximum(important, (sharpness * (spatial - thresholds[..., 1:])).sigmoid())


def atp_loss(masks: Sequence[Tensor], target: float, early: float = 0.01, count: float = 0.2) -> Tensor:
    """What is added to the loss of the language model: kept shares, deep layers dearer, and the distance of the mean
    number of kept tokens from `target`. masks: (..., V) of each stage.
    """
    shares = torch.stack([mask.mean() for mask in masks])
    layers = torch.arange(1, len(masks) + 1, device=shares.device)
    return early * (layers * shares).sum() + count * (shares.mean() * masks[0].shape[-1] - target).abs()


@register_method(
    "atp_llava",
    paper="ATP-LLaVA: Adaptive Token Pruning for Large Vision Language Models",
    year=2025,
    url="https://arxiv.org/abs/2412.00447",
    complexity="O(V²D)",
    memory="O(V)",
    adaptive=True,
    checked=Checked("", differs="written after the abstract and an account of a re-implementation; no weights exist"),
)
@dataclass(frozen=True)
class ATPLLaVA(DecoderMethod):
    """ATP-LLaVA (CVPR 2025): a token stays when either of two thresholds lets it, importance or an even cover.

    Importance is the mean of two scores of the layer below: visual queries' logits and the words' attention (see
    `redundancy`); the cover is `spatial_scores`. layers: in front of which tokens go; 8, 16 and 24 of 32 (ours, the
    paper's are not known to us), in proportion for other depths. thresholds: (importance, cover) for each of them; the
    count then depends on the prompt. In the paper a trained module gives them, and no weights are public; `calibrate`
    sets them from a few samples without training, `ThresholdHeads`, `soft_mask` and `atp_loss` are the parts for
    training (`python -m tools.demo.atp_heads` trains them on the demo VLM). weights: file of trained heads
    (save_heads), one for each layer, in place of thresholds. With a ratio, or a schedule, the count is exact: `cover`
    of the slots go to the best of the cover, the others by importance, the stages by equal factors. slope: of the
    cover's score. Rotary positions stay those of the kept tokens, on two axes where the model has them.
    """

    layers: tuple[int, ...] | None = option(None, low=1, filled=True, example=(8, 16, 24))
    thresholds: tuple[tuple[float, float], ...] | None = option(None, filled=True, example=((0.1, 0.9),) * 3)
    weights: str = option("", example="heads.safetensors")
    cover: float = option(0.25, low=0, high=1)
    slope: float = option(3.0, low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        layers, given = self.layers or LAYERS, self.thresholds
        if self.weights and given is not None:
            raise OptionError("both weights and thresholds given; choose one.")
        count = len(load_heads(self.weights)) if self.weights else len(layers) if given is None else len(given)
        if count != len(layers):
            raise OptionError(f"{count} thresholds for {len(layers)} layers; give each its two.")

    def plan(self, depth: int, share: float | None) -> Schedule:
        layers = at_layers(self.layers, LAYERS, depth)
        if share is not None:
            return Schedule.geometric(layers, share)
        if self.thresholds is None and not self.weights:
            raise OptionError(
                "atp_llava needs a ratio, or thresholds=((importance, cover), ...) such as calibrate() gives."
            )
        return Schedule(tuple((layer, 1.0) for layer in layers))

    def select(self, tokens: LayerTokens, keep: int) -> Selection:
        """What the thresholds of this layer keep, or exactly `keep` where a count is asked for."""
        both = redundancy(tokens)
        scores = both.mean(0)
        spatial = spatial_scores(tokens.row, tokens.col, self.slope)
        if not tokens.bound:
            importance, covered = self._thresholds(tokens, both)
            chosen = ((scores > importance) | (spatial > covered)).nonzero()[:, 0]
        else:
            even = top(spatial, round_of(keep, self.cover))
            first = torch.zeros_like(tokens.visual).index_fill(0, even, 1)
            chosen = top_by_tier(first, scores, keep)
        return Selection(chosen, info={"scores": scores, "spatial": spatial})

    def _thresholds(self, tokens: LayerTokens, scores: Tensor) -> tuple[float, float]:
        """Of importance and cover, of the stage that the prompt is at."""
        stage = int(tokens.notes.get("stage", torch.zeros(1, dtype=torch.long)))
        tokens.notes["stage"] = torch.tensor([stage + 1])
        if self.thresholds is not None:
            return self.thresholds[stage]
        importance, cover = load_heads(self.weights)[stage](scores.float().cpu()).tolist()
        return importance, cover
