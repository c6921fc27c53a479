"""What tokprune raises. Every message says what was given, what is allowed, and what to type instead."""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import shlex
import traceback
from collections.abc import Iterable
from pathlib import Path


class TokpruneError(Exception):
    """Base of every error raised on purpose by tokprune."""


class OptionError(TokpruneError, ValueError):
    """A value, name or option that cannot be used; the message names the allowed ones."""


class BudgetError(OptionError):
    """A `ratio` or `budget` that is not a usable share or count of visual tokens."""


class PromptError(TokpruneError, ValueError):
    """A prompt whose placeholders and pictures do not belong together; transformers raises ValueError there, too."""


class UnsupportedModelError(TokpruneError, TypeError):
    """A model, or a feature of it, that tokprune cannot prune; the message says why."""


class TranslationError(TokpruneError, RuntimeError):
    """A call would have reached the language model in lengths that are not those of its cache; answering would be
    wrong."""


class MissingSignalError(TokpruneError, RuntimeError):
    """A method asked for a signal that this model's vision tower cannot give."""


class MissingQueryError(TokpruneError, ValueError):
    """A query-aware method ran without a question."""


class MissingExtraError(TokpruneError, ImportError):
    """An optional dependency is not installed; the message is the pip line that installs it."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Phrase that points from a mistyped `name` to the nearest allowed one, or an empty string."""
    close = difflib.get_close_matches(str(name).lower(), sorted(allowed), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def unknown(what: str, name: object, allowed: Iterable[str]) -> OptionError:
    """Build the error for a name that is not in `allowed`, with the nearest one and the whole list."""
    allowed = sorted(allowed)
    return OptionError(
        f"unknown {what} {name!r}.{nearest(str(name), allowed)} Allowed: {', '.join(allowed) or 'none'}."
    )


def raised_here(error: BaseException) -> bool:
    """Whether a line of tokprune itself raised an error, so that neither a model nor a library is to blame for it."""
    last = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1:]
    return any(str(frame.f_globals.get("__name__")).partition(".")[0] == "tokprune" for frame in last)


def missing_extra(package: str, extra: str, purpose: str) -> MissingExtraError:
    """Build the error for an optional package that is not installed."""
    return MissingExtraError(f"{purpose} needs {package!r}, which is not installed. Run: {install_line(extra)}")


def install_line(extra: str = "") -> str:
    """The pip line that installs tokprune with an extra from where this one came from: its checkout, wheel, or URL.

    An index is named only where an index brought it: the name alone would install a stranger's package.
    """
    part = f"[{extra}]" if extra else ""
    checkout = Path(__file__).parent.parent
    if (checkout / "pyproject.toml").exists():
        return f"pip install -e {_quoted(checkout, part)}"
    try:
        told = json.loads(importlib.metadata.distribution("tokprune").read_text("direct_url.json") or "{}")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        told = {}
    url = str(told.get("url", ""))
    if "dir_info" in told:
        return f"pip install {_quoted(Path(url.removeprefix('file://')), part)}"
    if vcs := told.get("vcs_info"):
        url = f"{vcs.get('vcs', 'git')}+{url}@{vcs.get('commit_id', 'main')}"
    return f"pip install {shlex.quote(f'tokprune{part} @ {url}' if url else f'tokprune{part}')}"


def _quoted(folder: Path, part: str) -> str:
    """A folder with an extra as the shell takes it; "." for the current one."""
    return f"'{'.' if folder == Path.cwd() else folder}{part}'"
