"""What vLLM's vision towers tell about each token: queries, keys and values are seen on their way into the kernel.

The kernels return no weights; the rows that methods read are computed from one block's queries and keys, by the
functions that do it in transformers (`tokprune.runtime.signals.block_values`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokprune.errors import MissingSignalError, OptionError
from tokprune.ops.numeric import wide
from tokprune.runtime.probe import Projections
from tokprune.runtime.signals import block_index, block_values

KINDS = (
    "cls_attention",
    "cls_logits",
    "cls_attention_1head",
    "received_attention",
    "keys",
    "value_attention",
    "value_norm",
    "encoder_features",
)
"""Signals of towers whose queries, keys and values go into the kernel without rotary positions."""


class TowerSignals:
    """Listens to one tower of vLLM while it encodes, for the signals that a method needs."""

    def __init__(
        self, needs: Sequence[str], tower: nn.Module, blocks: Sequence[nn.Module], depth: int, cls: bool
    ) -> None:
        """blocks: those of the tower that vLLM loaded, the last one's output goes to the projector. depth: as many
        as the checkpoint has. cls: the first token is [CLS]."""
        self.cls = cls
        self.blocks = {name: _block(name, depth, len(blocks) - 1) for name in needs if name != "encoder_features"}
        self.seen: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self.features: list[Tensor] = []
        self.wants_features = "encoder_features" in needs
        if self.wants_features:
            tower.register_forward_hook(lambda module, args, output: self.features.append(output))
        for name, block in self.blocks.items():
            if block >= len(blocks):
                raise MissingSignalError(
                    f"{name!r} is of block {block}, and vLLM loads this tower's blocks 0 to {len(blocks) - 1}, up to "
                    "the one whose output is used; name one of these in the method's options, or take another method."
                )
        for block in set(self.blocks.values()):
            _kernel(blocks[block]).register_forward_pre_hook(self._see(block), with_kwargs=True)

    def _see(self, block: int) -> Any:
        def hook(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            q, k, v = args if args else (kwargs["query"], kwargs["key"], kwargs["value"])
            heads = [x.unflatten(-1, (-1, kernel.head_size)).transpose(1, 2) for x in (q, k, v)]  # (B, H, N, d)
            self.seen.setdefault(block, []).append((heads[0], heads[1], heads[2]))

        return hook

    def take(self, patches: int) -> dict[str, Tensor]:
        """The signals of the encoder call that just ran, (U, patches, ...), and forget it."""
        parts = {block: [torch.cat(x) for x in zip(*calls, strict=True)] for block, calls in self.seen.items()}
        out = {}
        for name, block in self.blocks.items():
            q, k, v = parts[block]
            seen = Projections(q, k, v, scale=q.shape[-1] ** -0.5, rotated=lambda x: x)
            values, _ = block_values(name.partition(":")[0], seen, self.cls)
            out[name] = values[:, values.shape[1] - patches :]
        if self.wants_features:
            out["encoder_features"] = wide(torch.cat([x.flatten(0, -3) for x in self.features]))[:, -patches:]
        self.seen, self.features = {}, []
        return out


def check_parallel(needs: Sequence[str], parallel_config: Any) -> None:
    """Refuse towers whose heads lie on several GPUs: a signal is a mean over all of them."""
    if needs and parallel_config.tensor_parallel_size > 1:
        raise OptionError(
            f"the signals {', '.join(needs)} need all heads of the vision tower on one GPU; serve with "
            "--tensor-parallel-size 1, or take a method that needs none, such as divprune."
        )


def _block(name: str, depth: int, selected: int) -> int:
    _, colon, spec = name.partition(":")
    return block_index(spec, depth) if colon else selected


def _kernel(block: nn.Module) -> nn.Module:
    from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention

    return next(part for part in block.modules() if isinstance(part, MMEncoderAttention))
