"""Looks at the queries, keys and values of chosen vision blocks while the tower runs any attention kernel it likes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokprune.adapters.dialect import bind
from tokprune.adapters.hooks import Attachments, Lock, PerThread, Ref
from tokprune.adapters.tower_kinds import reader_of
from tokprune.adapters.tower_parts import NORMS, AttentionReader
from tokprune.adapters.towers import tower_blocks
from tokprune.adapters.types import ModelCall, Positional
from tokprune.errors import MissingSignalError
from tokprune.ops.numeric import wide

# Attention entries held at once while scores are summed over queries: 64 MB of float32.
_CHUNK = 2**24


@dataclass(frozen=True)
class Projections:
    """Queries, keys and values of one block, ready for scores, and who may attend to whom."""

    q: Tensor
    """(B, H, N, d), without rotary positions."""
    k: Tensor
    """(B, H', N, d), without rotary positions."""
    v: Tensor
    """(B, H', N, d)"""
    scale: float
    """Of the logits."""
    rotated: Callable[[Tensor], Tensor]
    """Queries or keys with their rotary positions."""
    segments: list[int] | None = None
    """Lengths of the parts of a packed sequence (B = 1) that attend only to themselves."""
    mask: Tensor | None = None
    """(B or 1, 1 or H, 1 or N, N) true or 0 where a query may attend; other floats are added to its logits."""
    bounds: Tensor | None = None
    """(S + 1,) where segments begin and end, as the tower was given them; instead of `segments`."""

    def cut(self, bounds: Tensor) -> Projections:
        """With segments by `bounds`; the host waits where it does not know them."""
        return replace(self, segments=bounds.diff().tolist(), bounds=None)

    def _pairs(self, one_head: bool, values: bool) -> tuple[Tensor, Tensor, float]:
        """Queries and keys as they meet, (B, H, N, d) each in float32, and what scales their products. The arguments
        are those of `received`."""
        if values:
            v = wide(self.v)
            return v, v, 1.0
        q, k = self.rotated(wide(self.q)), self.rotated(wide(self.k))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        return (_one_head(q), _one_head(k), (q.shape[1] * q.shape[3]) ** -0.5) if one_head else (q, k, self.scale)

    def _visible(self) -> Tensor | None:
        """(B, 1, N, N) bool: which keys a query sees, padded queries seeing none; None: all."""
        if self.mask is None:
            return None
        mask = self.mask if self.mask.dtype == torch.bool else self.mask > torch.finfo(self.mask.dtype).min / 2
        real = mask.any(-2, keepdim=True)  # a key that nobody sees is padding, and so is the query beside it
        return mask & real.transpose(-1, -2)

    def _bias(self) -> Tensor | None:
        """(B, 1 or H, 1 or N, N) what a float mask adds to the logits that it does not hide; None: nothing."""
        if self.mask is None or not self.mask.is_floating_point():
            return None
        return wide(self.mask).masked_fill(self.mask <= torch.finfo(self.mask.dtype).min / 2, 0)

    def cls_row(self, logits: bool = False, one_head: bool = False, values: bool = False) -> Tensor:
        """What the first token attends to, mean over heads. -> (B, N), the first token included.

        The arguments are those of `received`.
        """
        q, k, scale = self._pairs(one_head, values)
        row = (q[:, :, :1] * scale) @ k.transpose(-1, -2)  # (B, H, 1, N)
        if logits:
            return row.mean(1)[:, 0]
        row = row if values or (bias := self._bias()) is None else row + bias[:, :, :1]
        visible = self._visible()
        if visible is not None:
            row = row.masked_fill(~visible[:, :, :1], -torch.inf)
        return row.softmax(-1).mean(1)[:, 0]

    def received(
        self, logits: bool = False, one_head: bool = False, values: bool = False, frame: Tensor | None = None
    ) -> Tensor:
        """Mean over heads and queries of the attention that each token receives. -> (B, N).

        The queries are those that may attend to the token. logits: mean before the softmax. one_head: queries and keys
        as one head. values: values take the place of queries and keys, unscaled. frame: (N,) number of queries to
        divide by, where segments are windows of a larger whole.
        """
        q, k, scale = self._pairs(one_head, values)
        if self.segments is None:
            return _column_mean(q, k, scale, self._visible(), logits, None if values else self._bias())
        # Segments of equal length are one batch; a video's frames and a tower's windows are many and alike.
        lengths = torch.tensor(self.segments)
        starts = lengths.cumsum(0) - lengths
        out = q.new_zeros(1, q.shape[2])
        for n in lengths.unique().tolist():
            where = (starts[lengths == n, None] + torch.arange(n)).to(q.device)  # (G, n)
            queries, keys = q[0][:, where].transpose(0, 1), k[0][:, where].transpose(0, 1)  # (G, H, n, d)
            score = _column_mean(queries, keys, scale, None, logits)
            if frame is not None and not logits:
                score = score * (n / frame.to(score)[where])
            out[0, where.flatten()] = score.flatten()
        return out


def _one_head(x: Tensor) -> Tensor:
    """(B, H, N, d) -> (B, 1, N, H*d)."""
    return x.transpose(1, 2).flatten(2)[:, None]


def _column_mean(
    q: Tensor, k: Tensor, scale: float, visible: Tensor | None, logits: bool, bias: Tensor | None = None
) -> Tensor:
    """Mean over heads and queries of the attention that each key receives, a chunk of queries at a time.

    q, k: (B, H, N, d) -> (B, N).
    """
    b, h, n, _ = q.shape
    if logits and visible is None:
        return ((q * scale).mean(2, keepdim=True) @ k.transpose(-1, -2)).mean(1)[:, 0]
    total = q.new_zeros(b, n)
    keys = k.transpose(-1, -2)
    step = max(1, _CHUNK // max(b * h * n, 1))
    for start in range(0, n, step):
        scores = (q[:, :, start : start + step] * scale) @ keys
        if bias is not None and not logits:
            scores = scores + (bias if bias.shape[2] == 1 else bias[:, :, start : start + step])
        if visible is None:
            total += scores.softmax(-1).sum(2).mean(1)
            continue
        seen = visible[:, :, start : start + step]
        if not logits:  # queries that see nothing are padding; they give nothing
            scores = scores.masked_fill(~seen, -torch.inf).masked_fill(~seen.any(-1, keepdim=True), 0).softmax(-1)
        total += (scores * seen).sum(2).mean(1)
    if visible is None:
        return total / n
    return total / visible[:, 0].sum(-2).clamp(min=1)


Key = tuple[str, int]
"""A name and a block number."""


@dataclass
class _Seen:
    """What a thread's last run of the tower showed."""

    open: bool = False
    """Inside a call of the probe's own model."""
    running: bool = False
    """The tower runs, and this probe listens."""
    outputs: dict[Key, Tensor] = field(default_factory=dict)
    calls: dict[int, tuple[Positional, ModelCall]] = field(default_factory=dict)
    """Arguments of each block's attention."""

    def clear(self) -> None:
        """Let go of everything."""
        self.outputs, self.calls = {}, {}


class AttentionProbe:
    """Keeps references to what chosen blocks of a vision tower compute; scores are made from them on demand.

    Nothing is copied and no attention map is kept: for one block of CLIP-L that is 5 MB instead of 500. Hooks sit on
    the instances alone and only listen while the tower itself runs, so gradient checkpointing's second pass leaves
    nothing behind. The projections are looked up again at every run: adapters (LoRA) put on later are seen. Each thread
    sees its own runs alone.
    """

    def __init__(self, tower: nn.Module, blocks: Iterable[int] = (), outputs: Iterable[int] = ()) -> None:
        """blocks: indices whose queries, keys and values are wanted; outputs: indices whose output is. 0-based."""
        self._tower = Ref(tower)
        self.blocks, self.outputs = sorted(set(blocks)), sorted(set(outputs))
        self.on = Attachments(self)
        self._threads = PerThread(_Seen)
        self.own_calls = False
        self._lock = Lock()
        self._hooked: dict[Key, tuple[nn.Module, RemovableHandle]] = {}
        # A tower without blocks is only an error when something is to be read from them.
        modules = tower_blocks(tower) if self.blocks or self.outputs else []
        self._modules = {i: modules[i] for i in {*self.blocks, *self.outputs}}

    @property
    def tower(self) -> Any:
        """The vision tower; None when it is gone."""
        return self._tower()

    def anchor(self) -> object:
        """The vision tower."""
        return self.tower

    @property
    def listens(self) -> bool:
        """Whether there is anything to listen to."""
        return bool(self._modules)

    def install(self, own_calls: bool = False) -> AttentionProbe:
        """Start listening. own_calls: only to runs inside `listening()`, for towers that other models hold, too."""
        if len(self.on) or not self.listens:
            return self
        self.own_calls = own_calls
        self.on.before(self.tower, "_begin")
        self.on.after(self.tower, "_end", always_call=True)
        for i in self.blocks:
            self.on.before(self._reader(i).attention, "_keep_call", i, with_kwargs=True)
        for i in self.outputs:
            self.on.after(self._modules[i], "_keep_output", ("output", i))
        self._hook_projections()
        return self

    def remove(self) -> None:
        """Stop listening and leave no trace."""
        self.on.remove()
        self._hooked = {}
        self._threads = PerThread(_Seen)

    def clear(self) -> None:
        """Let go of everything that this thread saw."""
        self._threads.now.clear()

    def __enter__(self) -> AttentionProbe:
        return self.install()

    def __exit__(self, *_: object) -> None:
        self.remove()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Runs of the tower in this thread belong to the probe's own model meanwhile."""
        seen: _Seen = self._threads.now
        seen.open = True
        seen.clear()
        try:
            yield
        finally:
            seen.open = seen.running = False

    def _begin(self, module: nn.Module, args: Positional) -> None:
        seen: _Seen = self._threads.now
        seen.running = seen.open or not self.own_calls
        if seen.running:
            seen.clear()
            self._hook_projections()

    def _end(self, module: nn.Module, args: Positional, output: object) -> None:
        self._threads.now.running = False

    def _hook_projections(self) -> None:
        """Listen to the projections that are in place now; they may have been wrapped since."""
        wanted: dict[Key, nn.Module] = {}
        for i in self.blocks:
            wanted |= {(name, i): module for name, module in self._reader(i).watched().items()}
        hooked = self._hooked
        if len(hooked) == len(wanted) and all(key in hooked and hooked[key][0] is m for key, m in wanted.items()):
            return
        with self._lock:  # two threads may see the change at once
            for key, (module, handle) in list(self._hooked.items()):
                if wanted.get(key) is not module:
                    self.on.drop(handle)
                    del self._hooked[key]
            for key, module in wanted.items():
                if key not in self._hooked:
                    self._hooked[key] = (module, self.on.after(module, "_keep_output", key))

    def _keep_output(self, key: Key, module: nn.Module, args: Positional, output: Tensor | Positional) -> None:
        seen: _Seen = self._threads.now
        if seen.running:
            seen.outputs[key] = (output[0] if isinstance(output, (tuple, list)) else output).detach()

    def _keep_call(self, block: int, module: nn.Module, args: Positional, kwargs: ModelCall) -> None:
        seen: _Seen = self._threads.now
        if seen.running:
            seen.calls[block] = (args, dict(kwargs))

    def output(self, block: int) -> Tensor:
        """The hidden state that block `block` gave, (B, N, C)."""
        seen: _Seen = self._threads.now
        x = seen.outputs.get(("output", block))
        if x is None:
            raise self._missing(block, self.outputs)
        return x if x.dim() == 3 else x[None]

    def _missing(self, block: int, wanted: list[int]) -> MissingSignalError:
        """The error that says why nothing was seen of a block. wanted: blocks to which the probe listens for it."""
        why = (
            "the tower has not run since (or ran inside a graph compiled before tokprune was applied: apply first)"
            if block in wanted
            else f"the probe listens to blocks {wanted}"
        )
        return MissingSignalError(f"nothing was seen of block {block} of {type(self.tower).__name__}: {why}.")

    def projections(self, block: int, cut: bool = True) -> Projections:
        """Queries, keys and values of block `block`, as the last run of the tower made them.

        cut: tell `segments`, for which the host waits; else `bounds` are left to be cut.
        """
        seen: _Seen = self._threads.now
        if block not in seen.calls:
            raise self._missing(block, self.blocks)
        reader = self._reader(block)
        call = bind(reader.attention, *seen.calls[block])
        outputs = {name: seen.outputs[name, block] for name in reader.watched() if (name, block) in seen.outputs}
        if reader.watched().keys() - outputs.keys() - set(NORMS):
            raise self._missing(block, self.blocks)
        q, k, v = reader.read(outputs)
        bounds = call.get("cu_seqlens")
        bounds = call.get("cu_seq_lens_q") if bounds is None else bounds
        mask = call.get("attention_mask", call.get("attn_mask"))
        positions = reader.positions(call)
        reader.check_positions(positions)
        found = Projections(
            q,
            k,
            v,
            scale=reader.scale or q.shape[-1] ** -0.5,
            rotated=functools.partial(reader.turn, positions=positions),
            mask=_square(mask, v.shape[2]) if isinstance(mask, Tensor) and bounds is None else None,
            bounds=bounds,
        )
        return found.cut(bounds) if cut and bounds is not None else found

    def _reader(self, block: int) -> AttentionReader:
        """What reads the attention of block `block`."""
        reader = reader_of(self._modules[block])
        if reader is None:
            attends = [i for i, b in enumerate(tower_blocks(self.tower)) if reader_of(b) is not None]
            raise MissingSignalError(
                f"block {block} of {type(self.tower).__name__} has no attention to read from; blocks {attends} have."
            )
        return reader


def _square(mask: Tensor, n: int) -> Tensor:
    """Any attention mask as (B, 1, N, N)."""
    if mask.dim() == 2 and mask.shape[1] == n:  # (B, N) of the keys, as flash attention takes it
        return mask.bool()[:, None, None].expand(-1, 1, n, -1)
    return mask[:, None] if mask.dim() == 3 else mask
