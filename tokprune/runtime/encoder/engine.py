"""The residual splice: hooks that shorten a tower's sequence inside its own blocks, without a copy of any forward.

Three hooks change the token count between attention and MLP. Before the MLP's norm, the reduced rows replace its input;
behind the last module of the MLP branch the result is put aside and a zero returned, which the block's own residual
addition broadcasts; at the block's end that sum is thrown away for reduced rows + branch. Other hooks observe q, k, v
and hand the attention a bias.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from typing import Any, Generic, NoReturn

import torch
from torch import Tensor, nn

from tokprune.adapters.hooks import Attached, Attachments, PerThread
from tokprune.adapters.tower_parts import Moments, Tower
from tokprune.adapters.types import ModelCall, Original, Positional, Replaced
from tokprune.budget import keep_count
from tokprune.errors import TokpruneError, UnsupportedModelError
from tokprune.methods.encoder_base import EncoderMethod, Place
from tokprune.runtime.encoder import refusals
from tokprune.runtime.encoder.intermediates import NAME, forward_intermediates, widen_listed
from tokprune.runtime.encoder.pixels import NoReduction, PixelDrop, arguments_of, with_states
from tokprune.runtime.encoder.recompute import PastRuns, recomputing
from tokprune.runtime.encoder.run import EncoderTrace, InFlight, R, State


class Splice(Attached, ABC, Generic[R]):
    """An encoder method, spliced into one tower. Subclasses know how its sequence is laid out.

    The tower may be part of several models. Where it was found inside a model, only that model's calls are reduced:
    those that go through `Tower.owner_methods`; other calls of the tower, in whatever thread, run plain. A tower that
    was given itself is reduced whoever calls it.
    """

    normalisation: Moments | None = None
    """Of the pixels, where it is known."""
    trace: EncoderTrace | None = None
    """Of the last run, in whichever thread."""
    pixels: PixelDrop | None = None
    """What is dropped in front of the first block from the pixels alone."""

    def __init__(
        self, tower: Tower, method: EncoderMethod, ratio: float | None, budget: int | None, expand: bool
    ) -> None:
        self.tower, self.method = tower, method
        self.ratio, self.budget, self.expand = ratio, budget, expand
        self.on = Attachments(self)
        self.owner_methods = tower.owner_methods()
        self.threads = PerThread(InFlight)
        self.past: PastRuns[R] = PastRuns()

    def anchor(self) -> object:
        """The model that is pruned."""
        return self.tower.owner

    @property
    def fold(self) -> int:
        """Tokens in a row of the states: a unit of the connector, or one where the method drops single patches."""
        return 1 if self.method.single_patches else self.tower.fold

    # -- what depends on the layout -----------------------------------------------------------------------------------

    @abstractmethod
    def start(self, x: Tensor, kwargs: ModelCall) -> R:
        """A run that begins with hidden states `x`."""

    @abstractmethod
    def shrink(self, run: R, index: int, x: Tensor) -> Tensor | None:
        """The rows that the method leaves of `x` in block `index`; sets run.states[index + 1]. None: all of them."""

    @abstractmethod
    def drop(self, run: R, x: Tensor) -> bool:
        """Let the pixels method choose in front of the first block; sets run.states[0]. False: it keeps everything."""

    @abstractmethod
    def take(self, run: R, x: Tensor) -> Tensor:
        """The rows of `x`, which was to enter the first block, that run.states[0] keeps."""

    @abstractmethod
    def widen(self, run: R, state: State | None, x: Tensor, rebuild: bool = True) -> Tensor:
        """`x` at full length: each original token gets its row, dropped ones get zeros.

        rebuild: `x` are hidden states, which a method that restores the sequence fills in instead.
        """

    @abstractmethod
    def attend(self, run: R, index: int, args: Positional, kwargs: ModelCall) -> Replaced:
        """The attention module's arguments, with the bias of sizes and padding; None: as they are."""

    @abstractmethod
    def record(self, run: R, state: State | None) -> EncoderTrace:
        """What the report and the pictures want to know."""

    def block_arguments(self, run: R, index: int, args: Positional, kwargs: ModelCall) -> Replaced:
        """The block's arguments, some of them replaced; None: as they are."""
        return None

    def restored(self, run: R, index: int) -> None:
        """Block `index` gets the full sequence again: note it."""
        run.states[index] = None

    def target(self, patches: int) -> int | None:
        """Patch rows wanted in the end of `patches`, if a ratio or budget was given."""
        given = self.ratio is not None or self.budget is not None
        return keep_count(patches, self.ratio, self.budget) if given else None

    def full_length(self, index: int, x: Tensor) -> Tensor:
        """The output of block `index` of the current run at full length."""
        run = self._seen()
        done = self.expand and index + 1 == len(self.tower.blocks)
        return x if done else self.widen(run, run.states[index + 1], x)

    def entering(self, index: int, x: Tensor) -> Tensor:
        """Rows that stand for what enters block `index` of the current run, at full length; nothing is rebuilt."""
        run = self._seen()
        return self.widen(run, run.states[index], x, rebuild=False)

    def _seen(self) -> R:
        """This thread's last run of the tower."""
        run: R | None = self.threads.now.last
        if run is None:
            raise TokpruneError(f"the {self.tower.family} tower has not been run by this thread since it was reduced.")
        return run

    @property
    def label(self) -> str:
        """Names of the methods."""
        names = [] if self.pixels is None else [self.pixels.method.info.name]
        return " + ".join(names if isinstance(self.method, NoReduction) else [*names, self.method.info.name])

    @property
    def channels(self) -> int:
        """Packed towers: channels of queries and keys that carry sizes."""
        return 0

    def places(self, index: int) -> Tensor | None:
        """Packed towers: original token of each row that enters block `index`, None when all are there."""
        return None

    # -- hooks --------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse what cannot be right, before anything is hooked."""
        self.method.check(self.tower.depth, self.ratio is not None or self.budget is not None)
        if self.pixels is not None:
            self.pixels.check(self.tower, self.method)
        if self.method.place == "entrance" and (self.tower.patch is None or self.tower.embed is None):
            raise UnsupportedModelError(refusals.NO_PATCH_SIZES.format(self.method.info.name, self.tower.family))

    def place(self, index: int) -> Place | None:
        """Where the method cuts block `index`; None: it has nothing to do there."""
        method, depth = self.method, self.tower.depth
        if method.place == "entrance" or index >= depth or not method.active(index, depth):
            return None
        return method.place_at(index, depth)

    def put_on(self) -> None:
        """On the tower's blocks, on what they are made of, and on calls of the tower's owner."""
        tower, on = self.tower, self.on
        for target, name in self.owner_methods:
            on.instead(target(), name, "_owner_call", name)
        if tower.patch is not None:
            on.before(tower.patch, "_picture")
        for i, parts in enumerate(tower.blocks):
            on.before(parts.block, "_enter_block", i, with_kwargs=True)
            on.before(parts.entry, "_enter", i)
            on.before(parts.attention, "_attention", i, with_kwargs=True)
            place = self.place(i)
            if place is not None:
                for name, module in parts.reader.watched().items():
                    on.after(module, "_see", i, name, place == "middle")
            if place == "middle":
                on.before(parts.middle, "_middle", i)
                on.after(parts.tail, "_tail", i)
            # Before all other hooks: transformers captures hidden states by hooks of its own.
            on.after(parts.block, "_leave", i, place == "end", prepend=True)
        for module, index in tower.taps:
            on.before(module, "_tap", index)
        on.before(tower.root, "_begin")
        for module in tower.listers():
            on.after(module, "_list")
        if tower.intermediates:
            on.instead(tower.root, NAME, "_intermediates")
        on.instead(tower.root, "__prepare_scriptable__", "_refuse_scripting")

    def _refuse_scripting(self, original: object) -> NoReturn:
        raise UnsupportedModelError(refusals.NO_SCRIPT.format(self.tower.family))

    def remove(self) -> None:
        """Take every hook away."""
        super().remove()
        self.threads = PerThread(InFlight)
        self.past = PastRuns()

    def _owner_call(self, name: str, original: Original, *args: object, **kwargs: object) -> object:
        """A call of the pruned model that may run its tower."""
        now = self.threads.now
        if now.of_owner:
            return original(*args, **kwargs)
        now.of_owner, now.run = True, None
        now.call = None if self.pixels is None else (name, arguments_of(original, args, kwargs))
        try:
            return original(*args, **kwargs)
        finally:
            now.of_owner, now.run, now.pixels, now.call = False, None, None, None

    @property
    def _foreign(self) -> bool:
        """Whether this call of the tower is another model's (or nobody's)."""
        return bool(self.owner_methods) and not self.threads.now.of_owner

    def _intermediates(self, original: Original, *args: Any, **kwargs: Any) -> object:
        return original(*args, **kwargs) if self._foreign else forward_intermediates(original, self, *args, **kwargs)

    def _begin(self, module: nn.Module, args: Positional) -> None:
        """A run of the tower begins: nothing is left of the last one."""
        if not recomputing():
            self.threads.now.run = None

    def _picture(self, module: nn.Conv2d, args: Positional) -> None:
        """The picture at the patch embedding: its grid, and for cuts before the first block its pixels."""
        if self._foreign:
            return
        height, width = args[0].shape[-2:]
        now = self.threads.now
        now.grid = (height // module.kernel_size[0], width // module.kernel_size[1])
        if self.method.place == "entrance" or self.pixels is not None:
            now.pixels = args[0]

    def _enter_block(self, index: int, module: nn.Module, args: Positional, kwargs: ModelCall) -> Replaced:
        now = self.threads.now
        x: Any = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
        if recomputing():
            now.whole_block = True
            run = self._again(index, x)
            if run is not None and self.pixels is not None and index == 0 and run.entered(-1) == x.data_ptr():
                args, kwargs = with_states(args, kwargs, self.take(run, x))
        elif self._foreign:
            now.run = None
            return None
        elif index == 0:
            run = now.run = now.last = self._start(x, kwargs)
            if self.method.place == "entrance":
                run.states[-1] = None
                rows = self.shrink(run, -1, x)
                if rows is not None:
                    return with_states(args, kwargs, rows)
            if self.pixels is not None and self.drop(run, x):
                if not torch.compiler.is_compiling():  # a checkpoint around the whole block keeps that
                    run.entries[-1] = weakref.ref(x)
                args, kwargs = with_states(args, kwargs, self.take(run, x))
        else:
            run = self._run(index)
        if run is None:
            return None
        if self.method.restores and self.method.place_at(index, self.tower.depth) == "end":
            run.inputs[index] = x
        return self.block_arguments(run, index, args, kwargs) or (args, kwargs)

    def _start(self, x: object, kwargs: ModelCall) -> R:
        if not isinstance(x, Tensor):
            raise UnsupportedModelError(refusals.UNKNOWN_CALL.format(self.tower.family, type(x).__name__))
        run = self.start(x, kwargs)
        run.states[0] = None
        run.grid = self.threads.now.grid
        run.graph = torch.is_grad_enabled()
        return run

    def _again(self, index: int, x: Tensor) -> R | None:
        """The run whose block `index` a backward pass computes again, known by where the block's input lies."""
        now = self.threads.now
        run: R | None = self.past.entered_by(index, x)
        run = self.past.entered_by(-1, x) if run is None and index == 0 else run
        if run is None and now.run is not None and now.recomputed == index - 1:
            run = now.run  # several blocks under one checkpoint: only the first one's input was kept
        if run is None and not self._foreign:
            raise UnsupportedModelError(refusals.REENTRANT)
        if run is not None and now.whole_block and self.method.restores:
            raise UnsupportedModelError(refusals.NO_CHECKPOINTS.format(self.method.info.name))
        now.run, now.recomputed = run, index
        return run

    def _run(self, index: int) -> R | None:
        """The run that block `index` belongs to; None when the call is another model's."""
        run: R | None = self.threads.now.run
        if run is None and self.owner_methods:
            return None
        if run is None or index not in run.states:
            raise TokpruneError(refusals.OUT_OF_ORDER.format(index, self.tower.family))
        return run

    def _enter(self, index: int, module: nn.Module, args: tuple[Tensor]) -> None:
        (x,), now = args, self.threads.now
        if recomputing():
            if now.recomputed != index or not now.whole_block:
                now.whole_block = False
                self._again(index, x)
            return
        run = self._run(index)
        if run is None or torch.compiler.is_compiling():
            return
        if run.graph and not torch.is_grad_enabled():  # inside a reentrant checkpoint, whose gradients would get lost
            raise UnsupportedModelError(refusals.REENTRANT)
        if run.graph:
            self.past.add(run, index, x)

    def _attention(self, index: int, module: nn.Module, args: Positional, kwargs: ModelCall) -> Replaced:
        run = self._run(index)
        return None if run is None else self.attend(run, index, args, kwargs)

    def _see(self, index: int, name: str, middle: bool, module: nn.Module, args: Positional, output: Tensor) -> None:
        run = self._run(index)
        comes_to_the_cut = middle or not recomputing() or self.threads.now.whole_block
        if run is not None and comes_to_the_cut:
            run.seen.setdefault(index, {})[name] = output

    def _middle(self, index: int, module: nn.Module, args: Positional) -> Positional | None:
        run = self._run(index)
        if run is None:
            return None
        rows = self.shrink(run, index, args[0])
        run.seen.pop(index, None)
        if rows is None:
            return None
        run.merged[index] = rows
        return (rows, *args[1:])

    def _tail(self, index: int, module: nn.Module, args: Positional, output: Tensor) -> Tensor | None:
        run = self._run(index)
        if run is None or index not in run.merged:
            return None
        if recomputing() and not self.threads.now.whole_block:
            del run.merged[index]
        else:
            run.branch[index] = output
        return output.new_zeros(1)

    def _leave(
        self, index: int, ends: bool, module: nn.Module, args: Positional, output: Tensor | Positional
    ) -> Tensor | Positional | None:
        run = self._run(index)
        if run is None:
            return None
        x = before = output[0] if isinstance(output, tuple) else output
        if index in run.merged:
            branch = run.branch.pop(index)
            factor = self.tower.blocks[index].after()
            x = run.merged.pop(index) + (branch if factor is None else factor * branch)
        elif ends:
            rows = self.shrink(run, index, x)
            run.seen.pop(index, None)
            x = x if rows is None else rows
        run.inputs.pop(index, None)
        run.states.setdefault(index + 1, run.states[index])
        if not recomputing():
            run.counts.append(x.shape[-2])
        x = self._wide_again(run, index, x)
        if x is before:
            return None
        return (x, *output[1:]) if isinstance(output, tuple) else x

    def _wide_again(self, run: R, index: int, x: Tensor) -> Tensor:
        """What block `index` gave, at full length where the method restores it or the tower ends."""
        method, depth, state = self.method, self.tower.depth, run.states[index + 1]
        if method.restores and state is not None and index + 1 < depth and method.whole(index + 1, depth):
            x = self.widen(run, state, x)
            self.restored(run, index + 1)
        if index + 1 == len(self.tower.blocks):
            if not recomputing():
                run.trace = self.trace = self.record(run, run.states[depth])
            if self.expand:
                x = self.widen(run, run.states[index + 1], x)
        return x

    def _tap(self, index: int, module: nn.Module, args: Positional) -> Positional | None:
        run = self._run(index)
        return None if run is None else (self.widen(run, run.states[index + 1], args[0]), *args[1:])

    def _list(self, module: nn.Module, args: Positional, output: Any) -> None:
        """Bring the listed hidden states to full length."""
        run: R | None = self.threads.now.run
        if self.expand and run is not None and not self._foreign:
            widen_listed(output, self, run)
