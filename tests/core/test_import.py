"""`import tokprune` is light: nothing heavy, nothing on the GPU, no waiting."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

HEAVY = ("transformers", "decord", "timm", "open_clip", "lmms_eval", "torchvision", "av", "matplotlib", "vllm", "typer")
STEPS = (
    "import tokprune",
    "tokprune.list_methods(); tokprune.get_method('divprune')",
    "tokprune.PruneConfig.build('divprune', ratio=0.1)",
)
SCRIPT = f"""
import json, sys, time
import torch
before = set(sys.modules)
for step in {STEPS!r}:
    start = time.perf_counter()
    exec(step)
    seconds = time.perf_counter() - start
    heavy = [m for m in {HEAVY!r} if m in sys.modules and m not in before]
    print(json.dumps(dict(step=step, seconds=seconds, heavy=heavy, cuda=torch.cuda.is_initialized())))
"""


def run() -> list[dict[str, Any]]:
    """What each step brought in, in a fresh interpreter where only torch is there."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_import_is_light_and_quick() -> None:
    found = run()
    assert [f["step"] for f in found] == list(STEPS)
    for step in found:
        assert step["heavy"] == [], step
        assert step["cuda"] is False, step
    best = found[0]["seconds"]
    for _ in range(3):  # a busy machine slows single runs
        if best < 0.3:
            break
        best = min(best, run()[0]["seconds"])
    assert best < 0.3


def test_import_alone_does_not_even_load_torch() -> None:
    code = "import sys, tokprune; assert 'torch' not in sys.modules, 'torch'; dir(tokprune)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_public_names_exist_and_unknown_ones_do_not() -> None:
    import tokprune

    for name in tokprune.__all__:
        assert getattr(tokprune, name) is not None
    assert set(tokprune.__all__) <= set(dir(tokprune))
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        tokprune.prune  # noqa: B018 - looking it up is the test


def test_the_command_line_answers_without_torch() -> None:
    script = "import sys, tokprune.cli.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0


NOT_FOR_HELP = {"torch", "transformers", "numpy", "PIL", "av", "timm", "lmms_eval", "matplotlib", "jinja2", "yaml"}
NOT_FOR_HELP |= {"markdown_it", "pygments"}  # of rich, for formatted help: as long as all the rest together
COUNT = """
import contextlib, io, json, sys
import typer.main
brought = set(sys.modules)  # by typer itself: its older versions import rich's formatting, whether used or not
sys.argv = ["tokprune", "--help"]
from tokprune.cli import main
with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
    main()
print(json.dumps([shown.getvalue(), sorted(sys.modules), sorted(brought)]))
"""


def test_help_comes_from_few_modules() -> None:
    """What takes time when the command line starts is what it imports; a count does not depend on the machine."""
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True, timeout=120)
    shown, modules, by_typer = json.loads(done.stdout)
    assert "beside the ideal and a smaller picture." in " ".join(shown.split())  # the whole sentence of `profile`
    assert NOT_FOR_HELP & set(modules) <= set(by_typer)
    assert not [m for m in modules if m.startswith(("tokprune.methods.", "tokprune.runtime.", "tokprune.adapters."))]
    assert len([m for m in modules if m.startswith("tokprune")]) <= 40  # 25 when this was written: the commands' own
    assert len(modules) <= 450  # 287, most of them typer's and rich's


def test_the_list_of_methods_brings_no_library_with_it() -> None:
    """Over torch, the package and the classes of all methods: our own modules, and a few of Python's."""
    code = (
        "import json, sys, torch, numpy; before = set(sys.modules); import tokprune; tokprune.list_methods(); "
        "print(json.dumps(sorted({m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert set(json.loads(done.stdout)) <= {"tokprune", "numpy"}
