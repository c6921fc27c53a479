"""The HTML pages of profiles and of arithmetic: findings first, then times, costs, what others report, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokprune.errors import MissingExtraError
from tokprune.profiling import tables
from tokprune.profiling.doubts import doubts
from tokprune.profiling.memory import readable
from tokprune.profiling.published import CAUTION
from tokprune.types import JsonObject
from tokprune.viz.html import Page, PagePicture, Section
from tokprune.viz.plots import png

if TYPE_CHECKING:
    from tokprune.profiling.arithmetic import Arithmetic
    from tokprune.profiling.report import ProfileReport


def _bars(report: ProfileReport) -> tuple[list[PagePicture], str]:
    """Latency bars, or the sentence why there are none."""
    from tokprune.profiling.plots import latency_bars

    try:
        whole, first = latency_bars(report), latency_bars(report, decode=False)
    except MissingExtraError as error:
        return [], str(error)
    what = "Where the time of each run goes"
    return [
        PagePicture(png(whole), f"{what}, from pixels to the last token.", "Stacked bars of the stages' times per run"),
        PagePicture(
            png(first), f"{what}, up to the first token.", "Stacked bars of the stages' times to the first token"
        ),
    ], ""


def profile_page(report: ProfileReport, pictures: Sequence[PagePicture] = ()) -> Page:
    """The page of a measured profile. pictures: what each run kept, where the command drew it."""
    bars, missing = _bars(report) if report.cells else ([], "")
    findings = [
        *filter(None, [report.warning]),
        *report.findings(),
        *doubts(report),
        *(f"{name} failed: {why}" for name, why in report.failed.items()),
        *report.notes,
    ]
    setting = (
        f"{report.title}; {report.parameters / 1e6:.4g} M parameters, {readable(report.weight_bytes)} of weights. "
        "Times are medians over warm runs whose order changes, so that drift favours none."
    )
    summary = "\n".join([setting, "", *(f"- {line}" for line in findings)])
    sections = [
        Section("Findings", summary),
        Section("Time", missing, [tables.time_table(report)], bars),
        Section("Tokens, FLOPs and memory", "", [tables.cost_table(report), tables.formula_table(report)]),
    ]
    if report.published:
        sections.append(Section("What others report", CAUTION, [tables.published_table(report.published)]))
    if pictures:
        sections.append(Section("What was kept", pictures=list(pictures)))
    return Page(f"Profile of {report.model}", report.command, report.environment, sections)


def arithmetic_page(made: Arithmetic, command: str, environment: JsonObject) -> Page:
    """The page of a preset's arithmetic."""
    sections = [Section("Cost by keep ratio", made.heading, [made.plain_table()])]
    if made.published:
        sections.append(Section("What others report", CAUTION, [tables.published_table(made.published)]))
    sections.append(Section("Sources", "\n".join(f"- {line}" for line in made.sources)))
    return Page(f"Arithmetic of {made.title}", command, environment, sections)
