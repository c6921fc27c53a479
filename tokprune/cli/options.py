"""Options that several commands share, and what their texts mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokprune.errors import OptionError
from tokprune.loading import split_methods

if TYPE_CHECKING:
    from tokprune.config import PruneConfig

Model = Annotated[str, typer.Option(help="A hub id or path, or the embedded demo VLM.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:0, ...")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")]
Positions = Annotated[str, typer.Option(help="Position ids of kept tokens: auto, keep or compact.")]
Scorer = Annotated[str | None, typer.Option(help="For methods that need one: open_clip:<model>/<weights>.")]
Results = Annotated[Path, typer.Option(help="Where results go; an interrupted run goes on from there.")]
BatchSize = Annotated[int, typer.Option(help="Questions at once.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No table and no bars; files are written all the same.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write all as JSON to this file; - is standard output.")]
Picture = Annotated[Path, typer.Option(help="The picture.")]
Sheet = Annotated[Path, typer.Option("--out", "-o", help="Where the sheet goes (PNG, JPEG, ...).")]
Question = Annotated[str, typer.Option(help="The question, which some methods read.")]
Ratio = Annotated[float, typer.Option(help="Share of visual tokens that the methods keep.")]
Ratios = Annotated[str, typer.Option("--ratios", "--ratio", help="Keep ratios, separated by commas.")]

Config = Annotated[
    Path | None,
    typer.Option("--config", help="Methods and how much they keep, from a file of PruneConfig.save, not by options."),
]

QUESTION = "what is in this picture ?"


def names(text: str) -> list[str]:
    """ "a,b" as names."""
    return [part.strip() for part in text.split(",") if part.strip()]


def methods(text: str, smaller: bool = False) -> list[str]:
    """ "a,b+c" as methods, each a name or several of different stages joined by "+"; unknown names are refused.

    smaller: allow "resize", the smaller picture, too.
    """
    from tokprune.scaling import RESIZE

    return [name if smaller and name == RESIZE else "+".join(split_methods(name)) for name in names(text)]


def ratios(text: str) -> list[float]:
    """ "0.5,0.1" as keep ratios, or the error that shows the form."""
    from tokprune.budget import check_ratio

    try:
        numbers = [float(part) for part in names(text)]
    except ValueError:
        raise OptionError(
            f"--ratios {text!r} is not a list of numbers; write for example --ratios 0.5,0.25,0.1"
        ) from None
    return [check_ratio(number) for number in numbers]


def counts(text: str) -> list[int]:
    """ "2048,1024" as prompt budgets."""
    from tokprune.budget import check_budget

    try:
        return [check_budget(int(part), "prompt_budget") for part in names(text)]
    except ValueError:
        raise OptionError(f"--prompt-budget {text!r} is no whole number of tokens; write such as 2048,1024.") from None


def config_of(path: Path, **typed: object) -> PruneConfig:
    """The pruning in a --config file. typed: options that say the same, None or empty where they were not given."""
    from tokprune.config import PruneConfig

    for name, value in typed.items():
        if value not in (None, "", [], "auto"):
            raise OptionError(f"--config already says what --{name} says; leave out --{name}, or change {path}.")
    return PruneConfig.load(path)


def ratio_of(config: PruneConfig, path: Path) -> float:
    """The keep ratio of a config, for commands that compare ratios."""
    if config.ratio is None:
        amount = "no keep ratio" if config.budget is None else f"a budget of {config.budget} tokens"
        raise OptionError(f'{path} holds {amount}, and this command compares keep ratios; write "ratio": 0.1 into it.')
    return config.ratio


def at_least_one(**counts: int | None) -> None:
    """Refuse counts below 1, by the names of their options."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise OptionError(f"--{name.replace('_', '-')} {value} must be at least 1.")
