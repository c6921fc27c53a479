"""What papers and projects report of pruning a known model, beside our number for the same case.

Their methods, hardware, batch sizes, prompts and ways of counting differ from each other and from ours; a row shows
whether the sizes agree, not who is right. The rows lie in the presets' files with their sources.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokprune.errors import OptionError, unknown
from tokprune.profiling import formulas
from tokprune.profiling.formulas import DecoderShape
from tokprune.types import Fields, JsonObject

if TYPE_CHECKING:
    from tokprune.profiling.report import ProfileReport

#: What a row's numbers are, and which part of our own count or clock stands beside them.
KINDS: dict[str, str] = {
    "flops": "FLOPs of the LLM",
    "prefill": "prefill time",
    "ttft": "time to first token",
    "total": "time per answer",
    "memory": "peak memory",
}
_FORMULAS: dict[str, Callable[..., int]] = {"fastv": formulas.formula_fastv, "gated": formulas.formula_gated}
CAUTION = (
    "Published numbers come from other code, hardware, prompts and batch sizes, some count multiply-adds once and "
    "visual tokens alone; ours beside them is arithmetic for the same number of tokens, or a measurement "
    "where it says so. They show whether the sizes agree, no more."
)


@dataclass(frozen=True)
class PublishedReduction:
    """One reported reduction. kind: a key of KINDS. full, pruned: the numbers before and after, in `unit`, or None
    where only their share was given. tokens: visual tokens kept of `tokens_full`; None where not said. text: text
    tokens that the number includes. formula, layer: how FLOPs were counted, and the layer from which tokens are dropped
    (FastV's K).
    """

    method: str
    kind: str
    source: str
    share: float
    full: float | None = None
    pruned: float | None = None
    unit: str = ""
    tokens: float | None = None
    tokens_full: int | None = None
    text: int = 0
    formula: str | None = None
    layer: int = 0
    setting: str = ""

    @staticmethod
    def from_dict(data: Fields) -> PublishedReduction:
        """The row that a preset's file holds; `share` follows from full and pruned where it is not given."""
        row = dict(data)
        if row.get("kind") not in KINDS:
            raise unknown("kind of published number", row.get("kind"), KINDS)
        if "share" not in row:
            if not row.get("full") or row.get("pruned") is None:
                raise OptionError(f"a published number needs share, or full and pruned; this one has {sorted(row)}.")
            row["share"] = row["pruned"] / row["full"]
        return PublishedReduction(**row)

    @property
    def kept(self) -> str:
        """What was kept, in words."""
        if self.tokens is None:
            return "not said"
        if self.tokens_full is None:
            return f"{self.tokens:g}"
        return f"{self.tokens:g} of {self.tokens_full} ({100 * self.tokens / self.tokens_full:.3g} %)"

    @property
    def change(self) -> str:
        """Before and after as printed, or only the share."""
        if self.full is None or self.pruned is None:
            return f"{100 * self.share:.3g} %"
        return f"{self.full:g} to {self.pruned:g} {self.unit} ({100 * self.share:.3g} %)"

    def per_layer(self, shape: DecoderShape, tokens: float) -> list[int]:
        """Tokens in each layer of the case with `tokens` visual ones, the text included."""
        whole = int(self.tokens_full or tokens)
        return [self.text + (whole if i < self.layer else round(tokens)) for i in range(shape.layers)]

    def ours(self, shape: DecoderShape, vision: int = 0, text: int = 64) -> tuple[float, str] | None:
        """Our share for the same tokens and what it is; None where the row does not say them or it is no arithmetic.

        vision: FLOPs of tower and projector, which TTFT includes. text: text tokens for rows that name none.
        """
        if self.tokens is None or self.tokens_full is None or self.kind in ("memory", "total"):
            return None
        kept, full = (self.per_layer(shape, n) for n in (self.tokens, float(self.tokens_full)))
        if self.kind == "flops" and self.formula is not None:
            layer = _FORMULAS[self.formula]
            a, b = (formulas.formula_total(layer, n, shape) for n in (kept, full))
            return a / b, f"the same formula: {b / 1e12:.3g} to {a / 1e12:.3g} T multiply-adds"
        more = 0 if self.text else text
        a, b = (formulas.exact_prefill(shape, [n + more for n in tokens]) for tokens in (kept, full))
        if self.kind == "ttft":
            return (vision + a) / (vision + b), f"FLOPs to the first token, {self.text + more} text tokens"
        return a / b, f"exact FLOPs of the prefill, {self.text + more} text tokens"


Measured = Callable[[PublishedReduction], "tuple[float, str] | None"]


def comparison(
    rows: tuple[PublishedReduction, ...], shape: DecoderShape, vision: int = 0, measured: Measured | None = None
) -> list[JsonObject]:
    """The rows with ours beside them, as plain data: "ours" is a share or None, "ours_is" says what it is.

    measured: row -> our measured share and what it is, before arithmetic is asked (`measured_in` makes one of a
    profile).
    """
    out = []
    for row in rows:
        ours = (measured(row) if measured is not None else None) or row.ours(shape, vision)
        beside = {"ours": None, "ours_is": ""} if ours is None else {"ours": ours[0], "ours_is": ours[1]}
        out.append(vars(row) | {"kept": row.kept, "change": row.change} | beside)
    return out


def measured_in(report: ProfileReport) -> Measured:
    """Our measured share for rows of which a profile has a cell of nearly the same keep ratio, same method first."""

    def find(row: PublishedReduction) -> tuple[float, str] | None:
        plain = report.find("plain")
        if plain is None or row.tokens is None or row.tokens_full is None or row.kind == "flops":
            return None
        share = row.tokens / row.tokens_full
        near = [c for c in report.cells if c.kind == "pruned" and abs(c.visual / c.visual_full - share) <= 0.02]
        if not near:
            return None
        cell = min(near, key=lambda c: (c.method != row.method, abs(c.visual / c.visual_full - share)))
        if row.kind == "memory":
            if not cell.peak_bytes or not plain.peak_bytes:
                return None
            return cell.peak_bytes / plain.peak_bytes, f"measured here, {cell.name}"
        ours, base = cell.times[row.kind].median, plain.times[row.kind].median
        return (ours / base, f"measured here, {cell.name}") if base else None

    return find


def lines(compared: list[JsonObject]) -> list[str]:
    """The comparison in sentences."""
    out = []
    for row in compared:
        ours = "" if row["ours"] is None else f"; ours {100 * row['ours']:.3g} % ({row['ours_is']})"
        setting = f", {row['setting']}" if row["setting"] else ""
        kept = "" if row["tokens"] is None else f", {row['kept']} tokens"
        out.append(f"{row['method']}{kept}: {KINDS[row['kind']]} {row['change']}{setting} [{row['source']}]{ours}")
    return out
