"""How results of lmms-eval are read, which tasks there are, and where printed lines go."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokprune import environment as environment_module
from tokprune.environment import environment
from tokprune.errors import OptionError
from tokprune.evaluation.cells import Cell
from tokprune.evaluation.errors import EvaluationError
from tokprune.evaluation.harness import CellLog
from tokprune.evaluation.harness_results import cell_result, main_metric, metrics_of, score_of
from tokprune.evaluation.harness_tasks import unknown_task
from tokprune.evaluation.lmms_meter import SampleRecord
from tokprune.evaluation.table import FLOPS, KEPT, TOTAL, TTFT


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (True, 1.0),
        (0.25, 0.25),
        ({"question_id": 7, "score": 1}, 1.0),  # pope, mme
        ({"pred_answer": "B", "gt_answer": "C", "score": 0}, 0.0),  # mvbench
        ({"pred_answer": "b ", "answer": "B"}, 1.0),  # videomme
        ({"pred": 3, "ground_truth": "3"}, 1.0),  # egoschema
        ({"parsed_pred": "A", "answer": "D"}, 0.0),  # mmmu, longvideobench
        ({"video": "x"}, None),
        ("yes", None),
    ],
)
def test_scores_of_single_questions(value, score):
    assert score_of(value) == score


def test_aggregated_metrics_leave_errors_and_names_out():
    entry = {
        "alias": "x",
        "exact_match,none": 0.5,
        "exact_match_stderr,none": "N/A",
        "f1,strict": 0.2,
        "f1,loose": 0.9,
        "samples": 7,
    }
    assert metrics_of(entry) == {"exact_match": 0.5, "f1": 0.2}


def test_main_metric_is_the_task_s_own_choice():
    config = {"task": "t", "metric_list": [{"metric": "submission"}, {"metric": "anls"}, {"metric": "acc"}]}
    assert main_metric(config, {"acc": 1.0, "anls": 0.5}) == "anls"
    assert main_metric({**config, "score_key": "acc"}, {"acc": 1.0, "anls": 0.5}) == "acc"
    with pytest.raises(EvaluationError, match="validation split"):
        main_metric(config, {})


def record(task, doc_id, flops=None):
    return SampleRecord(task, doc_id, 256, 26, 40, 2, ttft_ms=3.0 + doc_id, flops=flops)


def lmms_results(**results):
    """What simple_evaluate returns, as far as it is read."""
    tasks = {t: r for t, r in results.items() if t != "group"}
    return {
        "results": results,
        "configs": {t: {"task": t, "metric_list": [{"metric": "acc"}]} for t in tasks},
        "versions": dict.fromkeys(tasks, 1.0),
        "higher_is_better": {t: {"acc": True} for t in tasks},
        "samples": {
            t: [
                {"doc_id": i, "target": "red", "filtered_resps": ["red" if i else "blue"], "acc": float(i > 0)}
                for i in (2, 0, 1)
            ]
            for t in tasks
        },
    }


def test_a_cell_from_lmms_eval_s_results():
    records = [record("scenes", 0, 1000), record("scenes", 1, 3000), record("scenes", 2)]
    found = cell_result(Cell("scenes", "divprune", 0.1), lmms_results(scenes={"acc,none": 2 / 3}), records)
    assert found.main == "acc"
    assert found.metrics == {"acc": 2 / 3}
    assert [(s.doc_id, s.answer, s.target, s.scores) for s in found.samples] == [
        (0, "blue", "red", {"acc": 0.0}),
        (1, "red", "red", {"acc": 1.0}),
        (2, "red", "red", {"acc": 1.0}),
    ]
    assert found.costs == {KEPT: 26, TOTAL: 256, "prompt_tokens": 40, "new_tokens": 2, FLOPS: 2000}
    assert found.timing == {TTFT: 4.0}
    assert found.samples[0].costs[FLOPS] == 1000
    assert FLOPS not in found.samples[2].costs


def test_a_group_without_an_aggregate_gets_the_mean_of_its_tasks():
    found = cell_result(Cell("group", "none", 1.0), lmms_results(a={"acc,none": 0.5}, b={"acc,none": 1.0}), [])
    assert found.metrics == {"acc": 0.75, "a/acc": 0.5, "b/acc": 1.0}
    assert len(found.samples) == 6
    assert {s.task for s in found.samples} == {"a", "b"}
    given = cell_result(
        Cell("group", "none", 1.0), lmms_results(a={"acc,none": 0.5}, b={"acc,none": 1.0}, group={"acc,none": 0.9}), []
    )
    assert given.metrics["acc"] == 0.9


def test_a_task_without_any_number_is_a_failure():
    with pytest.raises(EvaluationError, match="'scenes' gave no number"):
        cell_result(Cell("scenes", "none", 1.0), lmms_results(scenes={"alias": "scenes"}), [])


def test_unknown_tasks_are_answered_with_near_ones():
    error = unknown_task("vidomme", ["videomme", "videomme_long", "mme", "gqa"])
    assert isinstance(error, OptionError)
    assert "videomme" in str(error)
    assert "gqa" not in str(error).partition("lmms_eval")[0]


def test_real_task_index_knows_ours_and_a_user_s(tmp_path):
    pytest.importorskip("lmms_eval")
    from tokprune.evaluation.harness_tasks import task_manager

    (tmp_path / "my_task.yaml").write_text("task: my_task\ndataset_path: json\noutput_type: generate_until\n")
    manager = task_manager(["tokprune_scenes", "my_task"], [tmp_path])
    assert {"tokprune_scenes", "tokprune_clips", "my_task"} <= set(manager.all_tasks)
    assert "gqa" not in manager.all_tasks  # lmms-eval's own index was not needed
    with pytest.raises(OptionError, match="not a folder"):
        task_manager(["my_task"], [tmp_path / "nowhere"])


def test_environment_names_versions_and_this_checkout_s_commit():
    found = environment()
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert found["machine"]
    here = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    if here.returncode == 0:
        assert found["commit"] == here.stdout.strip()


def test_a_commit_of_another_project_is_not_ours(tmp_path, monkeypatch):
    """A package installed into an environment inside somebody's checkout."""
    copy = tmp_path / "project" / "tokprune" / "environment.py"
    copy.parent.mkdir(parents=True)
    (copy.parent / "__init__.py").write_text("")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-C", str(tmp_path / "project")]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    monkeypatch.setattr(environment_module, "__file__", str(copy))
    assert environment_module.commit() is None
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "y"], check=True)
    assert len(environment_module.commit()) == 40


def test_log_takes_what_is_printed_and_nothing_else(tmp_path, capsys):
    log = CellLog()
    with log.quiet():
        print("loading")
        stream = sys.stdout  # a logger keeps it
    with log.to(tmp_path / "cell" / "log.txt"):
        print("hello")
        sys.stderr.write("\r 50%|#####")
        stream.write("from a logger\n")
    stream.write("later\n")
    print("to the user")
    assert (tmp_path / "cell" / "log.txt").read_text() == "hello\nfrom a logger\n"
    assert capsys.readouterr().out == "to the user\n"
    (tmp_path / "file").write_text("")
    with log.to(tmp_path / "file" / "log.txt"):  # cannot be opened: the cell runs all the same
        print("lost")


def test_the_data_sets_of_tasks_and_groups_are_found() -> None:
    """So that a data set that cannot be had is said before a load retries for minutes."""
    from tokprune.evaluation.harness_tasks import data_sets

    lmms = pytest.importorskip("lmms_eval.tasks")
    manager = lmms.TaskManager("ERROR", None)
    assert [name.partition("/")[2] for name in data_sets(manager, "gqa")] == ["GQA"]
    assert [name.partition("/")[2] for name in data_sets(manager, "mme")] == ["MME"]
    assert data_sets(manager, "no_such_task") == []
    groups = [name for name in manager.all_groups if len(data_sets(manager, name)) > 1]
    assert groups


def test_a_task_whose_data_cannot_be_had_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    from tokprune.evaluation.harness_tasks import task_manager

    def unreachable(*arguments: object, **options: object) -> None:
        raise OSError("no route to host")

    pytest.importorskip("lmms_eval")
    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    with pytest.raises(OptionError, match=r"/GQA' is not on this machine"):
        task_manager(["gqa"])
    assert task_manager(["tokprune_scenes"])
