"""Runs the quick tests on other versions of what we depend on, each in an environment of its own under .versions/.

    python tests/versions.py                  # all of PLANS
    python tests/versions.py lowest newest    # some

"lowest" is a whole environment (several GB with torch). The others lie on top of the environment that runs this script:
they hold only the packages that differ, and share its torch. Exit code 1 if one of them fails.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import sysconfig
import time
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".versions"
PLANS = ("lowest", "5.23", "newest", "prerelease")
# What touches the libraries: models of every family against brute force, towers, the demo, the command line, the video
# reader.
QUICK = (
    "tests/core", "tests/adapters", "tests/encoder", "tests/decoder", "tests/demo", "tests/testing", "tests/video",
)  # fmt: skip
SHARED = {"torch", "torchvision", "tokprune"}  # an overlay takes these from below


def environment(name: str, below: bool) -> Path:
    """The python of a fresh or kept environment. below: let it see the packages of the one that runs this script."""
    folder = FOLDER / name
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    if below:
        (site,) = folder.glob("lib/python*/site-packages")
        packages = sysconfig.get_path("purelib")
        (site / "below.pth").write_text(f"import site; site.addsitedir({packages!r})\n")
    return python


def install(python: Path, *what: str) -> None:
    """Run pip in an environment; a failure ends the script with its exit code."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what]
    subprocess.run(command, cwd=ROOT, check=True)


def available(*flags: str) -> list[str]:
    """Versions of transformers that the index serves, newest first. flags: "--pre" for pre-releases, too."""
    command = [sys.executable, "-m", "pip", "index", "versions", "transformers", "--disable-pip-version-check", *flags]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"Available versions: (.+)", told)
    return found.group(1).split(", ") if found else []


def direct() -> list[str]:
    """Names of what we and our tests depend on directly."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    names = {re.match(r"[A-Za-z0-9._-]+", line).group() for line in lines}  # type: ignore[union-attr]
    return sorted(names - SHARED)


def prepare(plan: str) -> Path | None:
    """The python of an environment for a plan, or None when there is nothing to test."""
    if plan == "lowest":
        python = environment(plan, below=False)
        install(python, "-c", "constraints-lowest.txt", "--upgrade", "pip", "setuptools")
        install(python, "-c", "constraints-lowest.txt", "-e", ".[test]")
        return python
    held = FOLDER / "held.txt"
    freeze = subprocess.run([sys.executable, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout
    held.write_text("".join(f"{line}\n" for line in freeze.splitlines() if re.match(r"torch(vision)?==", line)))
    python = environment(plan, below=True)
    if plan == "newest":
        install(python, "-c", str(held), "--upgrade", *direct())
    elif plan == "prerelease":
        newest, before = available()[0], available("--pre")[0]
        if newest == before:
            print(f"no pre-release of transformers is newer than {newest}", flush=True)
            return None
        install(python, "-c", str(held), f"transformers=={before}")
    else:
        install(python, "-c", str(held), f"transformers=={plan}.*")
    return python


def versions(python: Path) -> dict[str, str]:
    """What the environment runs."""
    script = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    names = ["torch", "torchvision", *direct()]
    told = subprocess.run([str(python), "-c", script, *names], capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = json.loads(told)
    return found


def main() -> None:
    """Prepare and test every plan that was asked for."""
    parser = argparse.ArgumentParser(description="The quick tests on other versions of what we depend on.")
    parser.add_argument("plans", nargs="*", help=f"some of {', '.join(PLANS)}, or any minor version of transformers")
    parser.add_argument("--workers", default="2", help="test processes")
    asked = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    failed = []
    for plan in asked.plans or PLANS:
        start = time.perf_counter()
        python = prepare(plan)
        if python is None:
            continue
        told = ", ".join(f"{name} {version}" for name, version in versions(python).items())
        print(f"\n{plan}: {told}\nset up in {time.perf_counter() - start:.0f} s", flush=True)
        tests = [str(python), "-m", "pytest", "-n", asked.workers, "-p", "no:cacheprovider", *QUICK]
        if subprocess.run(tests, cwd=ROOT).returncode:
            failed.append(plan)
        print(f"{plan}: {time.perf_counter() - start:.0f} s", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
