"""A plug-in package for a method of one's own, and what the matrix of models says of it."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from tokprune.errors import MissingExtraError, OptionError
from tokprune.files import write_text
from tokprune.methods.base import ConnectorMethod, Method
from tokprune.registry import list_methods
from tokprune.testing.self_test import Check, prompts, self_test
from tokprune.testing.tiny import FAMILIES, build

MODELS = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl")
"""One family of each kind of layout and position."""

FILES = {
    "pyproject.toml": "pyproject.toml.txt",
    "README.md": "README.md.txt",
    "{module}.py": "method.py.txt",
    "tests/test_{name}.py": "test_method.py.txt",
    "tests/golden.json": "golden.json.txt",
}


def write_plugin(name: str, folder: Path | None = None) -> list[Path]:
    """Write a package with a method called `name`, its entry point and tests that pass; returns the files.

    folder: where to, by default tokprune-NAME here. Raises OptionError for a name that is no identifier or is taken,
    and for a folder that is not empty.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise OptionError(
            f"{name!r} is no name of a method; write lower-case letters, digits and _, such as my_method."
        )
    if name in list_methods():
        raise OptionError(f"the name {name!r} is taken; tokprune methods {name} says by what. Choose another.")
    package = f"tokprune-{name.replace('_', '-')}"
    folder = folder or Path(package)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OptionError(f"{folder} is there already and not empty; give another --out.")
    words = {
        "@NAME@": name,
        "@CLASS@": "".join(part.capitalize() for part in name.split("_")),
        "@MODULE@": f"tokprune_{name}",
        "@PACKAGE@": package,
    }
    written = []
    for target, source in FILES.items():
        text = files("tokprune.testing").joinpath("templates", source).read_text(encoding="utf-8")
        for mark, word in words.items():
            text = text.replace(mark, word)
        written.append(write_text(folder / target.format(module=words["@MODULE@"], name=name), text))
    return written


def check_on_models(method: Method, families: Sequence[str] = MODELS) -> Iterator[tuple[str, list[Check]]]:
    """The self-test of tiny random-weight models with this method: family and checks, one after another.

    Prefill and cached steps against embeddings cut by hand, ratio 1 and remove() bit for bit, rows without neighbours.
    """
    for family in families:
        if family not in FAMILIES:
            raise OptionError(f"no tiny model of {family!r}; there are: {', '.join(sorted(FAMILIES))}.")
    for family in families:
        if not isinstance(method, ConnectorMethod):
            yield family, [Check("models", None, f"the matrix is for the connector stage, and this is {method.stage}")]
            continue
        if any(need.startswith("clip_") for need in method.needs):
            yield family, [Check("models", None, "the tiny models have no text-image scorer, which this method needs")]
            continue
        try:
            tiny = build(family)
        except MissingExtraError as error:
            yield family, [Check("models", None, str(error))]
            continue
        processor = tiny.processor
        yield family, self_test(tiny.model, prompts(tiny.model, processor), method=method, processor=processor)
