"""Timed runs that can be believed: warm-up, interleaved repeats, device synchronised, medians with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tokprune.errors import OptionError
from tokprune.profiling.stages import STAGES, StageModules, watch
from tokprune.types import Fields, JsonObject

Moment = torch.cuda.Event | float  # on the device's own clock, or seconds of the host's


@dataclass(frozen=True)
class Measurement:
    """One quantity, measured several times. The median is the value; `spread` is half the interquartile range."""

    name: str
    unit: str
    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle sample."""
        return float(statistics.median(self.samples))

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles; 0 for a single sample."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / 2

    def __str__(self) -> str:
        return f"{self.median:.4g} ± {self.spread:.2g} {self.unit}".rstrip()

    def to_dict(self) -> JsonObject:
        """Plain data: unit, median, spread and the raw samples."""
        return {"unit": self.unit, "median": self.median, "spread": self.spread, "samples": list(self.samples)}

    @staticmethod
    def from_dict(name: str, data: Fields) -> Measurement:
        """The measurement that `to_dict` wrote."""
        return Measurement(name, str(data["unit"]), tuple(float(x) for x in data["samples"]))


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has done all it was given."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()
    elif kind == "xpu":
        torch.xpu.synchronize()


class Marks:
    """Points in time on a device: CUDA events (no synchronisation between them), or the host clock elsewhere."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.events = self.device.type == "cuda"

    def now(self) -> Moment:
        """This moment."""
        if self.events:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            return event
        if self.device.type != "cpu":
            synchronize(self.device)
        return time.perf_counter()

    def milliseconds(self, start: Moment, end: Moment) -> float:
        """Only after synchronize()."""
        return (
            1000.0 * (end - start)
            if isinstance(start, float) and isinstance(end, float)
            else float(start.elapsed_time(end))  # type: ignore[union-attr, arg-type]
        )


class StageClock:
    """Times the stages of one `generate` call; see `STAGES` for what each contains. All times in ms.

    Time between the modules is booked where it belongs: before the first of them to `other`, between projector and LLM
    to `select`, after the first token to `decode` (so that decode counts what a user waits for per token).
    """

    def __init__(self, device: torch.device | str) -> None:
        self.marks = Marks(device)
        self.steps = 0
        self._points: list[tuple[Moment, str]] = []  # (moment, part that begins there)
        self._open: list[str] = []
        self._seen_vision = False
        self._first_token: Moment | None = None
        self._has_head = True
        self._wall = (0.0, 0.0)

    def _outside(self) -> str:
        if self._first_token is not None:
            return "decode"
        if self.steps:
            return "prefill"  # between the LLM and its head
        return "select" if self._seen_vision else "other"

    def _begin(self, part: str) -> Moment:
        moment = self.marks.now()
        self._points.append((moment, part))
        return moment

    def _enter(self, part: str) -> None:
        if part == "language":
            self.steps += 1
        self._seen_vision |= part in ("vision", "projector")
        llm = part in ("language", "head")
        name = ("prefill" if self._first_token is None else "decode") if llm else part
        self._open.append(name)
        self._begin(name)

    def _leave(self, part: str) -> None:
        self._open.pop()
        if part == ("head" if self._has_head else "language") and self._first_token is None:
            self._first_token = self._begin("decode")
        else:
            self._begin(self._open[-1] if self._open else self._outside())

    @contextmanager
    def watch(self, stages: StageModules) -> Iterator[StageClock]:
        """Time the one call made inside."""
        self._has_head = stages.head is not None
        synchronize(self.marks.device)
        start = time.perf_counter()
        self._begin("other")
        with watch(stages, self._enter, self._leave):
            yield self
        self._begin("end")
        synchronize(self.marks.device)
        self._wall = (start, time.perf_counter())

    def times(self) -> dict[str, float]:
        """ms per stage, plus `ttft` (first token), `total` (wall clock) and `decode_tokens_per_s` (0 without steps)."""
        out = dict.fromkeys(STAGES, 0.0)
        for (start, part), (end, _) in zip(self._points, self._points[1:], strict=False):
            out[part] += self.marks.milliseconds(start, end)
        out["ttft"] = (
            0.0 if self._first_token is None else self.marks.milliseconds(self._points[0][0], self._first_token)
        )
        out["total"] = 1000.0 * (self._wall[1] - self._wall[0])
        decoded = max(self.steps - 1, 0)
        out["decode_tokens_per_s"] = 1000.0 * decoded / out["decode"] if decoded and out["decode"] > 0 else 0.0
        return out


UNITS = {**dict.fromkeys((*STAGES, "ttft", "total"), "ms"), "decode_tokens_per_s": "tokens/s"}


def rounds(names: Sequence[str], repeats: int) -> list[list[str]]:
    """Order of the cells in each round: every order is followed by its reverse, then rotated by one, so that drift and
    neighbours favour nobody."""
    out = []
    for i in range(repeats):
        turn = i // 2 % max(len(names), 1)
        order = [*names[turn:], *names[:turn]]
        out.append(order[::-1] if i % 2 else order)
    return out


def interleave(
    cells: Mapping[str, Callable[[], Mapping[str, float]]],
    repeats: int = 5,
    warmup: int = 2,
    units: Mapping[str, str] = UNITS,
    on_error: Callable[[str, BaseException], bool] | None = None,
) -> dict[str, dict[str, Measurement]]:
    """Run every cell `warmup` times unrecorded and `repeats` times recorded, cell by cell in changing order.

    cells: name -> a call that runs once and returns its numbers. on_error(name, error) may return True to drop the
    failing cell and go on with the others; without it, errors pass through.
    """
    if repeats < 1 or warmup < 0:
        raise OptionError(
            f"repeats={repeats}, warmup={warmup}; repeats is at least 1 (5 for numbers to show), warmup at least 0."
        )
    alive = dict(cells)
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in cells}
    plan = rounds(list(cells), warmup + repeats)
    for i, order in enumerate(plan):
        for name in order:
            if name not in alive:
                continue
            try:
                numbers = alive[name]()
            except Exception as error:
                if on_error is None or not on_error(name, error):
                    raise
                del alive[name]
                continue
            if i >= warmup:
                for key, value in numbers.items():
                    samples[name].setdefault(key, []).append(float(value))
    return {
        name: {key: Measurement(key, units.get(key, ""), tuple(values)) for key, values in samples[name].items()}
        for name in cells
        if name in alive
    }
