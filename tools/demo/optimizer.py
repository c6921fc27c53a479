"""Muon and AdamW over bfloat16 weights with float32 masters, gradients averaged over the workers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .workers import Worker

_MUON_MOMENTUM = 0.95
_MUON_DECAY = 0.01
_ADAM_DECAY = 0.05
_MAX_NORM = 1.0


def cosine(step: int, steps: int, warmup: int, floor: float = 0.03) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine down to `floor`."""
    decay = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    return min(1.0, (step + 1) / warmup) * (decay * (1 - floor) + floor)


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrix, for (..., rows, columns)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class MixedOptimizer:
    """Trains named parameters of any dtype through float32 masters.

    Args:
        parameters: by name; a parameter that appears twice (tied weights) is trained once.
        muon: the 2-D matrices that Muon updates, with a factor on their learning rate; AdamW takes the rest.
        worker: averages the gradients.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        muon: Mapping[str, float],
        lr: float,
        muon_lr: float,
        betas: tuple[float, float],
        worker: Worker,
    ) -> None:
        self.parameters = dict(parameters)
        self.masters = {name: p.detach().float().clone() for name, p in self.parameters.items()}
        self.muon = dict(muon)
        self.momentum = {name: torch.zeros_like(self.masters[name]) for name in muon}
        self.lr, self.muon_lr, self.worker = lr, muon_lr, worker
        rest = [master for name, master in self.masters.items() if name not in self.momentum]
        self.adam = torch.optim.AdamW(
            [
                {"params": [master for master in rest if master.ndim >= 2], "weight_decay": _ADAM_DECAY},
                {"params": [master for master in rest if master.ndim < 2], "weight_decay": 0.0},
            ],
            lr=lr,
            betas=betas,
        )

    @torch.no_grad()
    def step(self, factor: float) -> float:
        """One update with the learning rates scaled by `factor`; returns the gradient norm and clears the gradients."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters.values()]
        flat = self.worker.average(torch.cat([gradient.float().flatten() for gradient in gradients]))
        norm = float(flat.norm())
        if math.isfinite(norm):
            flat *= min(1.0, _MAX_NORM / (norm + 1e-12))
            self._update(flat, factor)
        for parameter in self.parameters.values():
            parameter.grad = None
        return norm

    def _update(self, flat: Tensor, factor: float) -> None:
        same_shape: dict[torch.Size, list[tuple[str, Tensor]]] = {}
        pieces = flat.split([master.numel() for master in self.masters.values()])
        for (name, master), piece in zip(self.masters.items(), pieces, strict=True):
            gradient = piece.view_as(master)
            if name in self.momentum:
                self.momentum[name].lerp_(gradient, 1 - _MUON_MOMENTUM)
                nesterov = gradient.lerp(self.momentum[name], _MUON_MOMENTUM)
                same_shape.setdefault(master.shape, []).append((name, nesterov))
            else:
                master.grad = gradient
        step = self.muon_lr * factor
        for shape, entries in same_shape.items():  # one batched iteration per shape
            updates = orthogonalize(torch.stack([update for _, update in entries]))
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for (name, _), update in zip(entries, updates, strict=True):
                length = step * self.muon[name]
                self.masters[name].mul_(1 - length * _MUON_DECAY).add_(update, alpha=-length * scale)
        for group in self.adam.param_groups:
            group["lr"] = self.lr * factor
        self.adam.step()
        for name, parameter in self.parameters.items():
            parameter.copy_(self.masters[name])

    def state_dict(self) -> dict[str, Any]:
        """Masters, momenta and Adam's moments: all that a restart needs."""
        return {"masters": self.masters, "momentum": self.momentum, "adam": self.adam.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; the parameters receive the masters."""
        for name, master in self.masters.items():
            master.copy_(state["masters"][name])
            self.parameters[name].copy_(master)
        for name, momentum in self.momentum.items():
            momentum.copy_(state["momentum"][name])
        self.adam.load_state_dict(state["adam"])
