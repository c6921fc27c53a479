"""Builds source archive and wheel into dist/, and tries the wheel where nothing else of the repository is.

    python -m tools.dist              the wheel in an environment of its own that sees this one's libraries
    python -m tools.dist --bare       in an empty one, with all that the wheel asks for (several GB with torch)
    python -m tools.dist --bare --tag v0.1.0      and check that this is the version

The wheel is made from the source archive, so a file that is missing there is missing in both.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT = 30 * 2**20  # bytes of a wheel
NEEDED = (
    "tokprune/py.typed",
    "tokprune/demo/weights/model.safetensors",
    "tokprune/demo/weights_clips/model.safetensors",
    "tokprune/evaluation/tasks/tokprune_scenes/questions.parquet",
)
UNWANTED = ("tests/", "tools/", "benchmarks/", "examples/", "docs/")
TRIAL = """\
import json, pathlib, sys
import tokprune
assert "torch" not in sys.modules, "importing tokprune imports torch"
assert pathlib.Path(tokprune.__file__).is_relative_to(sys.prefix), tokprune.__file__
from tokprune.demo.asking import Asker
import tokprune.demo
asker = Asker(*tokprune.demo.load())
example = tokprune.demo.held_out(1)[0]
answered = asker.ask(example.question, example.image, "divprune", 0.1)
assert answered.text == example.answer and answered.stream.kept == 26, answered
print(len(tokprune.list_methods()), "methods;", example.question, answered.text)
"""


def build(out: Path) -> Path:
    """Both archives in `out`; returns the wheel."""
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:  # no build/ of an earlier time
        clean = Path(folder) / "source"
        subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(clean)], check=True)
        subprocess.run([sys.executable, "-m", "build", "--outdir", str(out), str(clean)], check=True)
    (wheel,) = out.glob("*.whl")
    return wheel


def check(wheel: Path, tag: str = "") -> None:
    """Size, contents and version. Raises SystemExit with what is wrong."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    names = zipfile.ZipFile(wheel).namelist()
    wrong = [f"no {name}" for name in NEEDED if name not in names]
    wrong += [f"{name} is in it" for name in names if name.startswith(UNWANTED)]
    wrong += [f"{wheel.stat().st_size} bytes, more than {LIMIT}"] if wheel.stat().st_size > LIMIT else []
    wrong += [f"tag {tag} is not version {version}"] if tag and tag != f"v{version}" else []
    if wrong:
        raise SystemExit(f"{wheel.name}: " + "; ".join(wrong))
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB, {len(names)} files")


def attempt(wheel: Path, bare: bool) -> None:
    """Install it in a fresh environment, far from the repository, and use it."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "env"
        venv.create(place, with_pip=bare)
        python = place / "bin" / "python"
        if bare:
            install = [str(python), "-m", "pip", "install", "--quiet", str(wheel)]
        else:
            (site,) = place.glob("lib/python*/site-packages")
            (site / "below.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
            install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
            install += ["--no-deps", "--ignore-installed", str(wheel)]
        subprocess.run(install, check=True, cwd=folder)
        alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run([str(python), "-c", TRIAL], check=True, cwd=folder, env=alone)
        for words in (["methods", "--json", "-"], ["eval", "--reference", "--methods", "divprune"]):
            command = [str(place / "bin" / "tokprune"), *words]
            subprocess.run(command, check=True, cwd=folder, env=alone, stdout=subprocess.DEVNULL)


def main() -> None:
    """Build, check, try."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--bare", action="store_true", help="try it in an empty environment")
    parser.add_argument("--tag", default="", help="the version that it should be, as v0.1.0")
    args = parser.parse_args()
    wheel = build(args.out.resolve())
    check(wheel, args.tag)
    attempt(wheel, args.bare)
    print("installs and answers")


if __name__ == "__main__":
    main()
