"""Explain: a small convolution predicts from layer 0 of the LLM what an explanation of the answer would name."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

import tokprune
from tokprune.errors import OptionError
from tokprune.methods.base import ScoreMethod
from tokprune.ops.numeric import wide
from tokprune.registry import Checked, register_method
from tokprune.tokens import Layout, VisualTokens

DEMO = "demo"
LAYERS, CHANNELS = 5, 16


class RelevanceNet(nn.Module):
    """Predicts relevance from attention: convolutions of 3 x 3 over the grid of a picture's tokens.

    heads: attention heads of the LLM, its input channels. width: of the LLM.
    """

    def __init__(self, heads: int, width: int, channels: int = CHANNELS) -> None:
        super().__init__()
        sizes = [heads, *[channels] * (LAYERS - 1), 1]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, dtype=torch.float32) for a, b in itertools.pairwise(sizes)
        )
        self.made_for = heads, width
        self.register_buffer("width", torch.tensor(width))  # in the file, to know the model again

    def forward(self, attention: Tensor) -> Tensor:
        """attention: (B, H, rows, columns), not negative -> (B, rows, columns), a logarithm of relevance."""
        share = attention / attention.mean((-2, -1), keepdim=True).clamp_min(1e-12)
        x = share.clamp_min(1e-4).log()
        for i, convolution in enumerate(self.convolutions):
            x = convolution(x if i == 0 else x.relu())
        return x[:, 0]

    @staticmethod
    def of(weights: Mapping[str, Tensor]) -> RelevanceNet:
        """The network that these parameters were made for."""
        first = weights["convolutions.0.weight"]
        net = RelevanceNet(first.shape[1], int(weights["width"]), first.shape[0]).float()
        net.load_state_dict({name: value.float() if name != "width" else value for name, value in weights.items()})
        return net.eval().requires_grad_(False)


@torch.no_grad()
def predicted_relevance(net: RelevanceNet, attention: Tensor, layout: Layout) -> Tensor:
    """Relevance of each token of a stream, as a logarithm. attention: (N, H) -> (N,) in float32.

    Each tile or frame is a picture of its own for the network; what it shares out among the tokens of one is the
    attention that the whole of it gets. Places of a grid without a token have the mean of the others.
    """
    x, out = wide(attention).float(), attention.new_zeros(len(attention), dtype=torch.float32)
    for span, (rows, columns) in zip(layout.group_slices(), layout.grids, strict=True):
        own, at = x[span], layout.row[span] * columns + layout.col[span]  # (n, H), (n,)
        grid = own.mean(0).repeat(rows * columns, 1).index_copy(0, at, own)  # (rows * columns, H)
        values = net(grid.T.unflatten(1, (rows, columns))[None]).flatten()[at]  # (n,)
        out[span] = values.log_softmax(0) + own.sum().clamp_min(1e-12).log()
    return out


@register_method(
    "explain",
    paper="Task-Related Token Compression in Multimodal Large Language Models from an Explainability Perspective",
    year=2026,
    url="https://arxiv.org/abs/2506.01097",
    complexity="O(N) behind the projections of layer 0 of the LLM",
    memory="O(N)",
    checked=Checked("", differs="written after the paper's abstract; sizes, loss and how tiles are joined"),
)
@dataclass(frozen=True)
class Explain(ScoreMethod):
    """Explainability compressor (ICLR 2026): keeps what an explanation of the answer would call relevant, as a network
    predicts it from what the tokens behind the pictures pay to them in layer 0 of the LLM.

    weights: "demo", trained for the demo VLM by `python -m tools.explain`, or the file of a network for another model;
    it is refused on a model of other heads or width. Of the paper its abstract was at hand, no code and no weights:
    target, input and five layers are the paper's, their width, the loss and how tiles are joined are ours.
    """

    weights: str = DEMO
    needs: ClassVar[tuple[str, ...]] = ("llm_question:0",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.file.is_file():
            raise OptionError(
                f"weights={self.weights!r} is no file; write weights='demo' for the demo VLM, or name the file of a "
                "network that was trained for your model (tools/explain.py of a checkout shows how)."
            )

    @property
    def file(self) -> Path:
        """Where the weights lie."""
        own = Path(tokprune.__file__).parent / "demo" / "weights" / "explain.safetensors"
        return own if self.weights == DEMO else Path(self.weights).expanduser()

    @cached_property
    def net(self) -> RelevanceNet:
        """The network, read once."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return RelevanceNet.of(load_file(self.file))
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise OptionError(
                f"weights={self.weights!r} holds no network as tools/explain.py writes it: {error}"
            ) from error

    def scores(self, tokens: VisualTokens) -> Tensor:
        """Predicted relevance, (N,)."""
        attention = tokens.signal("llm_question:0")  # (N, H)
        found = attention.shape[1], tokens.features.shape[1]
        if found != self.net.made_for:
            raise OptionError(
                f"weights={self.weights!r} were trained for an LLM of {self.net.made_for[0]} heads and width "
                f"{self.net.made_for[1]}; this one has {found[0]} and {found[1]}. Train a network for it "
                "(tools/explain.py of a checkout shows how) and give its file, or choose another method."
            )
        return predicted_relevance(self.net.to(attention.device), attention, tokens.layout)
