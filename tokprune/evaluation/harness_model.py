"""The model of a sweep: TokpruneChat that tells how far it is. Importing this imports lmms-eval."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from tokprune.evaluation.lmms_model import TokpruneChat
from tokprune.evaluation.lmms_requests import Prompt

if TYPE_CHECKING:
    from lmms_eval.api.instance import GenerationResult, Instance

    from tokprune.evaluation.lmms_parallel import Outcome


class SweepModel(TokpruneChat):
    """TokpruneChat with `tick`, called with (questions answered, questions in all) as a cell goes on."""

    tick: Callable[[int, int], None] = staticmethod(lambda done, total: None)

    def _batches(
        self, requests: Sequence[Instance], results: list[GenerationResult | None], outcome: Outcome
    ) -> Iterator[tuple[list[int], list[Prompt]]]:
        self.tick(0, len(requests))
        done = 0
        for places, prompts in super()._batches(requests, results, outcome):
            yield places, prompts
            done += len(places)
            self.tick(done, len(requests))
