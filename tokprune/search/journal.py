"""Remembers what a search has scored, in a file, so that an interrupted search goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tokprune.errors import OptionError
from tokprune.files import check_writable, write_text, writing
from tokprune.schedule import Schedule
from tokprune.search.strategies import Score
from tokprune.types import JsonObject

TYPE, VERSION = "tokprune.SearchJournal", 1
Steps = tuple[tuple[int, float], ...]


class Journal:
    """Scores by schedule; each is written down as soon as it is known.

    path: the file, a line per score behind one that says what was searched; None keeps them in memory. key: what the
    scores depend on (model, method, questions ...): a file of another search is refused.
    """

    def __init__(self, path: Path | None = None, key: JsonObject | None = None) -> None:
        self.path, self.known, self.remembered = path, dict[Steps, float](), 0
        if path is None:
            return
        check_writable(path)
        head = {"type": TYPE, "version": VERSION, "key": json.loads(json.dumps(key or {}))}
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if lines:
            self._read(lines, head)
        # Written anew: the last line of an interrupted run may be half a line.
        write_text(path, "".join(json.dumps(line) + "\n" for line in (head, *map(self._line, self.known))))

    def _read(self, lines: list[str], head: JsonObject) -> None:
        try:
            before = json.loads(lines[0])
        except ValueError:
            before = None
        if before != head:
            raise OptionError(
                f"{self.path} belongs to another search (or is no journal); name another place, or remove it: "
                f"rm {self.path}"
            )
        for text in lines[1:]:
            try:
                line = json.loads(text)
                self.known[tuple((int(at), float(share)) for at, share in line["steps"])] = float(line["score"])
            except (ValueError, KeyError, TypeError):
                continue  # cut off in the middle
        self.remembered = len(self.known)

    def _line(self, steps: Steps) -> JsonObject:
        return {"steps": steps, "score": self.known[steps]}

    def remembering(self, score: Score, tick: Callable[[Schedule | None, float], None] = lambda s, x: None) -> Score:
        """The same score, asked for once per schedule. tick: told each schedule that is scored, and what it reached."""

        def remembered(schedule: Schedule | None) -> float:
            steps: Steps = () if schedule is None else schedule.steps
            if steps not in self.known:
                self.known[steps] = float(score(schedule))
                if self.path is not None:
                    with writing(self.path) as path, path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(self._line(steps)) + "\n")
            tick(schedule, self.known[steps])
            return self.known[steps]

        return remembered
