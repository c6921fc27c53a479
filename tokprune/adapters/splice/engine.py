"""The residual splice: hooks that shorten a tower's sequence inside its own blocks, without a copy of any forward.

Three hooks change the token count between attention and MLP. Before the MLP's norm, the reduced rows replace its input;
behind the last module of the MLP branch the result is put aside and a zero returned, which the block's own residual
addition broadcasts; at the block's end that sum is thrown away for reduced rows + branch. Other hooks observe q, k, v
and hand the attention a bias.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokprune.adapters.splice.intermediates import NAME, forward_intermediates
from tokprune.adapters.splice.run import EncoderTrace, Run, State
from tokprune.adapters.splice.tower import Tower
from tokprune.budget import keep_count
from tokprune.errors import TokpruneError, UnsupportedModelError
from tokprune.methods.encoder_base import EncoderMethod

KEPT_RUNS = 8  # runs whose backward may still recompute blocks (gradient checkpointing)
REENTRANT = (
    "gradient checkpointing in the reentrant way, or of a forward that is too old, cannot be recomputed with an encoder-stage method; "
    'use gradient_checkpointing_kwargs={"use_reentrant": False} and run backward before more forwards.'
)
NO_CHECKPOINTS = (
    "{} leaves the sequence and restores it, which gradient checkpointing cannot recompute block by block; switch checkpointing off, or "
    "take a method that merges (tome, pitome, tofu)."
)


def thread() -> int:
    """Which thread runs; under torch.compile it cannot be asked."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def recomputing() -> bool:
    """Whether this forward is a recomputation inside a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Splice:
    """An encoder method, spliced into one tower. Subclasses know how its sequence is laid out."""

    def __init__(
        self, tower: Tower, method: EncoderMethod, ratio: float | None, budget: int | None, expand: bool
    ) -> None:
        self.tower, self.method = tower, method
        self.ratio, self.budget, self.expand = ratio, budget, expand
        self.handles: list[Any] = []
        self.current: dict[int, Run] = {}
        self.past: deque[Run] = deque(maxlen=KEPT_RUNS)
        self.trace: EncoderTrace | None = None
        self.normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # of the pixels, if known
        self.pixels: dict[int, Tensor] = {}  # the picture that this thread's run began with, for cuts at the entrance
        self.grid: dict[int, tuple[int, int]] = {}  # and its height and width in patches

    # -- to be told by the layout -----------------------------------------------------------------------------------------

    def start(self, x: Tensor, kwargs: Mapping[str, Any]) -> Run:
        """A run that begins with hidden states `x`."""
        raise TokpruneError(f"{type(self).__name__} does not implement start.")

    def shrink(self, run: Run, index: int, x: Tensor) -> Tensor | None:
        """The rows that the method leaves of `x` in block `index`, with run.states[index + 1] set; None: all of
        them.
        """
        raise TokpruneError(f"{type(self).__name__} does not implement shrink.")

    def widen(self, run: Run, state: State, x: Tensor, rebuild: bool = True) -> Tensor:
        """`x` at full length: each original token gets its row, dropped ones get zeros. rebuild: `x` are hidden states,
        which a method that restores the sequence fills in instead.
        """
        raise TokpruneError(f"{type(self).__name__} does not implement widen.")

    def attend(self, run: Run, index: int, args: Any, kwargs: dict[str, Any]) -> Any:
        """The attention module's arguments, with the bias of sizes and padding."""
        raise TokpruneError(f"{type(self).__name__} does not implement attend.")

    def record(self, run: Run, state: State) -> EncoderTrace:
        """What the report and the pictures want to know."""
        raise TokpruneError(f"{type(self).__name__} does not implement record.")

    def restored(self, run: Run, index: int) -> None:
        """Block `index` gets the full sequence again: note it."""
        run.states[index] = State()

    def target(self, patches: int) -> int | None:
        """Patch rows wanted in the end of `patches`, if a ratio or budget was given."""
        given = self.ratio is not None or self.budget is not None
        return keep_count(patches, self.ratio, self.budget) if given else None

    def full_length(self, index: int, x: Tensor) -> Tensor:
        """The output of block `index` of the current run at full length."""
        run = self._run(index)
        done = self.expand and index + 1 == len(self.tower.blocks)
        return x if done else self.widen(run, run.states[index + 1], x)

    def entering(self, index: int, x: Tensor) -> Tensor:
        """Rows that stand for what enters block `index` of the current run, at full length; nothing is rebuilt."""
        run = self._run(index)
        return self.widen(run, run.states[index], x, rebuild=False)

    channels = 0

    def places(self, index: int) -> Tensor | None:
        """Packed towers: original token of each row that enters block `index`, None when all are there."""
        return None

    # -- hooks ----------------------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Put the hooks on; undone completely when one of them fails."""
        tower, method = self.tower, self.method
        try:
            method.check(tower.depth, self.ratio is not None or self.budget is not None)
            active = {i for i in range(tower.depth) if method.active(i, tower.depth)}
            if method.place == "entrance":
                self._check_entrance()
                active = set()
            if tower.patch is not None:
                self.handles.append(tower.patch.register_forward_pre_hook(self._picture))
            for i, parts in enumerate(tower.blocks):
                on, pre = self.handles.append, functools.partial
                on(parts.block.register_forward_pre_hook(pre(self._enter_block, i), with_kwargs=True))
                on(parts.entry.register_forward_pre_hook(pre(self._enter, i)))
                on(parts.attention.register_forward_pre_hook(pre(self._attention, i), with_kwargs=True))
                if i in active:
                    for name, module in parts.seen.items():
                        on(module.register_forward_hook(pre(self._see, i, name)))
                    if method.place_at(i, tower.depth) == "middle":
                        on(parts.middle.register_forward_pre_hook(pre(self._middle, i)))
                        on(parts.tail.register_forward_hook(pre(self._tail, i)))
                # Before all other hooks: transformers captures hidden states by hooks of its own.
                ends = i in active and method.place_at(i, tower.depth) == "end"
                on(parts.block.register_forward_hook(pre(self._leave, i, ends), prepend=True))
            for module, index in tower.taps:
                self.handles.append(module.register_forward_pre_hook(functools.partial(self._tap, index)))
            self.handles.append(tower.root.register_forward_hook(self._root))
            if tower.intermediates:
                original = getattr(tower.root, NAME)
                tower.root.__dict__[NAME] = functools.partial(forward_intermediates, original, self)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take every hook away."""
        if self.handles and self.tower.intermediates:  # a handle that was replaced must not take its successor's away
            self.tower.root.__dict__.pop(NAME, None)
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.pixels.clear()
        self.current.clear()
        self.past.clear()

    def _check_entrance(self) -> None:
        """Refuse towers whose patches cannot be made larger."""
        tower = self.tower
        if tower.patch is None or tower.embed is None:
            raise UnsupportedModelError(
                f"{self.method.info.name!r} chooses patch sizes, which {tower.family} here does not allow: it needs absolute positions, one "
                "token per patch at the connector and images of one size (ViTs of timm and open_clip, CLIP, SigLIP, LLaVA)."
            )

    def _picture(self, module: Any, args: Any) -> None:
        """The picture at the patch embedding: its grid, and for cuts before the first block its pixels."""
        height, width = args[0].shape[-2:]
        self.grid[thread()] = (height // module.kernel_size[0], width // module.kernel_size[1])
        if self.method.place == "entrance":
            self.pixels[thread()] = args[0]

    def _enter_block(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.method.restores and recomputing():
            raise UnsupportedModelError(NO_CHECKPOINTS.format(self.method.info.name))
        if index == 0 and not recomputing():
            x = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
            if not isinstance(x, Tensor):
                raise UnsupportedModelError(f"the blocks of {self.tower.family} were called in an unknown way.")
            for old in self.past:  # what recomputed blocks left behind
                if old.done:
                    for left in (old.merged, old.branch, old.seen):
                        left.clear()
            run = self.start(x, kwargs)
            run.states[0] = State()
            run.grid = self.grid.get(thread())
            self.current[thread()] = run
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self.past.append(run)
            if self.method.place == "entrance":
                run.states[-1] = State()
                rows = self.shrink(run, -1, x)
                if rows is not None:
                    return ((rows, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": rows})
        run = self._run(index)
        if self.method.restores and self.method.place_at(index, self.tower.depth) == "end":
            run.inputs[index] = args[0] if args else kwargs["hidden_states"]
        return self.block_arguments(run, index, args, kwargs)

    def block_arguments(self, run: Run, index: int, args: Any, kwargs: dict[str, Any]) -> Any:
        """The block's arguments; a layout may replace some."""
        return None

    def _run(self, index: int) -> Run:
        run = self.current.get(thread())
        if run is None or index not in run.states:
            raise TokpruneError(
                f"block {index} of the {self.tower.family} tower was called out of order; an encoder-stage method needs the blocks to run "
                "from the first on, one after the other (non-reentrant gradient checkpointing is fine, reentrant is not)."
            )
        return run

    def _enter(self, index: int, module: nn.Module, args: Any) -> None:
        (x,) = args
        if recomputing():  # which of the last forwards is it? The newest one whose input, still saved, lies there.
            place = x.data_ptr()
            run = next((r for r in reversed(self.past) if r.entries.get(index) == place), None)
            if run is None:
                raise UnsupportedModelError(REENTRANT)
            self.current[thread()] = run
        elif torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._run(index).entries[index] = x.data_ptr()

    def _attention(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return self.attend(self._run(index), index, args, kwargs)

    def _see(self, index: int, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self._run(index).seen.setdefault(index, {})[name] = output

    def _middle(self, index: int, module: nn.Module, args: Any) -> Any:
        run = self._run(index)
        rows = self.shrink(run, index, args[0])
        run.seen.pop(index, None)
        if rows is None:
            return None
        run.merged[index] = rows
        return (rows, *args[1:])

    def _tail(self, index: int, module: nn.Module, args: Any, output: Tensor) -> Any:
        run = self._run(index)
        if index not in run.merged:
            return None
        run.branch[index] = output
        return output.new_zeros(1)

    def _leave(self, index: int, ends: bool, module: nn.Module, args: Any, output: Any) -> Any:
        run = self._run(index)
        x = before = output[0] if isinstance(output, tuple) else output
        if index in run.merged:
            branch = run.branch.pop(index)
            factor = self.tower.blocks[index].after()
            x = run.merged.pop(index) + (branch if factor is None else factor * branch)
            if before.requires_grad and not x.requires_grad:  # made without a graph, inside a reentrant checkpoint
                raise UnsupportedModelError(REENTRANT)
        elif ends:
            rows = self.shrink(run, index, x)
            run.seen.pop(index, None)
            x = x if rows is None else rows
        run.inputs.pop(index, None)
        run.states.setdefault(index + 1, run.states[index])
        if not recomputing():
            run.counts.append(x.shape[-2])
        method, depth = self.method, self.tower.depth
        if method.restores and run.states[index + 1].detour and index + 1 < depth and method.whole(index + 1, depth):
            x = self.widen(run, run.states[index + 1], x)
            self.restored(run, index + 1)
        if index + 1 == len(self.tower.blocks):
            if not recomputing():
                self._finish(run)
            if self.expand:
                x = self.widen(run, run.states[index + 1], x)
        if x is before:
            return None
        return (x, *output[1:]) if isinstance(output, tuple) else x

    def _finish(self, run: Run) -> None:
        run.done = True
        self.trace = self.record(run, run.states[self.tower.depth])

    def _tap(self, index: int, module: nn.Module, args: Any) -> Any:
        run = self._run(index)
        return (self.widen(run, run.states[index + 1], args[0]), *args[1:])

    def _root(self, module: nn.Module, args: Any, output: Any) -> None:
        """Bring the listed hidden states to full length."""
        if not self.expand or not hasattr(output, "keys") or output.get("hidden_states") is None:
            return
        run = self.current.get(thread())
        states = output["hidden_states"]
        if run is None or len(states) != len(self.tower.blocks) + 1:
            return
        last = len(states) - 1  # widened when it left the last block
        output["hidden_states"] = tuple(
            h if h is None or i == last else self.widen(run, run.states[i], h) for i, h in enumerate(states)
        )
