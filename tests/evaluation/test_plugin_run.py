"""The plug-in inside lmms-eval: registered, same scores as a direct loop, measured, loud about rows that fail."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import tokprune.demo
from tests.evaluation.lmms_tasks import CHOOSE, color_examples, write_task
from tokprune.budget import kept
from tokprune.errors import OptionError, TokpruneError
from tokprune.evaluation import task_folder
from tokprune.evaluation.errors import EvaluationError
from tokprune.evaluation.scoring import right

pytest.importorskip("lmms_eval")

LIMIT = 21


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        yield


@pytest.fixture(scope="module")
def chat() -> Any:
    from tokprune.evaluation.lmms_model import TokpruneChat

    return TokpruneChat(pretrained="demo", device="cpu", batch_size="7", flops_samples=1)


def evaluate(model: Any, task: str, folder: Path, limit: int | None = None) -> Any:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager("ERROR", str(folder), include_defaults=False, model_name="tokprune")
    return simple_evaluate(
        model=model, tasks=[task], task_manager=manager, limit=limit, bootstrap_iters=0, batch_size=1, log_samples=True
    )


def direct(limit: int, **pruning: Any) -> list[bool]:
    """The same questions without lmms-eval: read the file, ask the model, compare the word."""
    import pyarrow.parquet as pq

    from tools.demo.evaluation import answer

    rows = pq.read_table(task_folder() / "tokprune_scenes" / "questions.parquet").to_pylist()[:limit]
    images = [Image.open(io.BytesIO(r["image"]["bytes"])).convert("RGB") for r in rows]
    model, processor = tokprune.demo.load()
    if pruning:
        tokprune.apply(model, processor=processor, **pruning)
    return [
        right(word, r["answer"])
        for at in range(0, limit, 7)
        for word, r in zip(
            answer(model, processor, [r["question"] for r in rows[at : at + 7]], images[at : at + 7]),
            rows[at : at + 7],
            strict=True,
        )
    ]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="reads pyproject.toml with tomllib")
def test_the_entry_point_of_the_package_registers_both_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    import tomllib

    from lmms_eval.models import registry_v2

    data = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    group = data["project"]["entry-points"]["lmms_eval.models"]
    points = EntryPoints(EntryPoint(name, value, "lmms_eval.models") for name, value in group.items())
    monkeypatch.setattr(registry_v2, "entry_points", lambda: points)
    registry = registry_v2.ModelRegistryV2()
    registry.load_entrypoint_manifests(overwrite=True)
    assert registry.get_model_class("tokprune").__name__ == "TokpruneChat"
    assert registry.get_model_class("tokprune", force_simple=True).__name__ == "TokpruneSimple"


def test_scores_are_those_of_a_direct_loop(chat: Any) -> None:
    for method, ratio in (("none", None), ("divprune", 0.1)):
        chat.set_pruning(method, ratio=ratio)
        found = evaluate(chat, "tokprune_scenes", task_folder(), LIMIT)
        samples = sorted(found["samples"]["tokprune_scenes"], key=lambda s: s["doc_id"])
        hits = direct(LIMIT, **({} if ratio is None else {"method": method, "ratio": ratio}))
        assert [bool(s["accuracy"]) for s in samples] == hits
        scores = found["results"]["tokprune_scenes"]
        assert scores["accuracy,none"] == pytest.approx(sum(hits) / LIMIT)
        types = [scores[f"{kind},none"] for kind in ("color", "shape", "count", "exist", "where", "read", "find")]
        assert scores["macro,none"] == pytest.approx(sum(types) / 7)
        assert [r.doc_id for r in chat.records] == list(range(LIMIT))
        keep = 256 if ratio is None else kept(256, ratio)
        assert {r.kept_tokens for r in chat.records} == {keep}
        assert found["throughput"]["avg_kept_tokens"] == keep
        assert found["throughput"]["avg_flops"] > 1e8
        assert found["throughput"]["avg_ttft_ms"] > 0
        first = chat.records[0]
        assert samples[0]["token_counts"] == [{"input_tokens": first.prompt_tokens, "output_tokens": first.new_tokens}]


def test_the_model_stays_for_the_next_run_and_close_frees_it(tmp_path: Path) -> None:
    from tokprune.evaluation.lmms_model import TokpruneChat

    model = TokpruneChat(pretrained="demo", device="cpu", flops_samples=0)
    engine = model.engine()
    model.clean()
    assert model.engine() is engine
    model.set_pruning("divprune", ratio=0.5)
    assert engine.pruning is not None
    model.set_pruning("none")
    assert engine.pruning is None
    model.close()
    assert model.engines == {}


def test_likelihoods_choose_what_generation_says(tmp_path: Path) -> None:
    from tokprune.evaluation.lmms_model import TokpruneChat, TokpruneSimple

    examples = color_examples(4)
    write_task(tmp_path, "choose_color", examples, CHOOSE)
    simple = TokpruneSimple(pretrained="demo", device="cpu", method="divprune", ratio=0.25)
    found = evaluate(simple, "choose_color", tmp_path)
    said = direct_words(examples, method="divprune", ratio=0.25)
    expected = sum(w == e.answer for w, e in zip(said, examples, strict=True)) / 4
    assert found["results"]["choose_color"]["acc,none"] == pytest.approx(expected)
    assert {r.kept_tokens for r in simple.records} == {64}
    chat = TokpruneChat(pretrained="demo", device="cpu")
    with pytest.raises(TokpruneError, match="--force_simple"):
        chat.loglikelihood([])
    with pytest.raises(TokpruneError, match="several rounds"):
        chat.generate_until_multi_round([SimpleNamespace(task_name="mix_evals")])  # type: ignore[list-item]


def direct_words(examples: list[Any], **pruning: Any) -> list[str]:
    from tools.demo.evaluation import answer

    model, processor = tokprune.demo.load()
    tokprune.apply(model, processor=processor, **pruning)
    return answer(model, processor, [e.question for e in examples], [e.image for e in examples])


def test_a_row_that_fails_ends_the_run_with_its_name_or_is_listed(tmp_path: Path) -> None:
    from tokprune.evaluation.lmms_model import TokpruneChat

    examples = color_examples(5)
    write_task(tmp_path, "one_missing", examples, missing=3)
    model = TokpruneChat(pretrained="demo", device="cpu", flops_samples=0)
    with pytest.raises(EvaluationError, match=r"task 'one_missing', doc_id 3: .*3\.png") as caught:
        evaluate(model, "one_missing", tmp_path)
    assert (caught.value.task, caught.value.doc_id) == ("one_missing", 3)
    model = TokpruneChat(pretrained="demo", device="cpu", flops_samples=0, on_error="continue")
    found = evaluate(model, "one_missing", tmp_path)
    assert [f.doc_id for f in model.failures] == [3]
    assert [r.doc_id for r in model.records] == [0, 1, 2, 4]
    assert found["throughput"]["avg_failed_rows"] == 1
    model.reset()
    assert model.failures == []


def test_a_batch_that_fails_is_asked_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokprune.evaluation.lmms_model import TokpruneChat

    write_task(tmp_path, "five_rows", color_examples(5))
    model = TokpruneChat(pretrained="demo", device="cpu", flops_samples=0, batch_size=5)
    whole = [s["filtered_resps"] for s in evaluate(model, "five_rows", tmp_path)["samples"]["five_rows"]]
    engine = model.engine()
    generate = engine.generate

    def small_memory(prompts: Any, *more: Any) -> Any:
        if len(prompts) > 1:
            raise MemoryError("out of memory")
        return generate(prompts, *more)

    monkeypatch.setattr(engine, "generate", small_memory)
    model.reset()
    alone = [s["filtered_resps"] for s in evaluate(model, "five_rows", tmp_path)["samples"]["five_rows"]]
    assert alone == whole
    assert len(model.records) == 5
    assert any("row by row: MemoryError" in note for note in model.notes)


def test_wrong_arguments_end_the_run_before_a_model_is_loaded() -> None:
    from tokprune.evaluation.lmms_model import TokpruneChat

    with pytest.raises(OptionError, match="Did you mean 'method'"):
        TokpruneChat.create_from_arg_string("pretrained=demo,metod=divprune", {"batch_size": "1", "device": "cpu"})
    with pytest.raises(OptionError, match="name=value"):
        TokpruneChat.create_from_arg_string("pretrained", {})
    both = TokpruneChat.create_from_arg_string("pretrained=demo,batch_size=3", {"batch_size": "1", "device": None})
    assert both.batch_size == 3
    with pytest.raises(OptionError, match="divprune"):
        TokpruneChat(pretrained="demo", method="divprunee", ratio=0.1)
    with pytest.raises(OptionError, match="there is no folder '/no/such/folder'"):
        TokpruneChat(pretrained="/no/such/folder", device="cpu")
