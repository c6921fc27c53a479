"""The parts of a vision tower: attention modules and how their queries, keys and values are read, blocks, the whole."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from tokprune.adapters.hooks import Ref
from tokprune.adapters.patch_sizes import Embedder
from tokprune.adapters.types import ModelCall
from tokprune.errors import MissingSignalError

Heads: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Queries (B, H, N, d), keys and values (B, H', N, d); a packed sequence has B = 1."""
Moments: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each colour."""

TEXT_MODELS = ("language_model", "text_model")
NORMS = ("q_norm", "k_norm")
ATTENTIONS = ("self_attn", "attention", "attn")
# What encodes pictures, in VLMs and in CLIP-like models.
ENCODE = ("get_image_features", "get_video_features", "encode_image")


def normalisation(processor: object) -> Moments | None:
    """Mean and standard deviation by which a processor normalises pixels of 0 to 1, if it says so."""
    image: Any = getattr(processor, "image_processor", processor)
    rescales = getattr(image, "do_rescale", None) is not False
    mean, std = getattr(image, "image_mean", None), getattr(image, "image_std", None)
    if getattr(image, "do_normalize", None) is False:
        mean, std = ((0.0,), (1.0,)) if rescales else (None, None)  # as they come: white may be 1 or 255
    if mean is None or std is None:
        return None
    shift, factor = (x if isinstance(x, list | tuple) else (x,) for x in (mean, std))
    white = 255 * (getattr(image, "rescale_factor", None) or 1 / 255) if rescales else 255.0 if max(factor) > 1 else 1.0
    return tuple(v / white for v in shift), tuple(v / white for v in factor)


def child(module: object, path: str) -> nn.Module | None:
    """The module under a name, or under several with dots between them; None where there is none."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module if isinstance(module, nn.Module) else None


def attention_of(block: nn.Module) -> nn.Module | None:
    """The attention module of a transformer block that has its own projections, or None."""
    parts = (child(block, name) for name in ATTENTIONS)
    return next((p for p in parts if p is not None and any(child(p, name) for name in ("qkv", "q_proj", "q"))), None)


@dataclass(frozen=True)
class AttentionReader:
    """Reads queries, keys and values of an attention module from what its projections put out.

    This one knows a fused `qkv` and separate `q_proj`, `k_proj`, `v_proj`, norms of queries and keys, grouped heads,
    and rotary positions as transformers passes them; kinds of towers with another attention derive from it.
    """

    attention: nn.Module

    def watched(self) -> dict[str, nn.Module]:
        """The modules whose outputs `read` takes, by name, as they are now: LoRA may wrap them at any time."""
        names = ("qkv",) if child(self.attention, "qkv") else ("q_proj", "k_proj", "v_proj")
        found = {name: child(self.attention, name) for name in (*names, *NORMS)}
        if names[-1] == "v_proj" and found["v_proj"] is None:  # Qwen2.5-Omni calls them q, k and v
            found |= {name: child(self.attention, name[0]) for name in names}
        return {k: m for k, m in found.items() if m is not None and not isinstance(m, nn.Identity)}

    def read(self, seen: Mapping[str, Tensor]) -> Heads:
        """Queries, keys and values before rotary positions.

        seen: outputs of the `watched` modules; norms may be missing.
        """
        heads = getattr(self.attention, "num_heads", None)
        heads = heads or getattr(getattr(self.attention, "config", None), "num_attention_heads", None)
        size = getattr(self.attention, "head_dim", None)
        if "qkv" in seen and hasattr(self.attention, "kv_dim"):  # EXAONE 4.5: grouped heads
            size, groups = int(size), int(self.attention.kv_dim) // int(size)  # type: ignore[arg-type]
            q, k, v = seen["qkv"].unflatten(-1, (-1, size)).split((heads, groups, groups), -2)
        elif "qkv" in seen:
            q, k, v = seen["qkv"].unflatten(-1, (3, heads, -1)).unbind(-3)  # (..., N, H, d)
        else:
            split = (-1, size) if size else (heads, -1)
            q, k, v = (seen[f"{name}_proj"].unflatten(-1, split) for name in "qkv")
        q, k = seen.get("q_norm", q), seen.get("k_norm", k)
        q, k = (x if x.dim() == v.dim() else x.unflatten(-1, (-1, v.shape[-1])) for x in (q, k))  # norm over all heads
        q, k, v = (x[None] if x.dim() == 3 else x for x in (q, k, v))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    @property
    def scale(self) -> float | None:
        """Factor of the logits, where the module names it."""
        scale = getattr(self.attention, "scaling", None) or getattr(self.attention, "scale", None)
        return None if scale is None else float(scale)

    @property
    def _rotation(self) -> Any:
        """What transformers calls the quarter turn in the attention's module: of halves, or else of pairs."""
        module = sys.modules[type(self.attention).__module__]
        return getattr(module, "rotate_half", None) or getattr(module, "rotate_pairwise", None)

    def positions(self, call: ModelCall) -> object:
        """The rotary table among the arguments of a call of the attention; None: it has none."""
        return call.get("position_embeddings")

    def check_positions(self, positions: object) -> None:
        """Refuse a rotary embedding that `turn` does not know."""
        if positions is not None and not (self._rotation and isinstance(positions, (tuple, list))):
            raise MissingSignalError(
                f"{type(self.attention).__name__} turns its queries in a way tokprune does not know; methods that look "
                "at the features alone work: random, uniform, pool, divprune."
            )

    def turn(self, x: Tensor, positions: Any) -> Tensor:
        """Queries or keys (B, H, N, d) as the attention turns them.

        positions: cosine and sine, each (N, d), (B, N, d) or (B, 1, N, d); of a shorter N, the last tokens'; of a
        shorter d, the first channels'.
        """
        if positions is None:
            return x
        cos, sin = (p.to(x)[:, None] if p.dim() == 3 else p.to(x) for p in positions)
        prefix, width = x.shape[2] - cos.shape[-2], cos.shape[-1]  # DINOv3 turns patches alone
        part = x[:, :, prefix:, :width]
        turned: Tensor = self._rotation(part)
        part = torch.cat([part * cos + turned * sin, x[:, :, prefix:, width:]], -1)
        return torch.cat([x[:, :, :prefix], part], 2)


class HeadsFirstReader(AttentionReader):
    """Attention whose norms of queries and keys see (B, H, N, d)."""

    def read(self, seen: Mapping[str, Tensor]) -> Heads:
        q, k, v = super().read({name: x for name, x in seen.items() if name not in NORMS})
        return seen.get("q_norm", q), seen.get("k_norm", k), v


def no_scale() -> None:
    """The parameter behind the MLP of a block that has none there; a function with a name, so that handles can be
    pickled."""
    return None


@dataclass(frozen=True)
class BlockParts:
    """One transformer block, `x += attention(entry(x)); x += after * tail(...(middle(x)))`, by its modules."""

    block: nn.Module
    entry: nn.Module
    """Norm before the attention."""
    reader: AttentionReader
    """Reads the attention, which takes the bias of the logits as a keyword."""
    middle: nn.Module
    """Norm before the MLP."""
    tail: nn.Module
    """Last module of the MLP branch."""
    after: Callable[[], Tensor | None] = no_scale
    """Parameter that multiplies the branch behind `tail`, if any."""

    @property
    def attention(self) -> Any:
        """The attention module."""
        return self.reader.attention

    @property
    def scale(self) -> float:
        """Factor of the logits."""
        return self.reader.scale or float(self.attention.head_dim) ** -0.5


@dataclass(frozen=True)
class Tower:
    """A vision tower in which the encoder stage can reduce tokens."""

    family: str
    """For messages."""
    root_ref: Ref
    """Module whose call is one run and whose output may list hidden states."""
    owner_ref: Ref
    """The model that was given; the root may be a part of it."""
    blocks: tuple[BlockParts, ...]
    depth: int
    """How many of the blocks feed the output that is used."""
    prefix: int = 0
    """Leading tokens that are no patches."""
    cls: bool = False
    """Whether the first of them is [CLS]."""
    mask: str = "attention_mask"
    """Keyword of the attention that takes an additive mask."""
    padding: bool = False
    """That keyword takes one number per key, (B, N), instead."""
    fold: int = 1
    """Patches that the connector joins to one token."""
    unit_order: Callable[[int], Tensor] | None = None
    """fold > 1: of N patches the (N,) patch numbers, unit by unit."""
    packed: bool = False
    """All images in one sequence (S, C), with cu_seqlens."""
    row: tuple[int, int] = (3, 1)
    """Packed towers: channels and frames in a row of pixels, which is one patch."""
    pools: bool = False
    """The head pools over patches."""
    taps: tuple[tuple[nn.Module, int], ...] = ()
    """Modules that read the output of a block (by number) beside the main path and need its full length."""
    vlm: bool = False
    """It feeds a language model."""
    intermediates: bool = False
    """It has timm's forward_intermediates."""
    grids: Callable[[Tensor, ModelCall], Tensor] | None = None
    """Packed towers that reorder units: raster numbers of the sequence's units, from grid and keywords."""
    patch: nn.Conv2d | None = None
    """The convolution that embeds patches, where patches may be made larger."""
    embed: Embedder | None = None
    normal: Moments | None = None
    """Of the pixels, where the model knows it."""
    rope: str = ""
    """Keyword of the blocks that takes a rotary table (N, D) of the patches, or cosine and sine, (N, D) each."""
    relative: bool = False
    """The attention's mask is a table of relative positions, (1, H, N, N)."""
    dense: bool = False
    """What reads its output puts it back on the grid, and needs every patch at its place."""

    @property
    def root(self) -> Any:
        """The tower's outermost module."""
        return self.root_ref()

    @property
    def owner(self) -> Any:
        """The model that was given."""
        return self.owner_ref()

    def listers(self) -> list[nn.Module]:
        """Modules whose output may list hidden states: the root, and what is around its blocks and around itself, up
        to the module that holds a language model, too."""
        path = next(n for n, m in self.owner.named_modules() if m is self.blocks[0].block).split(".")
        around = [self.owner.get_submodule(".".join(path[:i])) for i in range(len(path))]
        texts = [i for i, m in enumerate(around) if any(hasattr(m, name) for name in TEXT_MODELS)]
        around = around[texts[-1] + 1 :] if texts else around
        return [m for m in around if m is self.root or hasattr(m, "base_model_prefix")]

    def owner_methods(self) -> tuple[tuple[Ref, str], ...]:
        """Methods through which the owner calls the root, as (object, name); none when it is the root itself."""
        owner = self.owner
        if owner is None or owner is self.root:
            return ()
        holder = owner.base_model if self.vlm else owner
        names = ENCODE if self.vlm else ("forward", "forward_intermediates", *ENCODE)
        return tuple((Ref(holder), name) for name in names if hasattr(holder, name))


class TowerKind(ABC):
    """One kind of vision tower."""

    part_of_open_clip: ClassVar[bool] = False
    """open_clip models hold such towers as `visual`, `trunk` or `visual.trunk`."""

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is a tower of this kind."""

    def reader(self, block: nn.Module) -> AttentionReader | None:
        """What reads the attention of `block`, where this kind reads it in a way of its own; else None."""
        return None

    @abstractmethod
    def parts(self, block: Any) -> BlockParts:
        """The parts of one block, or an error that says why its sequence cannot be shortened."""

    @abstractmethod
    def tower(self, root: Any, owner: nn.Module, side: int = 1) -> Tower:
        """The tower `root` of the model `owner`, whose connector joins side x side patches to a token."""

    def plain(self, root: nn.Module, owner: nn.Module, blocks: Iterable[nn.Module]) -> Tower:
        """A tower of these blocks of which nothing else is known."""
        parts = tuple(self.parts(block) for block in blocks)
        return Tower(type(root).__name__, Ref(root), Ref(owner), blocks=parts, depth=len(parts))
