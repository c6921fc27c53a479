"""What vLLM's vision towers tell about each token: queries, keys and values are seen on their way into the kernel.

The kernels return no weights; the rows that methods read are computed from one block's queries and keys, by the
functions that do it in transformers (`tokprune.runtime.signals.block_values`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tokprune.errors import MissingSignalError, OptionError
from tokprune.ops.numeric import wide
from tokprune.runtime.probe import Projections
from tokprune.runtime.signal_blocks import block_index
from tokprune.runtime.signals import block_values

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
"""Signals that can be had from every tower that is served here; Qwen-VL's, which have no [CLS], give received attention
for it, as in transformers."""
Heads: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, (B, H, N, d) each."""


@dataclass(frozen=True)
class Segments:
    """Which patches of a packed sequence attend to each other."""

    frames: list[int]
    """Patches of each frame, in order."""
    windows: list[int] | None
    """Patches of each window, in the tower's order; None where all blocks see whole frames."""
    whole: Collection[int]
    """Blocks that see whole frames although there are windows."""

    def of_block(self, block: int) -> list[int]:
        """Lengths of the segments of a block."""
        return self.frames if self.windows is None or block in self.whole else self.windows

    @property
    def frame(self) -> Tensor:
        """(S,) patches of the frame of each patch."""
        frames = torch.tensor(self.frames)
        return frames.repeat_interleave(frames).float()


class TowerSignals:
    """Listens to one tower of vLLM while it encodes, for the signals that a method needs."""

    def __init__(
        self,
        needs: Sequence[str],
        blocks: Sequence[nn.Module],
        depth: int,
        cls: bool = False,
        selected: int | None = None,
    ) -> None:
        """blocks: those of the tower that vLLM loaded. depth: as many as the checkpoint has. cls: the first token is
        [CLS]. selected: the block of signals that name none, the last one unless given."""
        self.cls = cls
        selected = len(blocks) - 1 if selected is None else selected
        self.blocks = {name: _block(name, depth, selected) for name in needs if name != "encoder_features"}
        self.seen: dict[int, list[Heads]] = {}
        self.features: list[Tensor] = []
        self.wants_features = "encoder_features" in needs
        for name, block in self.blocks.items():
            if block >= len(blocks):
                raise MissingSignalError(
                    f"{name!r} is of block {block}, and vLLM loads this tower's blocks 0 to {len(blocks) - 1}, up to "
                    "the one whose output is used; name one of these in the method's options, or take another method."
                )
        for block in set(self.blocks.values()):
            _kernel(blocks[block]).register_forward_pre_hook(self._see(block), with_kwargs=True)

    def watch_output(self, tower: nn.Module) -> None:
        """What the tower gives are the encoder features."""
        if self.wants_features:
            tower.register_forward_hook(lambda module, args, output: self.features.append(output))

    def clear(self) -> None:
        """Forget what was seen."""
        self.seen, self.features = {}, []

    def _see(self, block: int) -> Any:
        def hook(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            q, k, v = args if args else (kwargs["query"], kwargs["key"], kwargs["value"])
            heads = [x if x.dim() == 4 else x.unflatten(-1, (-1, kernel.head_size)) for x in (q, k, v)]  # (B, N, H, d)
            self.seen.setdefault(block, []).append(tuple(x.transpose(1, 2) for x in heads))  # type: ignore[arg-type]

        return hook

    def take(self, patches: int) -> dict[str, Tensor]:
        """The signals of the encoder call that just ran, without special tokens, (U, patches, ...); it is forgotten."""
        out = {}
        for name, block in self.blocks.items():
            q, k, v = (torch.cat(x) for x in zip(*self.seen[block], strict=True))
            values = self.signal(name, q, k, v)
            out[name] = values[:, values.shape[1] - patches :]
        if self.wants_features:
            out["encoder_features"] = wide(torch.cat([x.flatten(0, -3) for x in self.features]))[:, -patches:]
        self.clear()
        return out

    def signal(self, name: str, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None = None) -> Tensor:
        """One signal from what went into its block's kernel. -> (B, N, ...)."""
        lengths = None if segments is None else segments.of_block(self.blocks[name])
        frame = None if segments is None else segments.frame.to(q.device)
        seen = Projections(q, k, v, scale=q.shape[-1] ** -0.5, rotated=lambda x: x, segments=lengths)
        values, _ = block_values(name.partition(":")[0], seen, self.cls, frame)
        return values


class PackedSignals(TowerSignals):
    """Of a Qwen-VL tower: all pictures of a call are one sequence, and queries and keys reach the kernel turned."""

    def __init__(self, needs: Sequence[str], tower: Any) -> None:
        self.tower = tower
        self.whole: Sequence[int] | None = getattr(tower, "fullatt_block_indexes", None)
        depth = len(tower.blocks)
        super().__init__(needs, tower.blocks, depth, selected=max(self.whole) if self.whole else None)
        self.unturned: dict[str, Tensor] = {}
        if self.wants_features:
            tower.merger.register_forward_pre_hook(lambda module, args: self.features.append(args[0]))
        for name, block in self.blocks.items():
            if name.partition(":")[0] == "keys":
                tower.blocks[block].attn.qkv.register_forward_hook(self._keep_keys(name, tower.blocks[block].attn))

    def _keep_keys(self, name: str, attention: Any) -> Any:
        def hook(module: nn.Module, args: object, output: tuple[Tensor, ...]) -> None:
            heads = output[0].flatten(0, -2).unflatten(-1, (3, attention.num_attention_heads_per_partition, -1))
            self.unturned[name] = wide(heads[:, 1])[None]  # (1, S, H, d)

        return hook

    def rows(self, grids: Sequence[tuple[int, int, int]]) -> dict[str, list[Tensor]]:
        """The signals of the encoder call that just ran, (R, ...) of each picture or clip; it is forgotten.

        grids: (time, height, width) in patches.
        """
        merge: int = self.tower.spatial_merge_size
        frames = [h * w for t, h, w in grids for _ in range(t)]
        windows, order = (None, None) if self.whole is None else _windows(self.tower, grids)
        segments = Segments(frames, windows, self.whole or ())
        values = {}
        for name, block in self.blocks.items():
            (heads,) = self.seen[block]  # one call of the tower for all pictures of an encoder call
            kept = self.unturned.get(name)
            values[name] = self.signal(name, *heads, segments) if kept is None else kept
        if self.wants_features:
            values["encoder_features"] = wide(self.features[0]).reshape(1, sum(frames), -1)
        self.clear()
        sizes = [t * h * w // merge**2 for t, h, w in grids]
        out = {}
        for name, value in values.items():
            tokens = value[0].unflatten(0, (-1, merge * merge)).mean(1)  # (R, ...) in the tower's order
            out[name] = list((tokens if order is None else tokens[order.to(tokens.device)]).split(sizes))
        return out


def _windows(tower: Any, grids: Sequence[tuple[int, int, int]]) -> tuple[list[int], Tensor]:
    """Patches of each window, and where the tower holds each token, (R,)."""
    lengths: list[int] = []
    order, start = [], 0
    for t, h, w in grids:
        index, ends = tower.get_window_index_thw(t, h, w)
        lengths += ends.diff(prepend=ends.new_zeros(1)).tolist()
        order.append(index + start)
        start += len(index)
    return lengths, torch.cat(order).argsort()


def check_signals(needs: Sequence[str], vllm_config: Any) -> None:
    """Refuse towers of which not all can be seen."""
    if needs and vllm_config.parallel_config.tensor_parallel_size > 1:  # a signal is a mean over all heads
        raise OptionError(
            f"the signals {', '.join(needs)} need all heads of the vision tower on one GPU; serve with "
            "--tensor-parallel-size 1, or take a method that needs none, such as divprune."
        )
    if needs and getattr(vllm_config.compilation_config, "compile_mm_encoder", False):
        raise OptionError(
            f"the signals {', '.join(needs)} cannot be seen in a compiled vision tower; leave compile_mm_encoder out "
            "of --compilation-config, or take a method that needs none, such as divprune."
        )


def _block(name: str, depth: int, selected: int) -> int:
    _, colon, spec = name.partition(":")
    return block_index(spec, depth) if colon else selected


def _kernel(block: nn.Module) -> nn.Module:
    from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention

    return next(part for part in block.modules() if isinstance(part, MMEncoderAttention))
