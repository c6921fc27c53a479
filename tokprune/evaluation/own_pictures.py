"""A sweep's cells on a folder of one's own pictures and questions: right or wrong where answers are given, else
agreement with the unpruned model."""

from __future__ import annotations

import contextlib
import csv
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import tokprune
from tokprune.adapters.prompting import build_inputs
from tokprune.adapters.query import tokenizer_of
from tokprune.errors import OptionError
from tokprune.evaluation.cells import Cell, CellResult, Sample, SweepSettings, build_methods
from tokprune.evaluation.lmms_meter import stages_of, timed, token_counts
from tokprune.evaluation.scoring import right
from tokprune.evaluation.table import KEPT, TOTAL, TTFT
from tokprune.files import read_json, read_picture
from tokprune.loading import Loaded, demo_scorer
from tokprune.types import Inputs, JsonObject
from tokprune.video.backend_images import PICTURES, natural

TASK = "pictures"
LISTS = ("questions.json", "questions.csv")
REPEATS = 5
RIGHT, AGREES, KL = "right", "agreement", "kl"
"""Scores of a question: begins with the expected answer; is the unpruned model's answer; divergence of the first
token's distribution from the unpruned model's, in nats."""


@dataclass(frozen=True)
class PictureQuestion:
    """One question about one picture. answer: what is right, "" where nobody says."""

    picture: Path
    text: str
    answer: str = ""


def read_questions(folder: Path, asked: Sequence[str], limit: int | None = None) -> list[PictureQuestion]:
    """The questions of a folder: those of its questions.json or questions.csv, else `asked` about every picture in it.

    Rows have the fields image, question and, where it is known, answer; a path is one inside the folder. Raises
    OptionError for a folder without pictures, and for rows that lack a field or name a picture that is not there.
    """
    if not folder.is_dir():
        raise OptionError(f"--images {folder} is no folder; give one with pictures in it.")
    listed = next((folder / name for name in LISTS if (folder / name).exists()), None)
    if listed is None:
        files = sorted((p for p in folder.iterdir() if p.suffix.lower() in PICTURES and p.name[0] != "."), key=natural)
        questions = [PictureQuestion(file, text) for file in files for text in asked]
        if not questions:
            raise OptionError(f"{folder} holds no pictures ({', '.join(sorted(PICTURES))}).")
    else:
        questions = [_question(listed, number, row) for number, row in enumerate(_rows(listed), 1)]
        if not questions:
            raise OptionError(f"{listed} holds no questions.")
    return questions if limit is None else questions[:limit]


def _rows(listed: Path) -> list[object]:
    if listed.suffix == ".csv":
        with listed.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file))
    data = read_json(listed, "questions")
    if not isinstance(data, list):
        raise OptionError(
            f'{listed} is no list of questions: [{{"image": "a.jpg", "question": "...", "answer": "..."}}].'
        )
    return data


def _question(listed: Path, number: int, row: object) -> PictureQuestion:
    if not isinstance(row, dict) or not row.get("image") or not row.get("question"):
        raise OptionError(f'{listed}, row {number}: needs "image" and "question" ("answer" is optional), not {row!r}.')
    picture = listed.parent / str(row["image"])
    if not picture.is_file():
        raise OptionError(f"{listed}, row {number}: there is no picture {picture}.")
    return PictureQuestion(picture, str(row["question"]), str(row.get("answer") or ""))


class OwnPictures:
    """Runs a cell on questions about pictures; call it with a cell, the baseline first. tick: told (done, total).

    Answers are greedy and at most `longest` tokens. Every question is asked alone, so that its time is its own.
    """

    def __init__(
        self,
        loaded: Loaded,
        questions: Sequence[PictureQuestion],
        settings: SweepSettings,
        longest: int,
        scorer: object = None,
        tick: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.loaded, self.questions, self.settings = loaded, questions, settings
        self.longest, self.scorer, self.tick = longest, scorer, tick
        self.labelled = all(q.answer for q in questions)
        self.plain: dict[int, str] = {}
        """The unpruned model's answers, by number."""
        self.first: list[Tensor] = []
        """Its log-probabilities of each first token, (V,) each."""

    def __call__(self, cell: Cell) -> CellResult:
        """The result of a cell."""
        if cell.baseline:
            self.first.clear()
            return self._result(cell, self._ask(self.longest, keep_first=True))
        if len(self.first) < len(self.questions):  # the baseline was read from the results folder
            self._ask(1, keep_first=True)
        with self._pruned(cell) as pruning:
            return self._result(cell, self._ask(self.longest, pruning))

    def _pruned(self, cell: Cell) -> tokprune.Pruning:
        methods = list(build_methods(cell.method, self.settings))
        return tokprune.apply(
            self.loaded.model,
            methods,
            ratio=cell.ratio,
            positions=self.settings.positions,
            processor=self.loaded.processor,
            scorer=demo_scorer(self.loaded, methods) if self.scorer is None else self.scorer,
        )

    def _inputs(self, question: PictureQuestion) -> Inputs:
        picture = read_picture(question.picture)
        return build_inputs(self.loaded.model, self.loaded.processor, question.text, images=[picture])

    @torch.no_grad()
    def first_token_ms(self, cells: Sequence[Cell], repeats: int = REPEATS) -> dict[Cell, float]:
        """Median time to the first token of each cell, in turns, so that a busy moment of the machine hits all alike;
        repeat i asks the i-th question. Empty for a model whose stages cannot be timed."""
        if stages_of(self.loaded.model) is None:
            return {}
        times: dict[Cell, list[float]] = {cell: [] for cell in cells}
        for i in range(repeats + 1):
            inputs = self._inputs(self.questions[i % len(self.questions)])
            for cell in cells:
                with contextlib.nullcontext() if cell.baseline else self._pruned(cell):
                    times[cell].append(self._generate(inputs, 1)[2]["ttft_ms"])
        return {cell: statistics.median(values[1:]) for cell, values in times.items()}  # the first round warms up

    def remember(self, baseline: CellResult) -> None:
        """Compare with this baseline's answers from now on."""
        self.plain = {s.doc_id: s.answer for s in baseline.samples}

    @torch.no_grad()
    def _ask(self, longest: int, pruning: tokprune.Pruning | None = None, keep_first: bool = False) -> list[JsonObject]:
        out: list[JsonObject] = []
        for number, question in enumerate(self.questions):
            inputs = self._inputs(question)
            if not out:
                self._generate(inputs, 1)  # the first run of a setting pays for what the others find ready
            with pruning.query(question.text) if pruning is not None else contextlib.nullcontext():
                text, likely, times = self._generate(inputs, longest)
            keep = None if pruning is None or pruning.last is None else pruning.last.keep
            total, kept, _ = token_counts(self.loaded.model, inputs, keep)[0]
            row: JsonObject = {"text": text, "total": total, "kept": kept, **times}
            if keep_first:
                self.first.append(likely.cpu())
            else:
                base = self.first[number].to(likely.device)
                row[KL] = float((base.exp() * (base - likely).nan_to_num(0.0)).sum().clamp_min(0))
            out.append(row)
            self.tick(number + 1, len(self.questions))
        return out

    def _generate(self, inputs: Inputs, longest: int) -> tuple[str, Tensor, JsonObject]:
        """The answer, the log-probabilities (V,) of its first token, and the times in ms."""
        model = self.loaded.model
        greedy: JsonObject = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        with timed(model.device, stages_of(model)) as times:
            said = model.generate(
                **inputs, max_new_tokens=longest, **greedy, return_dict_in_generate=True, output_logits=True
            )
        new = said.sequences[0, inputs["input_ids"].shape[1] :]
        text = tokenizer_of(self.loaded.processor).decode(new, skip_special_tokens=True).strip()
        return text, said.logits[0][0].float().log_softmax(-1), times

    def _result(self, cell: Cell, rows: Sequence[JsonObject]) -> CellResult:
        samples = []
        for number, (question, row) in enumerate(zip(self.questions, rows, strict=True)):
            text = str(row["text"])
            same = cell.baseline or text == self.plain.get(number)
            scores = {AGREES: float(same), KL: float(row.get(KL, 0.0))}
            if self.labelled:
                scores[RIGHT] = float(right(text, question.answer))
            costs = {KEPT: float(row["kept"]), TOTAL: float(row["total"])}
            samples.append(Sample(TASK, number, text, question.answer, scores, costs))
        if cell.baseline:
            self.plain = {s.doc_id: s.answer for s in samples}
        count = len(samples)
        metrics = {name: sum(s.scores[name] for s in samples) / count for name in samples[0].scores}
        costs = {name: sum(s.costs[name] for s in samples) / count for name in (KEPT, TOTAL)}
        times = [float(row["ttft_ms"]) for row in rows if "ttft_ms" in row]
        timing = {TTFT: statistics.median(times)} if times else {}
        return CellResult(cell, metrics, RIGHT if self.labelled else AGREES, tuple(samples), True, costs, timing)


def fingerprint(questions: Sequence[PictureQuestion]) -> str:
    """What tells one set of questions from another: texts, answers, names and sizes of the pictures."""
    import hashlib

    facts = [[q.picture.name, q.picture.stat().st_size, q.text, q.answer] for q in questions]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
