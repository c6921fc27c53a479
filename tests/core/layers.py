"""The layers of the package: what each may import, what it does import, and the table of CONTRIBUTING.md made from
that."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import tokprune

ROOT = Path(tokprune.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# What each layer of the package may import of the others, besides itself.
CORE = {"device", "tokens", "budget", "errors", "files", "types"}
MAY_IMPORT = {
    "errors": set[str](),
    "types": set[str](),
    "environment": set[str](),
    "files": {"errors", "types"},
    "device": set[str](),
    "tokens": {"device", "errors"},
    "budget": {"errors"},
    "schedule": {"budget", "errors"},
    "ops": CORE,
    "registry": {"errors", "methods", "types"},
    "config": {"budget", "errors", "files", "methods", "registry", "types"},
    "video": CORE | {"ops"},
    "methods": CORE | {"ops", "registry", "schedule", "video"},
    "scaling": {"budget", "errors", "methods", "types"},
}
# The layers above; each may import those before it, and what stands in MAY_IMPORT.
UPPER = (
    "report",
    "adapters",
    "runtime",
    "api",
    "serving",
    "testing",
    "viz",
    "profiling",
    "demo",
    "loading",
    "evaluation",
    "search",
    "cli",
)
TRANSFORMERS = {"adapters", "runtime", "serving", "testing", "demo", "loading", "profiling", "evaluation"}
# Classes of another package are subclassed here; that package imports the modules, led by an entry point of ours (and
# the sweep imports the one of lmms-eval when it runs). Kernels are written in Triton's language; `device` imports
# them when a tensor lies on a CUDA device.
SUBCLASSED = {
    "evaluation/lmms_model.py": "lmms_eval",
    **{f"ops/kernels/{name}.py": "triton" for name in ("greedy", "merge")},
    **{f"serving/{name}.py": "vllm" for name in ("anyres", "internvl", "llava", "processor", "qwen")},
}
OPTIONAL = {
    "timm",
    "open_clip",
    "decord",
    "av",
    "matplotlib",
    "vllm",
    "lmms_eval",
    "torchvision",
    "triton",
    "peft",
    "optuna",
}


def layer(module: str) -> str:
    """`tokprune.ops.similarity` -> `ops`; the package itself -> ``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and getattr(node.test, "id", getattr(node.test, "attr", "")) == "TYPE_CHECKING"


def imports(path: Path, *, top_level: bool = False) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything imported at run time. top_level: only what importing the module runs."""
    module, package = module_of(path), path.name == "__init__.py"
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: len(module.split(".")) - node.level + package] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            # `from tokprune import ops` names a layer in its second half.
            yield from ((node.lineno, f"{name}.{a.name}" if name == "tokprune" else name) for a in node.names)
        elif type_checking(node):
            assert isinstance(node, ast.If)
            todo += node.orelse
        elif not (top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            todo += ast.iter_child_nodes(node)


def allowed(source: str) -> set[str]:
    if source in MAY_IMPORT:
        return MAY_IMPORT[source]
    if source in UPPER:
        return {*MAY_IMPORT, *UPPER[: UPPER.index(source)]}
    return {*MAY_IMPORT, *UPPER} - {"cli"}


PUBLIC = {name: layer(module) for name, module in tokprune._PUBLIC.items()} | {"__version__": "errors"}


def layers() -> list[str]:
    """All layers, lowest first."""
    return [*MAY_IMPORT, *UPPER]


def imported_by(source: str) -> set[str]:
    """The layers that a layer imports, at import time or inside functions."""
    names: set[str] = set()
    for path in FILES:
        if layer(module_of(path)) == source:
            names |= {layer(name) for _, name in imports(path) if name.split(".")[0] == "tokprune"}
    return {PUBLIC.get(name, name) for name in names} - {source, ""}


def purpose(source: str) -> str:
    """The first sentence of a layer's docstring."""
    folder = ROOT / source
    text = (folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")).read_text(encoding="utf-8")
    doc = ast.get_docstring(ast.parse(text)) or ""
    return doc.split("\n\n")[0].replace("\n", " ").strip().removesuffix(".")


def layers_table() -> str:
    """Who imports whom, as Markdown: read off the sources, so that it is true."""
    rows = ["| part of `tokprune` | what it is for | imports |", "|---|---|---|"]
    for source in layers():
        name = f"`{source}/`" if (ROOT / source).is_dir() else f"`{source}.py`"
        used = imported_by(source)
        rows.append(
            f"| {name} | {purpose(source)} | {', '.join(n for n in layers() if n in used) or 'nothing of ours'} |"
        )
    return "\n".join(rows) + "\n"
