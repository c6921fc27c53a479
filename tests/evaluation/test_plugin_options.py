"""The model_args of the plug-in, and the pruning they describe; no lmms-eval needed."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

import tokprune
from tokprune.errors import BudgetError, OptionError
from tokprune.evaluation.errors import EvaluationError, at_row
from tokprune.evaluation.lmms_engine import cut, generation_options
from tokprune.evaluation.lmms_meter import SampleRecord, WorkerOutcome, means, merge
from tokprune.evaluation.lmms_options import ModelArgs, pruning_config


def test_model_args_as_lmms_eval_hands_them_over() -> None:
    args = ModelArgs.parse(
        {
            "pretrained": "demo",
            "method": "divprune",
            "ratio": 0.25,
            "batch_size": "4",
            "max_batch_size": None,
            "device": "cpu",
            "scorer": "None",
            "option.seed": 5,
            "processor.max_pixels": 1000,
        }
    )
    assert (args.batch_size, args.scorer, args.ratio) == (4, None, 0.25)
    assert dict(args.options) == {"seed": 5}
    assert dict(args.processor) == {"max_pixels": 1000}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"ratoi": 0.1}, ["ratoi", "Did you mean 'ratio'?", "option.<field>"]),
        ({"batch_size": "auto"}, ["auto", "batch_size=8"]),
        ({"batch_size": 0}, ["batch_size=0"]),
        ({"frames": -1}, ["frames=-1"]),
        ({"control": "no_imag"}, ["no_imag", "no_image"]),
        ({"on_error": "ignore"}, ["ignore", "continue"]),
        ({"device": "cpu", "device_map": "auto"}, ["device_map"]),
        ({"flops_samples": -1}, ["flops_samples"]),
    ],
)
def test_wrong_model_args_say_what_to_write(given: dict[str, object], words: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        ModelArgs.parse({"pretrained": "demo", **given})
    for word in words:
        assert word in str(caught.value)


def test_a_model_must_be_named() -> None:
    with pytest.raises(OptionError, match="pretrained=demo"):
        ModelArgs.parse({"method": "none"})


def test_method_none_is_no_pruning() -> None:
    assert pruning_config("none", ratio=0.5) is None
    with pytest.raises(OptionError, match="method=none has none"):
        pruning_config("none", options={"k": 3})


def test_methods_and_their_options() -> None:
    single = pruning_config("tome", options={"r": 2})
    assert single is not None
    assert single.methods == (tokprune.get_method("tome", r=2),)
    joined = pruning_config("tome + random", ratio=0.5, options={"tome.r": 3, "random.seed": 5})
    assert joined is not None
    assert joined.methods == (tokprune.get_method("tome", r=3), tokprune.get_method("random", seed=5))
    assert joined.ratio == 0.5
    with pytest.raises(OptionError, match=r"option\.tome\.<field>"):
        pruning_config("tome+divprune", ratio=0.5, options={"r": 3})
    with pytest.raises(OptionError, match="divprune"):
        pruning_config("divprun", ratio=0.5)
    with pytest.raises(BudgetError, match="ratio"):
        pruning_config("divprune")


def test_the_seed_goes_to_methods_that_draw() -> None:
    drawn = pruning_config("random", ratio=0.5, seed=7)
    assert drawn is not None
    assert drawn.methods[0] == tokprune.get_method("random", seed=7)
    own = pruning_config("random", ratio=0.5, options={"seed": 3}, seed=7)
    assert own is not None
    assert own.methods[0] == tokprune.get_method("random", seed=3)


def test_generation_settings_are_greedy_unless_a_temperature_is_set() -> None:
    options, stops, ignored = generation_options(
        {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 16, "until": ["\n\n"], "image_sizes": 3}, None
    )
    assert options["do_sample"] is False
    assert options["temperature"] is None
    assert options["max_new_tokens"] == 16
    assert stops == ()  # lmms-eval's default is nobody's wish
    assert ignored == ["image_sizes"]
    options, stops, _ = generation_options({"temperature": 0.7, "until": "\n"}, 5)
    assert (options["do_sample"], options["max_new_tokens"], stops) == (True, 5, ("\n",))
    options, _, _ = generation_options({"temperature": 0.7, "do_sample": False}, None)
    assert options["do_sample"] is False


def test_answers_end_at_stop_strings() -> None:
    assert cut(" red\nbecause", ("\n",)) == "red"
    assert cut("red because", ()) == "red because"


def _record(doc_id: int, kept: int, flops: int | None = None, task: str = "t") -> SampleRecord:
    return SampleRecord(task, doc_id, 100, kept, kept + 9, 2, ttft_ms=float(doc_id), flops=flops)


def test_means_leave_out_what_was_not_measured() -> None:
    found = means([_record(1, 10, 500), _record(3, 30)])
    assert found["keep_ratio"] == 0.2
    assert found["flops"] == 500
    assert found["ttft_ms"] == 2.0
    assert "vision_ms" not in found


def test_outcomes_of_processes_merge_in_the_order_of_rows() -> None:
    error = at_row("t", 5, "reading", ValueError("broken"))
    whole = merge(
        [WorkerOutcome([_record(2, 1), _record(0, 1)], seconds=2.0), WorkerOutcome([_record(1, 1)], fatal=error)]
    )
    assert [r.doc_id for r in whole.records] == [0, 1, 2]
    assert whole.fatal is error
    assert whole.seconds == 2.0


def test_errors_travel_between_processes_with_their_row() -> None:
    error = pickle.loads(pickle.dumps(at_row("pope", 5, "cannot read its media", ValueError("broken"))))
    assert isinstance(error, EvaluationError)
    assert (error.task, error.doc_id) == ("pope", 5)
    assert "doc_id 5" in str(error)


def test_importing_the_package_does_not_import_lmms_eval() -> None:
    code = (
        "import sys, tokprune.evaluation, tokprune.evaluation.lmms_plugin; "
        "print([m for m in ('lmms_eval', 'torch', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
