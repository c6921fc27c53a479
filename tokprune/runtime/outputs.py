"""What a pruned forward gives back, at the width of the prompt as it was written.

One rule for forward() and generate(): whatever has one row per prompt token (logits, hidden states) has the prompt's
width, and a dropped token answers with the nearest kept one before it. Attentions are what was computed: queries and
keys that were kept, `pruning.last.columns(layer)` says which.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

from tokprune.adapters.base import Adapter
from tokprune.adapters.types import Model, ModelCall, ModelOutput, Positional, Replaced
from tokprune.errors import UnsupportedModelError
from tokprune.ops.topk import rows_at


def widen(hidden: Tensor, expand: Tensor) -> Tensor:
    """Hidden states (B, P, D) of kept tokens as (B, L, D). expand: (B, L) slot that answers for each column."""
    return rows_at(hidden, expand.to(hidden.device))


class WidePath:
    """Puts the widened hidden states of one forward on the way of its gradients, as those of an unpruned model are.

    Every decoder layer's result is widened and the kept part of that handed on, which changes no number; what the
    forward returns is then what its later layers were computed from, so that retain_grad() and autograd.grad find it.
    The decoder stage sets `expand` and `index` anew where it drops tokens.
    """

    def __init__(self, layers: nn.ModuleList, expand: Tensor, index: Tensor) -> None:
        self.expand, self.index = expand, index
        self.thread = threading.get_ident()
        self.wide: dict[int, tuple[Tensor, Tensor]] = {}  # by id: a state as it was captured (held), and widened
        self.hooks = [layers[0].register_forward_pre_hook(self._enter, with_kwargs=True)]
        self.hooks += [layer.register_forward_hook(self._leave) for layer in layers]

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self.hooks:
            hook.remove()

    def of(self, state: Tensor) -> Tensor:
        """The widened form of a captured state."""
        known = self.wide.get(id(state))
        return widen(state, self.expand) if known is None else known[1]

    def _pass(self, state: Tensor) -> Tensor:
        wide = widen(state, self.expand)
        index = self.index.to(state.device)[..., None].expand_as(state)
        narrow = torch.where(index < 0, state, wide.gather(1, index.clamp(min=0)))
        for captured in (state, narrow):  # transformers' own hook may stand before or behind this one
            self.wide[id(captured)] = (captured, wide)
        return narrow

    def _enter(self, module: nn.Module, args: Positional, kwargs: ModelCall) -> Replaced:
        if threading.get_ident() != self.thread:
            return None
        if args:
            return (self._pass(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._pass(kwargs["hidden_states"])}

    def _leave(self, module: nn.Module, args: Positional, output: ModelOutput) -> ModelOutput:
        if threading.get_ident() != self.thread:
            return None
        return (self._pass(output[0]), *output[1:]) if isinstance(output, tuple) else self._pass(output)


def wide_path(text_model: Model, call: ModelCall, expand: Tensor, index: Tensor) -> WidePath | None:
    """The path for a forward whose caller may ask gradients of hidden states; None where nobody can."""
    config, layers = text_model.config, getattr(text_model, "layers", None)
    wanted = call.get("output_hidden_states")
    wanted = getattr(config, "output_hidden_states", False) if wanted is None else wanted
    again = text_model.training and getattr(text_model, "is_gradient_checkpointing", False)  # layers run twice
    if wanted is False or wanted is None or not torch.is_grad_enabled() or again or not layers:
        return None
    return WidePath(layers, expand, index)


def check_head(adapter: Adapter, call: ModelCall, generating: bool) -> None:
    """Refuse what a model whose head is inside its base cannot widen: a loss, or logits of some columns, are made
    before the way out."""
    asked = [n for n in ("labels", "logits_to_keep") if isinstance(call.get(n), Tensor) or call.get(n)]
    if adapter.base is adapter.model and asked and not generating:
        raise UnsupportedModelError(
            f"{type(adapter.model).__name__} computes logits inside, at the kept tokens; it cannot be pruned in a "
            f"forward with {' and '.join(asked)}. Leave them out and compute from its logits, which "
            "have the prompt's width."
        )


def widen_output(output: ModelOutput, expand: Tensor, last: bool, path: WidePath | None = None) -> None:
    """Widen the hidden states of a base model's output in place. last: the last one, too, which generate() does not
    need.

    path: has those widened already that gradients go through.
    """
    wider = path.of if path is not None else lambda state: widen(state, expand)
    states = output.get("hidden_states")
    tied = None
    if last and "last_hidden_state" not in output:  # the model's head is inside
        if output.logits.shape[1] == int(expand.max()) + 1:
            output.logits = widen(output.logits, expand)
    elif last:
        tied, output.last_hidden_state = output.last_hidden_state, widen(output.last_hidden_state, expand)
    if states is not None:
        output.hidden_states = tuple(
            None if h is None else output.last_hidden_state if h is tied else wider(h) for h in states
        )
