"""Where a sweep keeps its results: a folder per cell, written so that a kill at any moment loses at most the cell in
work.

OUT/results.json            everything that a repeated run reproduces: settings, environment, cells with raw samples
OUT/timing.json             what the clock decides: seconds, time to first token, when it was written
OUT/cells/KEY/result.json   a finished cell; written last, so that its presence means "finished"
OUT/cells/KEY/samples.jsonl its questions, one line each; OUT/cells/KEY/timing.json its times
OUT/cells/KEY/failed.json   why a cell failed; OUT/cells/KEY/log.txt what was printed meanwhile
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from tokprune.errors import OptionError, TokpruneError
from tokprune.evaluation.cells import Cell, CellResult, SweepSettings, key
from tokprune.types import Fields, JsonObject

CELL_TYPE, CELL_VERSION = "tokprune.eval.cell", 1
#: Entries of the environment that must not change between the cells of one folder.
PINNED = ("tokprune", "commit", "torch", "transformers", "lmms_eval")


class StoreError(TokpruneError, OSError):
    """The results folder cannot be written; what is finished stays, and the same command goes on from there."""


class Store:
    """The results folder of a sweep. environment: what the cells are made with, see environment.environment."""

    def __init__(self, folder: str | Path, settings: SweepSettings, environment: Fields) -> None:
        self.folder = Path(folder)
        self.settings = settings
        self.environment = dict(environment)
        self._lock: TextIO | None = None

    def path(self, cell: Cell) -> Path:
        """The folder of a cell."""
        return self.folder / "cells" / key(cell, self.settings)

    def open(self) -> Store:
        """Make the folder, see that it can be written, and keep a second sweep out until `close`."""
        try:
            (self.folder / "cells").mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / ".lock").open("a")
        except OSError as error:
            raise OptionError(
                f"cannot write the folder {self.folder}: {_reason(error)}. Give another --out."
            ) from error
        with contextlib.suppress(ImportError):  # Windows has no such locks
            import fcntl

            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.close()
                raise OptionError(
                    f"another sweep is writing to {self.folder}; wait for its end, or give another --out."
                ) from None
            except OSError:
                pass  # a file system without locks
        return self

    def close(self) -> None:
        """Let others write here."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def load(self, cell: Cell) -> CellResult | None:
        """The finished result of a cell, or None; half-written and damaged ones count as unfinished.

        Raises OptionError if it was made with other versions: such cells must not stand in one table.
        """
        folder = self.path(cell)
        data = _read(folder / "result.json")
        if data is None or data.get("type") != CELL_TYPE or data.get("version") != CELL_VERSION:
            return None
        result = None
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            raw = (folder / "samples.jsonl").read_bytes()
            if hashlib.sha256(raw).hexdigest() == data["samples_sha256"]:
                samples = [json.loads(line) for line in raw.decode("utf-8").splitlines()]
                result = CellResult.from_dict(data, samples, _read(folder / "timing.json"))
        if result is not None:
            self._check_versions(cell, data.get("made_with") or {})
        return result

    def _pinned(self) -> JsonObject:
        return {name: self.environment.get(name) for name in PINNED}

    def _check_versions(self, cell: Cell, made_with: Fields) -> None:
        now = self._pinned()
        other = [f"{n} {made_with.get(n)} then, {now[n]} now" for n in PINNED if made_with.get(n) != now[n]]
        if other:
            raise OptionError(
                f"{self.folder} holds a finished cell ({cell}) made with other versions: {'; '.join(other)}. Cells of "
                f"one table must agree: give another --out, or delete {self.path(cell)} to run it again."
            )

    def save(self, result: CellResult) -> None:
        """Write a finished cell; its result.json comes last and whole."""
        folder = self.path(result.cell)
        lines = [json.dumps(vars(s), ensure_ascii=False, sort_keys=True) + "\n" for s in result.samples]
        raw = "".join(lines).encode("utf-8")
        data = {
            "type": CELL_TYPE,
            "version": CELL_VERSION,
            **result.to_dict(),
            "settings": self.settings.to_dict(),
            "made_with": self._pinned(),
            "samples_sha256": hashlib.sha256(raw).hexdigest(),
        }
        with self._writing(f"store the cell {result.cell} in {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / "samples.jsonl", raw)
            write_atomic(folder / "timing.json", dump(result.timing))
            write_atomic(folder / "result.json", dump(data))
            (folder / "failed.json").unlink(missing_ok=True)

    def failure(self, cell: Cell) -> dict[str, str] | None:
        """Why a cell failed the last time, or None."""
        return _read(self.path(cell) / "failed.json")

    def save_failure(self, cell: Cell, failure: Mapping[str, str]) -> None:
        """Note that a cell failed."""
        folder = self.path(cell)
        with self._writing(f"store the cell {cell} in {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / "failed.json", dump(dict(failure)))

    def write(self, name: str, text: str | bytes) -> Path:
        """Write a file of the whole sweep, such as results.json."""
        path = self.folder / name
        with self._writing(f"write {path}"):
            write_atomic(path, text)
        return path

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            again = "Finished cells are safe: the same command goes on from there."
            raise StoreError(f"cannot {what}: {_reason(error)}. {again}") from error


def dump(data: object) -> str:
    """JSON for people: two spaces, and lists of samples one per line."""
    samples: list[str] = []

    def out(value: object) -> object:
        if isinstance(value, dict):
            return {k: _hold(v, samples) if k == "samples" else out(v) for k, v in value.items()}
        return [out(v) for v in value] if isinstance(value, list | tuple) else value

    text = json.dumps(out(data), indent=2, ensure_ascii=False) + "\n"
    return re.sub(r'"\\u0000(\d+)"', lambda mark: samples[int(mark[1])], text)


def _hold(rows: Sequence[object], held: list[str]) -> str:
    """Put a list aside as one line per row; return the mark that stands for it."""
    body = ",\n        ".join(json.dumps(r, ensure_ascii=False, sort_keys=True) for r in rows)
    held.append(f"[\n        {body}\n      ]" if rows else "[]")
    return f"\x00{len(held) - 1}"


def write_atomic(path: Path, text: str | bytes) -> None:
    """Write a file so that it is there whole or not at all, and on the disk when this returns."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(text.encode("utf-8") if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _read(path: Path) -> JsonObject | None:
    """A JSON file, or None where there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _reason(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "the disk is full"
    return error.strerror or str(error)
