"""Pages that are cut out of the README, the command line and the package: each fact stands in one place."""

from __future__ import annotations

import re
from pathlib import Path

import tokprune

ROOT = Path(__file__).parents[2]

API = {
    "tokprune": [f"tokprune.{name}" for name in tokprune.__all__ if name != "__version__"],
    "Errors": ["tokprune.errors"],
    "Budgets and schedules": ["tokprune.budget", "tokprune.schedule"],
    "Writing methods": [
        "tokprune.methods.base",
        "tokprune.methods.options",
        "tokprune.methods.frames_base",
        "tokprune.tokens",
    ],
    "Prompts": ["tokprune.adapters.prompting"],
    "Video": ["tokprune.video", "tokprune.video.select", "tokprune.video.sampling"],
    "Reports": ["tokprune.report", "tokprune.runtime.handle", "tokprune.runtime.records"],
    "Pictures": [
        "tokprune.viz.kept",
        "tokprune.viz.strip",
        "tokprune.viz.heatmap",
        "tokprune.viz.merge_map",
        "tokprune.viz.plots",
        "tokprune.viz.html",
    ],
    "Profiling": ["tokprune.profiling.profile", "tokprune.profiling.plan", "tokprune.profiling.presets"],
    "Evaluation": [
        "tokprune.evaluation.cells",
        "tokprune.evaluation.sweep",
        "tokprune.evaluation.harness",
        "tokprune.evaluation.store",
        "tokprune.evaluation.table",
        "tokprune.evaluation.compare",
    ],
    "Search and serving": ["tokprune.search.strategies", "tokprune.search.run", "tokprune.serving"],
    "Demo models": ["tokprune.demo", "tokprune.demo.asking"],
    "Testing": ["tokprune.testing", "tokprune.testing.self_test", "tokprune.testing.contract"],
}
"""Modules whose names are for users (of the first page: the names themselves), by page."""


def api_pages() -> dict[str, str]:
    """Pages that mkdocstrings fills, and their table of contents."""
    pages = {}
    lines = ["# Python API", "", "Made from the docstrings.", ""]
    for title, modules in API.items():
        name = re.sub(r"\W+", "_", title.lower())
        pages[f"api/{name}.md"] = f"# {title}\n\n" + "\n".join(f"::: {module}\n" for module in modules)
        lines.append(f"- [{title}]({name}.md): " + ", ".join(f"`{module}`" for module in modules))
    return {"api/index.md": "\n".join(lines) + "\n", **pages}


def readme_section(title: str) -> str:
    """What stands under `## title` in the README, its links as from docs/."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise SystemExit(f"README.md has no section {title!r}; the site shows it")
    return re.sub(r"\]\((?!https?:|#)", "](../", found.group(1)).strip()


def limits_page() -> str:
    """What it does not do, and where it does not help."""
    return (
        "# Limits\n\n## When it does not help\n\n"
        f"{readme_section('When it does not help')}\n\n## Not there yet\n\n{readme_section('Not there yet')}\n"
    )


def models_page() -> str:
    """The support matrix."""
    return f"# Models\n\n{readme_section('Models')}\n"


def cli_page() -> str:
    """Every command with its options, from the command line's own declarations."""
    from typer.main import get_command

    from tokprune.cli.app import app

    lines = ["# Command line", "", "Made from the commands themselves; `tokprune COMMAND --help` shows the same.", ""]
    commands = getattr(get_command(app), "commands")  # noqa: B009  a group, which typer's types do not say
    for name, command in commands.items():
        lines += [f"## `tokprune {name}`", "", (command.help or "").split("\f")[0].strip(), ""]
        lines += ["| | | default |", "|---|---|---|"]
        for p in command.params:
            spelled = ", ".join(f"`{o}`" for o in [*p.opts, *p.secondary_opts]) if p.opts else ""
            spelled = spelled if p.param_type_name == "option" else f"`{(p.name or '').upper()}`"
            shown = p.default if not callable(p.default) and p.default not in (None, (), ...) else ""
            text = (getattr(p, "help", None) or "").replace("|", r"\|").replace("\n", " ")
            lines.append(f"| {spelled} | {text} | {f'`{shown}`' if shown != '' else ''} |")
        lines.append("")
    return "\n".join(lines)
