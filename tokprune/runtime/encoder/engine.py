"""The residual splice: hooks that shorten a tower's sequence inside its own blocks, without a copy of any forward.

Three hooks change the token count between attention and MLP. Before the MLP's norm, the reduced rows replace its input;
behind the last module of the MLP branch the result is put aside and a zero returned, which the block's own residual
addition broadcasts; at the block's end that sum is thrown away for reduced rows + branch. Other hooks observe q, k, v
and hand the attention a bias.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokprune.adapters.hooks import Attachments, Lock, PerThread
from tokprune.budget import keep_count
from tokprune.errors import TokpruneError, UnsupportedModelError
from tokprune.methods.encoder_base import EncoderMethod
from tokprune.runtime.encoder.intermediates import NAME, forward_intermediates
from tokprune.runtime.encoder.run import EncoderTrace, Run, State
from tokprune.runtime.encoder.tower import Tower

REENTRANT = (
    "gradient checkpointing in the reentrant way cannot be recomputed with an encoder-stage method: the tower would get no gradients. "
    'Use gradient_checkpointing_kwargs={"use_reentrant": False} (set_grad_checkpointing of timm and open_clip does so by itself).'
)
NO_SCRIPT = (
    "torch.jit.script cannot compile {} with an encoder-stage method on it (TorchScript knows no hooks of this kind); script the model "
    "before apply, or after remove. torch.compile works."
)
UNKNOWN_CALL = (
    "the blocks of {} were called with {} where hidden states were expected: tracing with stand-ins for tensors (torch.fx) cannot follow "
    "an encoder-stage method, whose steps depend on the number of tokens. Trace the model before apply, or after remove."
)
NO_CHECKPOINTS = (
    "{} leaves the sequence and restores it, which gradient checkpointing cannot recompute block by block; switch checkpointing off, or "
    "take a method that merges (tome, pitome, tofu)."
)


def recomputing() -> bool:
    """Whether this forward is a recomputation inside a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@dataclass
class InFlight:
    """What one thread's call of the tower knows.

    own: inside a call of the model that is pruned. run: the tower's run now. last: the one that whoever looks at the tower
    afterwards is told about. again: the block that a backward pass computes again, with its hooks (its own ones included when
    `whole`). grid, pixels: of the picture that the run began with, in patches and as it is; frames: packed towers' sizes of
    frames in units, and their order.
    """

    own: bool = False
    run: Run | None = None
    last: Run | None = None
    again: int = -2
    whole: bool = False
    grid: tuple[int, int] | None = None
    pixels: Tensor | None = None
    frames: tuple[list[tuple[int, int]], Tensor | None] | None = None


class Splice:
    """An encoder method, spliced into one tower. Subclasses know how its sequence is laid out.

    The tower may be part of several models. Where it was found inside a model, only that model's calls are reduced: those that
    go through one of `doors`, methods of that model by name; other calls of the tower, in whatever thread, run plain. A tower
    that was given itself is reduced whoever calls it.
    """

    def __init__(
        self, tower: Tower, method: EncoderMethod, ratio: float | None, budget: int | None, expand: bool
    ) -> None:
        self.tower, self.method = tower, method
        self.ratio, self.budget, self.expand = ratio, budget, expand
        self.on = Attachments(self)
        self.doors = tower.doors()
        self.threads = PerThread(InFlight)
        self.past: list[Run] = []  # whose backward may still compute blocks again
        self.lock = Lock()
        self.trace: EncoderTrace | None = None  # of the last run, in whichever thread
        self.normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # of the pixels, if known

    def __getstate__(self) -> dict[str, Any]:
        """A copy does not go through the backward passes of the original."""
        return {**vars(self), "past": []}

    def anchor(self) -> Any:
        """The model that is pruned."""
        return self.tower.owner

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
        run = self._seen()
        done = self.expand and index + 1 == len(self.tower.blocks)
        return x if done else self.widen(run, run.states[index + 1], x)

    def entering(self, index: int, x: Tensor) -> Tensor:
        """Rows that stand for what enters block `index` of the current run, at full length; nothing is rebuilt."""
        run = self._seen()
        return self.widen(run, run.states[index], x, rebuild=False)

    def _seen(self) -> Run:
        """This thread's last run of the tower."""
        run = self.threads.now.last
        if run is None:
            raise TokpruneError(f"the {self.tower.family} tower has not been run by this thread since it was reduced.")
        return run

    channels = 0

    def places(self, index: int) -> Tensor | None:
        """Packed towers: original token of each row that enters block `index`, None when all are there."""
        return None

    # -- hooks ----------------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse what cannot be right, before anything is hooked."""
        self.method.check(self.tower.depth, self.ratio is not None or self.budget is not None)
        if self.method.place == "entrance":
            self._check_entrance()

    @property
    def active(self) -> set[int]:
        """Blocks in which the method has something to do."""
        if self.method.place == "entrance":
            return set()
        return {i for i in range(self.tower.depth) if self.method.active(i, self.tower.depth)}

    def install(self) -> None:
        """Put the hooks on; undone completely when one of them fails."""
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def _install(self) -> None:
        tower, method, on, active = self.tower, self.method, self.on, self.active
        for target, name in self.doors:
            on.instead(target(), name, "_own_call")
        if tower.patch is not None:
            on.before(tower.patch, "_picture")
        for i, parts in enumerate(tower.blocks):
            on.before(parts.block, "_enter_block", i, with_kwargs=True)
            on.before(parts.entry, "_enter", i)
            on.before(parts.attention, "_attention", i, with_kwargs=True)
            if i in active:
                middle = method.place_at(i, tower.depth) == "middle"
                for name, module in parts.seen.items():
                    on.after(module, "_see", i, name, middle)
                if middle:
                    on.before(parts.middle, "_middle", i)
                    on.after(parts.tail, "_tail", i)
            # Before all other hooks: transformers captures hidden states by hooks of its own.
            ends = i in active and method.place_at(i, tower.depth) == "end"
            on.after(parts.block, "_leave", i, ends, prepend=True)
        for module, index in tower.taps:
            on.before(module, "_tap", index)
        on.before(tower.root, "_begin")
        on.after(tower.root, "_root")
        if tower.intermediates:
            on.instead(tower.root, NAME, "_intermediates")
        on.instead(tower.root, "__prepare_scriptable__", "_refuse_scripting")

    def _refuse_scripting(self, original: Any) -> Any:
        raise UnsupportedModelError(NO_SCRIPT.format(self.tower.family))

    def remove(self) -> None:
        """Take every hook away."""
        self.on.remove()
        self.threads = PerThread(InFlight)
        self.past = []

    def _own_call(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of the pruned model that may run its tower."""
        now = self.threads.now
        if now.own:
            return original(*args, **kwargs)
        now.own, now.run = True, None
        try:
            return original(*args, **kwargs)
        finally:
            now.own, now.run, now.pixels = False, None, None

    @property
    def _foreign(self) -> bool:
        """Whether this call of the tower is another model's (or nobody's)."""
        return bool(self.doors) and not self.threads.now.own

    def _intermediates(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs) if self._foreign else forward_intermediates(original, self, *args, **kwargs)

    def _begin(self, module: nn.Module, args: Any) -> None:
        """A run of the tower begins: nothing is left of the last one."""
        if not recomputing():
            self.threads.now.run = None

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
        if self._foreign:
            return
        height, width = args[0].shape[-2:]
        now = self.threads.now
        now.grid = (height // module.kernel_size[0], width // module.kernel_size[1])
        if self.method.place == "entrance":
            now.pixels = args[0]

    def _enter_block(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        now = self.threads.now
        x: Any = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
        if recomputing():
            now.whole = True
            run = self._again(index, x)
        elif self._foreign:
            now.run = None
            return None
        elif index == 0:
            run = now.run = now.last = self._start(x, kwargs)
            if self.method.place == "entrance":
                run.states[-1] = State()
                rows = self.shrink(run, -1, x)
                if rows is not None:
                    return ((rows, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": rows})
        else:
            run = self._run(index)
        if run is None:
            return None
        if self.method.restores and self.method.place_at(index, self.tower.depth) == "end":
            run.inputs[index] = x
        return self.block_arguments(run, index, args, kwargs)

    def _start(self, x: Any, kwargs: Mapping[str, Any]) -> Run:
        if not isinstance(x, Tensor):
            raise UnsupportedModelError(UNKNOWN_CALL.format(self.tower.family, type(x).__name__))
        run = self.start(x, kwargs)
        run.states[0] = State()
        run.grid = self.threads.now.grid
        run.graph = torch.is_grad_enabled()
        return run

    def _again(self, index: int, x: Any) -> Run | None:
        """The run whose block `index` a backward pass computes again: the one whose input to it is still alive and lies there."""
        now = self.threads.now
        place = x.data_ptr()
        run = next((r for r in reversed(self.past) if r.entered(index) == place), None)
        if run is None and now.run is not None and now.again == index - 1:
            run = now.run  # several blocks under one checkpoint: only the first one's input was kept
        if run is None and not self._foreign:
            raise UnsupportedModelError(REENTRANT)
        if run is not None and now.whole and self.method.restores:
            raise UnsupportedModelError(NO_CHECKPOINTS.format(self.method.info.name))
        now.run, now.again = run, index
        return run

    def block_arguments(self, run: Run, index: int, args: Any, kwargs: dict[str, Any]) -> Any:
        """The block's arguments; a layout may replace some."""
        return None

    def _run(self, index: int) -> Run | None:
        """The run that block `index` belongs to; None when the call is another model's."""
        run = self.threads.now.run
        if run is None and self.doors:
            return None
        if run is None or index not in run.states:
            raise TokpruneError(
                f"block {index} of the {self.tower.family} tower was called out of order; an encoder-stage method needs the blocks to run "
                "from the first on, one after the other (non-reentrant gradient checkpointing is fine, reentrant is not)."
            )
        return run

    def _enter(self, index: int, module: nn.Module, args: Any) -> None:
        (x,) = args
        if recomputing():
            if self.threads.now.again != index or not self.threads.now.whole:
                self.threads.now.whole = False
                self._again(index, x)
            return
        run = self._run(index)
        if run is None or torch.compiler.is_compiling():
            return
        if run.graph and not torch.is_grad_enabled():  # inside a reentrant checkpoint, whose gradients would get lost
            raise UnsupportedModelError(REENTRANT)
        if run.graph:
            run.entries[index] = weakref.ref(x)
            with self.lock:
                self.past = [*(r for r in self.past if r is not run and r.held()), run]

    def _attention(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        run = self._run(index)
        return None if run is None else self.attend(run, index, args, kwargs)

    def _see(self, index: int, name: str, middle: bool, module: nn.Module, args: Any, output: Any) -> None:
        run = self._run(index)
        if run is None or (
            not middle and recomputing() and not self.threads.now.whole
        ):  # the block's end does not come again
            return
        run.seen.setdefault(index, {})[name] = output

    def _middle(self, index: int, module: nn.Module, args: Any) -> Any:
        run = self._run(index)
        if run is None:
            return None
        rows = self.shrink(run, index, args[0])
        run.seen.pop(index, None)
        if rows is None:
            return None
        run.merged[index] = rows
        return (rows, *args[1:])

    def _tail(self, index: int, module: nn.Module, args: Any, output: Tensor) -> Any:
        run = self._run(index)
        if run is None or index not in run.merged:
            return None
        if recomputing() and not self.threads.now.whole:
            del run.merged[index]
        else:
            run.branch[index] = output
        return output.new_zeros(1)

    def _leave(self, index: int, ends: bool, module: nn.Module, args: Any, output: Any) -> Any:
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

    def _wide_again(self, run: Run, index: int, x: Tensor) -> Tensor:
        """What block `index` gave, at full length where the method restores it or the tower ends."""
        method, depth, state = self.method, self.tower.depth, run.states[index + 1]
        if method.restores and state.detour and index + 1 < depth and method.whole(index + 1, depth):
            x = self.widen(run, state, x)
            self.restored(run, index + 1)
        if index + 1 == len(self.tower.blocks):
            if not recomputing():
                run.trace = self.trace = self.record(run, run.states[depth])
            if self.expand:
                x = self.widen(run, run.states[index + 1], x)
        return x

    def _tap(self, index: int, module: nn.Module, args: Any) -> Any:
        run = self._run(index)
        return None if run is None else (self.widen(run, run.states[index + 1], args[0]), *args[1:])

    def _root(self, module: nn.Module, args: Any, output: Any) -> None:
        """Bring the listed hidden states to full length."""
        if not self.expand or not hasattr(output, "keys") or output.get("hidden_states") is None:
            return
        run = self.threads.now.run
        states = output["hidden_states"]
        if run is None or self._foreign or len(states) != len(self.tower.blocks) + 1:
            return
        last = len(states) - 1  # widened when it left the last block
        output["hidden_states"] = tuple(
            h if h is None or i == last else self.widen(run, run.states[i], h) for i, h in enumerate(states)
        )
