"""What numbers were made with: versions, commit, machine, command. Nothing in here depends on the clock."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

#: Packages whose versions are noted when they are installed; the keys are the names used in results.
PACKAGES = {
    "tokprune": "tokprune",
    "torch": "torch",
    "transformers": "transformers",
    "lmms_eval": "lmms-eval",
    "accelerate": "accelerate",
    "datasets": "datasets",
    "numpy": "numpy",
    "pillow": "pillow",
    "av": "av",
}


def environment(device: str = "cpu") -> dict[str, object]:
    """Versions, the commit of tokprune where it runs from a checkout, and the machine."""
    import torch

    versions = {name: _version(package) for name, package in PACKAGES.items()}
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") and torch.cuda.is_available() else None
    return {
        **versions,
        "commit": commit(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}" + (f", {gpu}" if gpu else ""),
        "threads": torch.get_num_threads(),
    }


def commit() -> str | None:
    """The commit that this package is checked out at, or None where it was installed from a wheel.

    A virtual environment may lie inside some other project's checkout, so the package's own file has to be tracked
    there.
    """
    here = Path(__file__).parent
    if _git(here, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return _git(here, "rev-parse", "HEAD")


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, object]:
    """What the numbers of the demo and of benchmarks were measured on, in a few fields."""
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        **{name: _version(PACKAGES[name]) for name in ("tokprune", "torch", "transformers")},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads" + (f", {gpu}" if gpu else ", no GPU"),
    }


def command_line() -> str:
    """What was typed."""
    return shlex.join(["tokprune", *sys.argv[1:]])
