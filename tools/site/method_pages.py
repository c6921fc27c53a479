"""A page per method: what it does, its picture and curve, cost, differences from the published code, citation."""

from __future__ import annotations

from typing import Any

from tokprune.cli.methods import facts, families_of
from tokprune.registry import STAGES, list_methods
from tools.site import evidence, pictures
from tools.site.bibtex import bibtex
from tools.site.curve import curve_svg

STAGE_TITLES = {
    "pixels": "Before the vision tower",
    "frames": "Which frames of a video",
    "encoder": "Inside the vision tower",
    "connector": "Between tower and LLM",
    "decoder": "Inside the LLM",
    "cache": "While decoding",
}


def index_page() -> str:
    """methods/index.md: the short table that leads to the pages."""
    lines = ["# Methods", "", "One page each. [All options in one page](../methods.md)."]
    for stage in STAGES:
        rows = [facts(name) for name in list_methods(stage)]
        if rows:
            lines += ["", f"## {STAGE_TITLES[stage]}", "", "| method | what it does | needs |", "|---|---|---|"]
            lines += [f"| [`{r['name']}`]({r['name']}.md) | {r['summary']} | {_needs(r)} |" for r in rows]
    return "\n".join(lines) + "\n"


def method_navigation() -> list[dict[str, list[dict[str, str]]]]:
    """The pages of all methods, by stage, as MkDocs writes navigation."""
    names = {title: list_methods(stage) for stage, title in STAGE_TITLES.items()}
    return [{title: [{n: f"methods/{n}.md"} for n in some]} for title, some in names.items() if some]


def _needs(r: dict[str, Any]) -> str:
    """Signals, and the question, in a cell."""
    return "; ".join(filter(None, [families_of(r["needs"]), "the question" if r["query_aware"] else ""]))


def method_page(name: str, picture: str | None, why_not: str = "") -> str:
    """The page of one method. picture: its address from the page; None: there is none, and why_not says why."""
    r = facts(name)
    year = f" ({r['year']})" if r["year"] else ""
    paper = f"[{r['paper']}]({r['url']}){year}" if r["url"] else r["paper"].capitalize() + "."
    lines = [f"# `{name}`", "", r["summary"], "", paper, ""]
    lines += [*_use(r), ""]
    lines += [f"![What {name} keeps]({picture})", "", pictures.caption(name)] if picture else [why_not]
    lines += ["", "## Accuracy", "", *_accuracy(name)]
    lines += ["", "## Cost", "", f"Choosing K of N tokens of width D: {_orders(r) or 'not stated'}.", ""]
    lines += evidence.cost_rows(name)
    lines += ["", "## How it works, options", "", r["doc"], ""]
    if r["needs"]:
        lines += ["Signals read from the vision tower: " + ", ".join(f"`{n}`" for n in r["needs"]) + ".", ""]
    if r["options"]:
        lines += ["| option | default |", "|---|---|", *(f"| `{k}` | `{v!r}` |" for k, v in r["options"].items()), ""]
    for preset, given in r["presets"].items():
        lines += [f"`preset={preset!r}`: " + ", ".join(f"`{k}={v!r}`" for k, v in given.items()) + ".", ""]
    lines += ["## Beside the published code", "", *_checked(r)]
    if entry := bibtex(r):
        lines += ["", "## Citation", "", "```bibtex", entry, "```"]
        if "author =" not in entry:
            lines += ["", "The authors stand on the paper's first page; nobody has entered them here yet."]
    return "\n".join(lines) + "\n"


def _orders(r: dict[str, Any]) -> str:
    """Orders of time and memory, as far as they are stated."""
    return "; ".join(f"{what} {r[key]}" for what, key in (("time", "complexity"), ("memory", "memory")) if r[key])


def _use(r: dict[str, Any]) -> list[str]:
    """The line that switches it on."""
    name = r["name"]
    what = f'tokprune.get_method("{name}", method="{pictures.INSIDE}")' if r["wrapper"] else f'"{name}"'
    takes = pictures.takes_ratio(name)
    if takes is None:
        return [f"It needs more than a name: see the options of `{name}` below."]
    ratio = ", ratio=0.1" if takes else ""
    question = ", processor=processor" if r["query_aware"] else ""
    return ["```python", f"tokprune.apply(model, {what}{ratio}{question})", "```"]


def _accuracy(name: str) -> list[str]:
    """The curve, or that there is none."""
    curve = evidence.curve_of(name)
    if curve is None:
        return ["Not measured alone: no recorded sweep has this method as a row of its own."]
    return [curve_svg(curve), "", curve.source, "Published numbers of papers: [reference](../reference.md)."]


def _checked(r: dict[str, Any]) -> list[str]:
    """What it was run against, what agrees and what differs."""
    c = r["checked"]
    if c is None:
        return ["No published code is behind it."]
    link = (
        f"[{c['repository']}](https://github.com/{c['repository']})" if c["repository"] else "no public code was found"
    )
    out = [f"Run against: {link}.", ""]
    out += [f"- {label}: {c[side]}" for side, label in (("agrees", "agrees"), ("differs", "differs")) if c[side]]
    return out
