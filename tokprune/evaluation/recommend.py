"""Which method, which ratio? Tries a short list on one's own questions, names the fastest setting within a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from tokprune.config import PruneConfig
from tokprune.errors import OptionError
from tokprune.evaluation.cells import BASELINE, Cell, CellResult, SweepSettings, build_methods
from tokprune.evaluation.own_pictures import KL
from tokprune.evaluation.significance import compare, paired_shares
from tokprune.evaluation.sweep import Sweep
from tokprune.evaluation.table import KEPT, TOTAL, TTFT, is_percent, scores_of
from tokprune.types import JsonObject

METHODS = ("divprune", "hired", "visionzip", "uniform")
RATIOS = (0.5, 0.25, 0.1)
LEVEL = 0.95
TYPE, VERSION = "tokprune.recommend", 1
TIE = 0.05
MOST_QUESTIONS = 100_000

RunCells = Callable[[Sequence[Cell]], Sweep]


@dataclass(frozen=True)
class Tried:
    """One setting that was run.

    loss: what is lost against the unpruned model, as a share (of the questions, or of the unpruned score where
    questions do not score between 0 and 1). low, high: its interval, at LEVEL for all settings at once. worse, better:
    questions that lost and gained. ttft_ms: to the first token, the middle or mean question. kl: of the first token's
    distribution, where it was read.
    """

    method: str
    ratio: float
    loss: float
    low: float
    high: float
    questions: int
    worse: int
    better: int
    ttft_ms: float | None
    kept: float | None = None
    total: float | None = None
    kl: float | None = None

    def within(self, limit: float) -> bool:
        """Whether the loss that was seen is within the limit."""
        return self.loss <= limit + 1e-12

    def proven(self, limit: float) -> bool:
        """Whether the whole interval is."""
        return self.high <= limit + 1e-12

    def questions_needed(self, limit: float, level: float) -> int | None:
        """How many questions like these would prove the limit, None where more of them would not."""
        n = self.questions
        if self.loss >= limit:
            return None
        while n < MOST_QUESTIONS:
            n = int(1.1 * n) + 1
            share = n / self.questions
            if paired_shares(round(self.worse * share), round(self.better * share), n, level)[1] <= limit:
                return n
        return None


@dataclass(frozen=True)
class Advice:
    """What came of the search. best: the setting to use, None where none meets the limits. proven: its whole interval
    is within the loss. tried: all settings; skipped: those that were not run, and failed: those that could not, with
    the reason each."""

    max_loss: float
    latency_ms: float | None
    base_ttft_ms: float | None
    base_score: float
    metric: str
    tried: tuple[Tried, ...]
    skipped: dict[str, str]
    failed: dict[str, str]
    best: Tried | None = None
    proven: bool = False

    def to_dict(self) -> JsonObject:
        """Plain data with type and version."""
        return {"type": TYPE, "version": VERSION, "level": LEVEL, **asdict(self)}


def search(
    run: RunCells, task: str, methods: Sequence[str], ratios: Sequence[float], max_loss: float
) -> tuple[Sweep, dict[str, str]]:
    """Run the baseline, then each method from its largest ratio down until it is surely past the loss.

    run: runs cells and returns all results so far of these (`sweep.run_sweep`). Returns the sweep and why which
    settings were skipped.
    """
    sweep = run([Cell(task, BASELINE, 1.0)])
    if not sweep.results:
        reason = sweep.failures[0].reason if sweep.failures else "no result"
        raise OptionError(f"the unpruned model could not be run on {task}: {reason}")
    base, skipped, open_methods = sweep.results[0], dict[str, str](), list(methods)
    for ratio in sorted(ratios, reverse=True):
        part = run([Cell(task, method, ratio) for method in open_methods])
        sweep.results += part.results
        sweep.failures += part.failures
        lost = {f.cell.method: f"failed at {ratio:g}" for f in part.failures}
        for result in part.results:
            found = tried(base, result, LEVEL)
            if found.low > max_loss:
                why = f"at {ratio:g} it already loses {percent(found.loss)}, surely more than the limit"
                lost[result.cell.method] = why
        for method, why in lost.items():
            open_methods.remove(method)
            skipped |= {f"{method} {r:g}": why for r in ratios if r < ratio}
        if not open_methods:
            break
    return sweep, skipped


def tried(base: CellResult, result: CellResult, level: float) -> Tried:
    """A cell beside the baseline. level: of its interval alone."""
    a, b = scores_of(base, base.main), scores_of(result, base.main)
    paired = compare(a, b, level=level)  # type: ignore[arg-type]  # a key of two is hashable
    sign = 1.0 if base.higher_is_better else -1.0
    share = is_percent(a.values(), base.metrics[base.main])
    by = sign if share or not paired.base else sign / abs(paired.base)
    low, high = sorted((-by * paired.low, -by * paired.high))
    worse, better = (paired.worse, paired.better) if sign > 0 else (paired.better, paired.worse)
    if paired.test == "mcnemar":
        low, high = paired_shares(worse, better, paired.n, level)
    elif share:  # a bootstrap of questions that all scored alike has no width
        high = max(high, paired_shares(0, 0, paired.n, level)[1])
    kl = [s.scores[KL] for s in result.samples if KL in s.scores]
    cell, costs = result.cell, (result.timing.get(TTFT), result.costs.get(KEPT), result.costs.get(TOTAL))
    loss, mean_kl = -by * paired.difference, sum(kl) / len(kl) if kl else None
    return Tried(cell.method, cell.ratio, loss, low, high, paired.n, worse, better, *costs, mean_kl)


def advise(sweep: Sweep, skipped: dict[str, str], max_loss: float, latency_ms: float | None = None) -> Advice:
    """The fastest setting whose loss is within `max_loss`: one whose interval is, if there is any, else one whose mean
    is. With `latency_ms`, the one that loses least of those that answer in time."""
    base = next(r for r in sweep.results if r.cell.baseline)
    others = [r for r in sweep.results if not r.cell.baseline]
    level = simultaneous(len(others))
    rows = tuple(tried(base, r, level) for r in others)
    failed = {str(f.cell): f.reason for f in sweep.failures}
    score, ttft_ms = base.metrics[base.main], base.timing.get(TTFT)
    made = Advice(max_loss, latency_ms, ttft_ms, score, base.main, rows, skipped, failed)
    in_time = [t for t in rows if latency_ms is None or (t.ttft_ms is not None and t.ttft_ms <= latency_ms)]
    for proven in (True, False):
        good = [t for t in in_time if (t.proven(max_loss) if proven else t.within(max_loss))]
        if good:
            if latency_ms is None:  # times that differ by no more than TIE are alike
                least = min(t.ttft_ms or 0.0 for t in good)
                good = [t for t in good if (t.ttft_ms or 0.0) <= (1 + TIE) * least]
            return replace(made, best=min(good, key=lambda t: (t.loss, t.ratio)), proven=proven)
    return made


def simultaneous(settings: int) -> float:
    """The level of each interval at which all of them hold at once with LEVEL (Bonferroni)."""
    return 1 - (1 - LEVEL) / max(settings, 1)


def config_for(best: Tried, settings: SweepSettings) -> PruneConfig:
    """The setting as a config."""
    return PruneConfig(build_methods(best.method, settings), ratio=best.ratio, positions=settings.positions)


def lines(advice: Advice) -> list[str]:
    """The advice in sentences."""
    limit, best = percent(advice.max_loss), advice.best
    if best is None:
        near = min(advice.tried, key=lambda t: t.loss, default=None)
        late = "" if advice.latency_ms is None else f" and answers its first token within {advice.latency_ms:g} ms"
        out = [f"no setting loses at most {limit}{late}"]
        if near is not None:
            out.append(f"least is lost by {near.method} at {near.ratio:g}: {interval(near)}")
        return [*out, "try larger ratios (--ratios 0.9,0.75), other methods (--methods), or a larger --max-loss"]
    faster = ""
    if best.ttft_ms and advice.base_ttft_ms:
        faster = f"first token after {best.ttft_ms:.3g} ms in place of {advice.base_ttft_ms:.3g} ms, "
    out = [f"use {best.method} at ratio {best.ratio:g}: {faster}loss {interval(best)}"]
    if not advice.proven:
        need = best.questions_needed(advice.max_loss, simultaneous(len(advice.tried)))
        more = f"about {need} questions like these would" if need else "more questions like these may not"
        out.append(
            f"its mean loss is within {limit}, but {best.questions} questions cannot prove it: the interval reaches "
            f"{percent(best.high)}; {more} prove it"
        )
    return out


def interval(row: Tried) -> str:
    """ "0.5 % [-0.2, 1.8]"."""
    return f"{100 * row.loss:.1f} % [{100 * row.low:.1f}, {100 * row.high:.1f}]"


def percent(share: float) -> str:
    """ "1 %"."""
    return f"{100 * share:.3g} %"
