"""Runs the cells of a sweep through lmms-eval on one loaded model."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from tokprune.config import PruneConfig
from tokprune.errors import OptionError, missing_extra
from tokprune.evaluation.cells import OPTION, Cell, CellResult, SweepSettings, config_of
from tokprune.evaluation.team import Team
from tokprune.types import Fields, JsonObject

Tick = Callable[[int, int], None]
SETTINGS = ("batch_size", "dtype", "seed", "frames")  # model_args that are settings of a sweep under the same name
TAKEN = {"pretrained", "method", "ratio", "budget", "positions", "device", *SETTINGS}


class CellLog(io.TextIOBase):
    """Stands in for stdout and stderr. What is written goes to the file of the cell in work; between cells it is
    dropped.

    One object for the whole sweep, since loggers keep the stream they first saw. Lines of progress bars, which begin
    with a carriage return, are left out.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, text: str) -> int:
        """Append to the log of the cell in work."""
        if self._file is not None and not text.startswith("\r"):
            with contextlib.suppress(OSError, ValueError):  # a full disk is reported by the store
                self._file.write(text)
                self._file.flush()
        return len(text)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Nothing printed reaches the terminal inside the with block."""
        with contextlib.redirect_stdout(self), contextlib.redirect_stderr(self):
            yield

    @contextlib.contextmanager
    def to(self, path: Path) -> Iterator[None]:
        """As `quiet`, with what is printed in the file `path`, if that can be opened."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = stack.enter_context(path.open("w", encoding="utf-8"))
            try:
                with self.quiet():
                    yield
            finally:
                self._file = None


class Harness:
    """lmms-eval with one model and the tasks of a sweep; call it with a cell.

    folders: more places with task YAMLs. log_of: where what is printed during a cell goes. tick: told (done, total) as
    a cell goes on. Raises OptionError for tasks that do not exist and models that cannot be opened, before anything
    runs.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        settings: SweepSettings,
        folders: Sequence[str | Path] = (),
        log_of: Callable[[Cell], Path] | None = None,
        tick: Tick | None = None,
    ) -> None:
        self.settings, self.log_of, self.log = settings, log_of, CellLog()
        with self.log.quiet():
            try:
                from lmms_eval import evaluator
            except ImportError as error:
                raise missing_extra("lmms-eval", "eval", "tokprune eval") from error
            from tokprune.evaluation.harness_tasks import task_manager
            from tokprune.evaluation.lmms_model import TokpruneChat

            self._simple_evaluate = evaluator.simple_evaluate
            self.tasks = task_manager(tasks, folders, settings.prompts)
            self.model = TokpruneChat(**self.model_args())
        if tick is not None:
            self.model.tick = tick
        self.team = Team.running()

    def model_args(self) -> JsonObject:
        """The settings as arguments of TokpruneChat."""
        s = self.settings
        more = {k: v for k, v in s.model_args.items() if not k.startswith(OPTION)}
        if twice := sorted(TAKEN & more.keys()):
            raise OptionError(f"--model-args {twice[0]}=... is an option of tokprune eval itself; use that one.")
        device = None if Team.launched().size > 1 and s.device in ("cuda", "auto") else s.device
        return {"pretrained": s.model, "device": device, **{name: getattr(s, name) for name in SETTINGS}, **more}

    def __call__(self, cell: Cell, config: PruneConfig | None = None) -> CellResult | None:
        """Run a cell; None on ranks other than 0. config: how to prune, in place of the cell's method and ratio."""
        import torch

        from tokprune.evaluation.harness_results import cell_result

        logged = self.log.to(self.log_of(cell)) if self.log_of is not None and self.team.leads else self.log.quiet()
        with logged:
            try:
                output = self._evaluate(cell, config)
            finally:
                if torch.cuda.is_available():  # a failed cell may hold memory that the next one needs
                    torch.cuda.empty_cache()
        return None if output is None else cell_result(cell, output, self.model.records)

    def _evaluate(self, cell: Cell, config: PruneConfig | None) -> Fields | None:
        s = self.settings
        ratio = None if cell.baseline else cell.ratio
        if config is not None:
            self.model.set_pruning(config)
        elif cell.method in s.configs:
            self.model.set_pruning(config_of(cell, s))
        else:
            self.model.set_pruning(cell.method, ratio=ratio, positions=s.positions, **s.options(cell.method))
        return self._simple_evaluate(
            model=self.model,
            model_args=f"pretrained={s.model},method={cell.method},ratio={cell.ratio:g}",
            tasks=[cell.task],
            task_manager=self.tasks,
            batch_size=s.batch_size,
            limit=s.limit,
            bootstrap_iters=0,  # intervals come from the paired comparison
            log_samples=True,
            random_seed=s.seed,
            numpy_random_seed=s.seed,
            torch_random_seed=s.seed,
            fewshot_random_seed=s.seed,
        )

    def close(self) -> None:
        """Free the model."""
        with contextlib.suppress(AttributeError):
            self.model.close()


def installed() -> bool:
    """Whether lmms-eval is there."""
    from importlib.util import find_spec

    return "lmms_eval" in sys.modules or find_spec("lmms_eval") is not None
