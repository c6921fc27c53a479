"""Small index tensors between host and device: many in one transfer, since each one that the host waits for stops it.

A prefill is planned on the host. The device is asked twice: what the prompt looks like, and what the method chose.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor


def to_host(*tensors: Tensor) -> list[Tensor]:
    """Copies on the CPU of bool and integer tensors, one wait for all of a device; what is there already stays."""
    out = list(tensors)
    by_device: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if tensor.device.type != "cpu":
            by_device.setdefault(tensor.device, []).append(i)
    for members in by_device.values():
        packed = tensors[members[0]].reshape(-1) if len(members) == 1 else _packed([tensors[i] for i in members])
        for i, part in zip(members, _unpacked(packed.cpu(), [tensors[i] for i in members]), strict=True):
            out[i] = part
    return out


def to_device(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """Copies on `device` of bool and integer tensors of the CPU, in one transfer that nobody waits for; what is there
    already stays."""
    if all(tensor.device == device for tensor in tensors):
        return list(tensors)
    packed = _packed(tensors)
    packed = packed.pin_memory() if device.type == "cuda" else packed
    return _unpacked(packed.to(device, non_blocking=True), tensors)


def _packed(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])  # the widest dtype of them


def _unpacked(packed: Tensor, like: list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    ends = [0, *accumulate(tensor.numel() for tensor in like)]
    parts = [packed[a:b] for a, b in pairwise(ends)]
    return [part.to(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
