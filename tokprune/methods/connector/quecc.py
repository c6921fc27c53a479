"""QueCC: a projector of few tokens that the question shapes; a module to train, not a method to switch on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokprune.errors import OptionError


def _projection(source: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(source, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width, eps=1e-6))


class QueCC(nn.Module):
    """Query-based convolution and cross-attention of "Inference Optimal VLMs Need Fewer Visual Tokens and More
    Parameters" (arXiv 2411.03312), in front of the usual projector.

    The question's embedding is added to every patch; a depthwise convolution whose stride is its `kernel` makes one
    query of each kernel x kernel block of the grid, and the query attends to the patches of its block. Parameters are
    named and shaped as in the published code, so that its weights load; none are public, and without training the
    output means nothing. Its width (1024) and number of channels (4096) are arguments here.

    width: of patches and output. levels: channels of the several tower layers side by side. text: of the question's
    embedding, the LLM's last layer at the question's last token. kernel: side of a block; a grid of 24 and 4 gives 36
    tokens.
    """

    def __init__(self, width: int, levels: int, text: int, kernel: int = 4, heads: int = 8) -> None:
        super().__init__()
        if kernel < 1 or width % heads:
            raise OptionError(f"kernel={kernel} must be at least 1, and width={width} a multiple of heads={heads}.")
        self.text_projection = nn.Sequential(nn.Linear(text, width), nn.LayerNorm(width, eps=1e-6))
        self.q_proj, self.k_proj = _projection(width, width), _projection(levels, width)
        self.v_proj = _projection(levels, width)
        self.q_downsample = nn.Conv2d(width, width, kernel, stride=kernel, groups=width)
        self.clip_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.kernel = kernel

    def forward(self, x: Tensor, levels: Tensor, text: Tensor) -> Tensor:
        """x: (B, N, width) patches of a square grid, levels: (B, N, levels), text: (B, 1, text) -> (B, N / kernel²,
        width).
        """
        batch, n, width = x.shape
        side = round(n**0.5)
        if side * side != n or side % self.kernel:
            raise OptionError(f"{n} patches are no square grid that blocks of {self.kernel} x {self.kernel} tile.")
        small, k = side // self.kernel, self.kernel
        query = self.q_proj(x + self.text_projection(text)).transpose(1, 2).unflatten(2, (side, side))
        query = self.q_downsample(query).flatten(2).transpose(1, 2)  # (B, S, width)

        def blocks(y: Tensor) -> Tensor:
            grid = y.view(batch, small, k, small, k, width).transpose(2, 3)
            return grid.reshape(batch * small * small, k * k, width)

        keys, values = blocks(self.k_proj(levels)), blocks(self.v_proj(levels))
        out: Tensor = self.clip_attn(query.reshape(-1, 1, width), keys, values, need_weights=False)[0]
        return out.view(batch, small * small, width)


@torch.no_grad()
def load_quecc(weights: dict[str, Tensor], heads: int = 8) -> QueCC:
    """The module that these parameters were made for. weights: a state dict of it, or of the published code's."""
    width, levels = weights["k_proj.0.weight"].shape
    kernel = weights["q_downsample.weight"].shape[-1]
    module = QueCC(width, levels, weights["text_projection.0.weight"].shape[1], kernel, heads)
    module.load_state_dict(weights)
    return module
