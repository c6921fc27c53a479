"""The lmms-eval model `tokprune`: any Hugging Face VLM, pruned or not, through one and the same code.

    lmms_eval --model tokprune --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=divprune,ratio=0.1 --tasks gqa

    lm = TokpruneChat(pretrained="demo")                 # in Python: one loaded model for many settings
    lm.set_pruning(method="divprune", ratio=0.1)
    lmms_eval.evaluator.simple_evaluate(model=lm, tasks=["tokprune_scenes"], ...)
    lm.records, lm.failures, lm.summary()                # what the last run cost and could not answer

This module imports lmms-eval, which takes some ten seconds.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.utils import simple_parse_args_string
from loguru import logger
from tqdm import tqdm

from tokprune.budget import check_ratio
from tokprune.config import PruneConfig
from tokprune.errors import OptionError, TokpruneError
from tokprune.evaluation.cells import BASELINE
from tokprune.evaluation.errors import EvaluationError, at_row
from tokprune.evaluation.lmms_engine import Answer, Engine, frames_for, load_for, pick_device, scorer_for
from tokprune.evaluation.lmms_meter import SampleRecord, WorkerOutcome, gather, means
from tokprune.evaluation.lmms_options import ModelArgs, pruning_config
from tokprune.evaluation.lmms_requests import MediaRules, Messages, Prompt, RequestReader, TaskRow
from tokprune.loading import DEMO
from tokprune.scaling import RESIZE
from tokprune.types import Fields, JsonObject, MethodLike


class TokpruneChat(lmms):
    """Chat model of lmms-eval. Its arguments are those of ModelArgs; unknown ones are errors.

    After a run: `records` (a SampleRecord per answered row, of all processes), `failures` (EvaluationErrors, only with
    on_error="continue"), `summary()` (means of the records). They start anew with `set_pruning` and `reset`.
    """

    is_simple = False
    tick: Callable[[int, int], None] = staticmethod(lambda done, total: None)
    """Called with (questions answered, questions in all) as a run goes on."""

    def __init__(self, **model_args: object) -> None:
        super().__init__()
        self.args = ModelArgs.parse(model_args)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self._device = pick_device(self.args.device, self.accelerator)
        self.engines: dict[str, Engine] = {}
        self.records: list[SampleRecord] = []
        self.failures: list[EvaluationError] = []
        self.config: PruneConfig | None = None
        self.smaller: float | None = None
        a = self.args
        self.set_pruning(a.method, a.ratio, a.budget, a.positions, a.prompt_budget, **a.options)
        self._reader = RequestReader(
            docs=lambda task, split, i: self.task_dict[task][split][i],
            count=lambda task, split: len(self.task_dict[task][split]),
            rules=self._rules,
            system_prompt=self._resolve_system_prompt(a.system_prompt),
            control=a.control,
            bare=self.engine("image" if a.pretrained == DEMO else "video").loaded.embedded,
        )

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: JsonObject | None = None) -> TokpruneChat:
        """The model of a --model_args string, which goes before --batch_size and --device (always given)."""
        try:
            arguments = simple_parse_args_string(arg_string)
        except ValueError as error:
            raise OptionError(
                f"--model_args {arg_string!r}: write name=value pairs with commas between, such as "
                f"pretrained=demo,method=none."
            ) from error
        return cls(**{**(additional_config or {}), **arguments})

    # -- the pruning ---------------------------------------------------------------------------------------------------

    def set_pruning(
        self,
        method: MethodLike | PruneConfig = "none",
        ratio: float | None = None,
        budget: int | None = None,
        positions: str = "auto",
        prompt_budget: int | None = None,
        **options: object,
    ) -> None:
        """Prune by this from now on, on the model that is loaded; "none" gives it back untouched.

        method: "none", "resize" (smaller pictures), a name, names joined by "+", a method object, a list of those, or a
        PruneConfig. options: fields of the one method named, or "<method>.<field>" for several. Raises OptionError and
        BudgetError as tokprune.apply does; records and failures start anew.
        """
        self.smaller = check_ratio(ratio) if method == RESIZE else None
        method = BASELINE if method == RESIZE else method
        self.config = pruning_config(method, ratio, budget, positions, options, self.args.seed, prompt_budget)
        for engine in self.engines.values():
            self._prune(engine)
        self.reset()

    def _prune(self, engine: Engine) -> None:
        methods = () if self.config is None else self.config.methods
        engine.prune(self.config, scorer_for(self.args, engine.loaded, methods), self.smaller)

    def engine(self, kind: str = "image") -> Engine:
        """The model that answers prompts with media of a kind, "image", "video" or "text"; loaded at first use."""
        name = "clips" if self.args.pretrained == DEMO and kind == "video" else "main"
        if name not in self.engines:
            self.engines[name] = Engine(load_for(self.args, kind, self._device))
            self._prune(self.engines[name])
        return self.engines[name]

    def _rules(self, kind: str) -> MediaRules:
        a = self.args
        frames = a.frames or (None if a.fps is not None else frames_for(self.args, kind))
        return MediaRules(frames, a.fps, a.frame_rule, a.video_backend)

    # -- what a run leaves behind --------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget the records and failures of earlier runs."""
        self.records, self.failures = [], []

    def summary(self) -> dict[str, float]:
        """Means of what was measured (see SampleRecord), and keep_ratio."""
        return means(self.records)

    @property
    def notes(self) -> list[str]:
        """What a user should know of the runs so far."""
        return [note for engine in self.engines.values() for note in engine.notes]

    def clean(self) -> None:
        """lmms-eval throws a model away after one run; this one stays, for sweeps. `close` throws it away."""

    def close(self) -> None:
        """Take the pruning off and free the models."""
        for engine in self.engines.values():
            engine.prune(None)
        self.engines = {}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # -- what lmms-eval asks for ---------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._device

    @property
    def batch_size(self) -> int:
        """Prompts per call of the model."""
        return self.args.batch_size

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for lmms-eval's request cache."""
        processor = self.engine().processor
        return str(getattr(getattr(processor, "tokenizer", processor), "name_or_path", self.args.pretrained))

    @property
    def chat_template(self) -> str | None:
        """The processor's template, for lmms-eval's log."""
        return getattr(self.engine().processor, "chat_template", None)

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests. A row that fails ends the run with an EvaluationError that names it."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        return self._run(requests, self._generated, GenerationResult("", None))

    def _run(
        self,
        requests: Sequence[Instance],
        work: Callable[[Sequence[Prompt], WorkerOutcome], Iterable[GenerationResult | None]],
        lost: GenerationResult,
    ) -> list[GenerationResult]:
        """The results of all requests, in order. work: a batch of prompts -> theirs. lost: of rows that have none."""
        results = [lost] * len(requests)
        outcome, done = WorkerOutcome(), 0
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc="tokprune")
        self.tick(0, len(requests))
        try:
            for places, prompts in self._batches(requests, outcome):
                for place, result in zip(places, work(prompts, outcome), strict=True):
                    results[place] = lost if result is None else result
                    bar.update()
                done += len(places)
                self.tick(done, len(requests))
        except EvaluationError as error:
            outcome.fatal = error
        bar.close()
        self._finish(outcome)
        return results

    def _generated(self, prompts: Sequence[Prompt], outcome: WorkerOutcome) -> Iterator[GenerationResult | None]:
        """The answers to a batch as results; the FLOPs of each task's first ones are counted."""
        for prompt, answer in zip(prompts, self._answers(prompts, outcome), strict=True):
            if answer is None:
                yield None
                continue
            record = answer.record
            if self.rank == 0 and outcome.counted[record.task] < self.args.flops_samples:
                outcome.counted[record.task] += 1
                record = self.engine(prompt.kind).count_flops(prompt, record)
            outcome.records.append(record)
            tokens = TokenCounts(input_tokens=record.prompt_tokens, output_tokens=record.new_tokens)
            yield GenerationResult(answer.text, tokens)

    def _answers(self, prompts: Sequence[Prompt], outcome: WorkerOutcome) -> list[Answer | None]:
        """The answers to a batch; None for rows that fail with on_error="continue".

        A batch that fails is asked row by row: what is too large together may fit alone, and else the failing row is
        known.
        """
        engine = self.engine(prompts[0].kind)
        started = time.perf_counter()
        try:
            return list(engine.generate(prompts, self.args.max_new_tokens, self.args.seed))
        except Exception as error:
            if len(prompts) == 1:
                self._failed_row(prompts[0].row, error, outcome)
                return [None]
            why = f"{type(error).__name__}: {error}"
            engine.note(f"a batch of {len(prompts)} rows failed and was asked row by row: {why}")
        finally:
            outcome.seconds += time.perf_counter() - started
        return [answer for prompt in prompts for answer in self._answers([prompt], outcome)]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Refused: lmms-eval gives likelihood tasks to simple models only."""
        raise TokpruneError(
            "this task compares the likelihoods of its options, which lmms-eval gives to simple models only; add "
            "--force_simple (Python: simple_evaluate(..., force_simple=True), or TokpruneSimple)."
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refused: there is no multi-round mode."""
        raise TokpruneError(
            f"task {requests[0].task_name if requests else '?'!r} asks in several rounds "
            f"(generate_until_multi_round), which tokprune does not run; choose a task of one question per row."
        )

    # -- requests to batches -------------------------------------------------------------------------------------------

    def _request(self, request: Instance) -> tuple[TaskRow, Messages, Fields, object]:
        """Row, doc -> messages, generation settings and target of a chat request."""
        _, messages_of, generation, doc_id, task, split = request.args
        return self._row(request, task, split, doc_id), messages_of, generation, None

    @staticmethod
    def _row(request: Instance, task: str, split: str, doc_id: int) -> TaskRow:
        return TaskRow(task, split, int(doc_id), bool((request.metadata or {}).get("__padding_only__")))

    def _batches(
        self, requests: Sequence[Instance], outcome: WorkerOutcome
    ) -> Iterator[tuple[list[int], list[Prompt]]]:
        """Neighbouring prompts with equal generation settings and media, up to the batch size, with their places.

        Left out are rows that only pad a process, and failed ones with on_error="continue".
        """
        batch: list[tuple[int, Prompt]] = []
        for place, request in enumerate(requests):
            row, messages_of, generation, target = self._request(request)
            if row.padding:
                continue
            try:
                prompt = self._reader.read(row, messages_of, generation, target)
            except Exception as error:
                self._failed_row(row, error, outcome)
                continue
            if batch and (len(batch) == self.batch_size or not _together(batch[0][1], prompt)):
                yield [p for p, _ in batch], [p for _, p in batch]
                batch = []
            batch.append((place, prompt))
        if batch:
            yield [p for p, _ in batch], [p for _, p in batch]

    def _failed_row(self, row: TaskRow, error: Exception, outcome: WorkerOutcome) -> None:
        """Raise the error with its row's name, or note it when the run is to go on."""
        if not isinstance(error, EvaluationError):
            cause, error = error, at_row(row.task, row.doc_id, "answering failed", error)
            error.__cause__ = cause
        if self.args.on_error == "raise":
            raise error
        logger.error(f"{error} The row has no answer and counts as failed (on_error=continue).")
        outcome.failures.append(error)

    def _finish(self, outcome: WorkerOutcome) -> None:
        """Bring the processes together, then report what answering cost, or raise what went wrong in any of them."""
        whole = gather(outcome, self.world_size)
        self.records += whole.records
        self.failures += whole.failures
        if whole.fatal is not None:
            raise whole.fatal
        made = sum(r.new_tokens for r in whole.records)
        extra: JsonObject = {**means(whole.records), "num_requests": len(whole.records)}
        if whole.failures:
            extra["failed_rows"] = len(whole.failures)
        if self._device.type == "cuda":
            extra["peak_memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        log_metrics(whole.seconds, made, made / whole.seconds if whole.seconds else 0.0, additional_metrics=extra)


class TokpruneSimple(TokpruneChat):
    """The simple twin, for --force_simple: the same, and tasks that compare the likelihoods of their options."""

    is_simple = True

    def _request(self, request: Instance) -> tuple[TaskRow, Messages, Fields, object]:
        """Row, doc -> messages, generation settings and target of a simple request: the context is one user turn."""
        target: object = None
        generation: Fields = {}
        if request.request_type == "loglikelihood":
            context, target, visual_of, doc_id, task, split = request.args
        else:
            context, generation, visual_of, doc_id, task, split = request.args
        return self._row(request, task, split, doc_id), _as_turn(context, visual_of), generation, target

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """(mean loss of the continuation, whether it is the greedy one) per request, wrapped as results.

        lmms-eval's scorer takes the smallest number, so a loss is what it wants; and it turns bare tuples into text,
        which the wrapper prevents.
        """
        return self._run(requests, self._scored, GenerationResult(text=(float("inf"), False)))

    def _scored(self, prompts: Sequence[Prompt], outcome: WorkerOutcome) -> Iterator[GenerationResult | None]:
        for prompt in prompts:
            started, result = time.perf_counter(), None
            try:
                loss, greedy, record = self.engine(prompt.kind).score(prompt)
                outcome.records.append(record)
                result = GenerationResult(text=(loss, greedy))
            except Exception as error:
                self._failed_row(prompt.row, error, outcome)
            outcome.seconds += time.perf_counter() - started
            yield result


def _together(first: Prompt, second: Prompt) -> bool:
    """Whether two prompts may share a batch."""
    return first.kind == second.kind and dict(first.generation) == dict(second.generation)


def _as_turn(context: str, visual_of: Callable[[Fields], Sequence[object]] | None) -> Messages:
    """A function doc -> messages for the task's function doc -> pictures and paths."""

    def messages(doc: Fields) -> list[JsonObject]:
        parts = [
            {"type": "video" if isinstance(v, str) else "image", "url": v}
            for v in (visual_of(doc) if visual_of else None) or []
        ]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": context}]}]

    return messages
