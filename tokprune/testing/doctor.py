"""Looks at an installation for `tokprune doctor`: versions against the tested ranges, devices, optional parts."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from tokprune.errors import install_line
from tokprune.testing.self_test import Check
from tokprune.types import JsonObject

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

    from tokprune.runtime.reach import Reach

NOT_EXTRAS = ("dev", "test", "all")  # for working on tokprune, and the sum of the others


@dataclass(frozen=True)
class Package:
    """A package that tokprune can use. range: of tested versions. ok: None where it may be missing and is."""

    name: str
    version: str | None
    range: str
    ok: bool | None


@dataclass(frozen=True)
class Extra:
    """An optional part of tokprune, with the packages it needs. install: the line that installs it."""

    name: str
    packages: tuple[Package, ...]
    install: str

    @property
    def ok(self) -> bool:
        """Whether all of it is there, in tested versions."""
        return all(package.ok for package in self.packages)


@dataclass(frozen=True)
class Diagnosis:
    """What an installation is made of. notes: what could not be found out. checks: of a model's self-test, if one was
    made. reach: what can be seen and done inside its vision tower."""

    python: str
    tokprune: str
    packages: tuple[Package, ...]
    extras: tuple[Extra, ...]
    devices: tuple[str, ...]
    notes: tuple[str, ...] = ()
    model: str | None = None
    checks: tuple[Check, ...] = field(default=())
    reach: Reach | None = None

    @property
    def ok(self) -> bool:
        """Whether what must be there is there in a tested version, and no check failed."""
        return all(package.ok for package in self.packages) and all(check.ok is not False for check in self.checks)

    def as_dict(self) -> JsonObject:
        """The same as plain values, for JSON."""
        extras = [{**asdict(extra), "ok": extra.ok} for extra in self.extras]
        return {"ok": self.ok, **asdict(self), "extras": extras}


def diagnose(model: str | None = None, checks: tuple[Check, ...] = (), reach: Reach | None = None) -> Diagnosis:
    """Look at this installation. model, checks, reach: the name of a model, its self-test, and what tokprune can see
    and do inside its vision tower, to be kept with the rest."""
    import tokprune

    core, extras, notes = _requirements()
    return Diagnosis(
        python=platform.python_version(),
        tokprune=tokprune.__version__,
        packages=tuple(core),
        extras=tuple(extras),
        devices=tuple(devices()),
        notes=tuple(notes),
        model=model,
        checks=checks,
        reach=reach,
    )


def devices() -> Iterator[str]:
    """Where models can run here, in words."""
    import torch

    yield f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        yield f"cuda:{index} ({facts.name}, {facts.total_memory / 2**30:.0f} GiB)"
    if torch.backends.mps.is_available():
        yield "mps"


def _requirements() -> tuple[list[Package], list[Extra], list[str]]:
    """Core packages, extras and notes, from what the installed tokprune says of itself."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("tokprune") or []
    except importlib.metadata.PackageNotFoundError:
        return [], [], [f"tokprune is not installed here, so its tested ranges are unknown: {install_line()}"]
    core: list[Package] = []
    extras: dict[str, list[Package]] = {}
    for requirement in map(Requirement, lines):
        if requirement.name == "tokprune":
            continue  # an extra made of others
        marker = str(requirement.marker or "")
        names = re.findall(r'extra == ["\']([\w-]+)["\']', marker)
        for name in names or [""]:
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": name}):
                continue
            if name not in NOT_EXTRAS:
                package = _package(requirement.name, requirement.specifier, optional=bool(name))
                (extras.setdefault(name, []) if name else core).append(package)
    return core, [Extra(name, tuple(packages), install_line(name)) for name, packages in extras.items()], []


def _package(name: str, specifier: SpecifierSet, optional: bool) -> Package:
    """What is installed of a package. specifier: packaging's SpecifierSet."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Package(name, None, str(specifier), None if optional else False)
    return Package(name, version, str(specifier), specifier.contains(version, prereleases=False))
