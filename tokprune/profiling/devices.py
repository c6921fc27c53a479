"""What a device can do: data sheets of common GPUs, and the numbers that a measured profile shows instead."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tokprune.errors import OptionError, unknown
from tokprune.profiling.report import ProfileReport


@dataclass(frozen=True)
class Device:
    """Peak dense FLOP/s in 16 bit, bandwidth in bytes/s, memory in bytes, shares of the peaks that real runs attain."""

    name: str
    flops: float
    bandwidth: float
    memory: float = math.inf
    flops_share: float = 0.5
    bandwidth_share: float = 0.7
    overhead: float = 0.0  # seconds per step that no arithmetic explains (launches, Python)

    def seconds(self, flops: float, moved: float) -> float:
        """Roofline time of work that computes `flops` and moves `moved` bytes."""
        return (
            max(flops / (self.flops * self.flops_share), moved / (self.bandwidth * self.bandwidth_share))
            + self.overhead
        )


#: Vendors' data sheets: dense 16-bit FLOP/s without sparsity, bytes/s, bytes.
DEVICES: dict[str, Device] = {
    d.name: d
    for d in (
        Device("h200", 989e12, 4.8e12, 141e9),
        Device("h100", 989e12, 3.35e12, 80e9),
        Device("a100", 312e12, 2.039e12, 80e9),
        Device("a6000", 155e12, 768e9, 48e9),
        Device("rtx4090", 165e12, 1.008e12, 24e9),
        Device("l40s", 362e12, 864e9, 48e9),
        Device("l4", 121e12, 300e9, 24e9),
        Device("t4", 65e12, 320e9, 16e9),
    )
}


def device(name: str) -> Device:
    """The device called `name`, or the error with the nearest name; build a Device yourself for any other."""
    sheet = DEVICES.get(name.lower())
    if sheet is None:
        raise unknown("device", name, DEVICES)
    return sheet


def calibrate(report: ProfileReport) -> Device:
    """The device as a measured profile shows it: what prefill and decoding of the plain run attained, shares 1."""
    cell = report.plain
    if not cell.flops or cell.cache_bytes is None:
        raise OptionError("this profile has no FLOPs or cache bytes of the plain run; profile with count_flops=True.")
    steps = cell.times["decode_tokens_per_s"].median / report.batch
    name = str(report.environment.get("device_name") or report.environment.get("device"))
    attained = int(cell.flops["prefill"]) / (cell.times["prefill"].median / 1000)
    moved = (report.weight_bytes - report.vision_bytes + cell.cache_bytes) * steps
    return Device(f"{name} (measured)", attained, moved, math.inf, 1.0, 1.0)
