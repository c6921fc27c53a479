"""`tokprune new-method` and `tokprune check-method`: from an idea to a plug-in that keeps the contract."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from tokprune.cli import options
from tokprune.cli.doctor import MARKS
from tokprune.cli.output import console_for, save_json, say_saved
from tokprune.errors import OptionError


def new_method(
    name: Annotated[str, typer.Argument(help="What users will write: method=NAME.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The folder; tokprune-NAME by default.")] = None,
) -> None:
    """Write a plug-in package for a method of your own: entry point, method, golden tests that pass at once."""
    from tokprune.testing.plugin import write_plugin

    console = Console()
    written = write_plugin(name, out)
    say_saved(console, written)
    folder = written[0].parent
    console.print(escape(f"next: cd {folder} && pip install -e . && python -m pytest"), soft_wrap=True)
    console.print(escape(f"then: tokprune check-method {name}, before and after you make it your own"), soft_wrap=True)


def check_method(
    name: Annotated[str, typer.Argument(help="A registered method.")],
    file: Annotated[
        Path | None, typer.Option(help="A Python file that registers it, where it is not installed yet.")
    ] = None,
    option: Annotated[list[str] | None, typer.Option(help="A field of the method: --option mix=0.3.")] = None,
    families: Annotated[
        str | None, typer.Option(help="Tiny models to run it in; llava,llava_next,qwen2_5_vl,qwen3_vl,internvl; none.")
    ] = None,
    json_file: options.Json = None,
) -> None:
    """Try the contract of all methods and the exactness of pruned models on one; exit code 1 where something fails."""
    from tokprune.cli.run import build_methods
    from tokprune.testing.contract import check_method as contract
    from tokprune.testing.plugin import MODELS, check_on_models

    if file is not None:
        import_file(file)
    (method,) = build_methods(name, option or (), None)
    console = console_for(json=json_file)
    data, failed = {"type": "tokprune.check_method", "version": 1, "method": name, "checks": {}}, 0
    wanted = MODELS if families is None else () if families == "none" else options.names(families)
    for where, checks in [("contract", contract(method)), *check_on_models(method, wanted)]:
        console.print(f"[bold]{escape(where)}[/]")
        for check in checks:
            detail = f": {check.detail}" if check.detail else ""
            console.print(f"  {MARKS[check.ok]} {escape(check.name + detail)}", soft_wrap=True)
        failed += sum(check.ok is False for check in checks)
        data["checks"][where] = [vars(check) for check in checks]  # type: ignore[index]
    console.print(f"{failed} failed" if failed else "nothing failed")
    save_json(console, json_file, data)
    if failed:
        raise typer.Exit(1)


def import_file(file: Path) -> None:
    """Run a Python file, so that it registers its methods."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise OptionError(f"--file {file} is no Python file; give the one with @register_method.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # somebody else's program
        raise OptionError(f"{file} cannot be run: {type(error).__name__}: {error}") from error
