"""The training of the demo VLM: every stage runs, a killed one continues to the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tools.demo import optimizer
from tools.demo.recipe import Recipe, miniature
from tools.demo.train import run


class TestTraining:
    """The script, on a recipe of seconds."""

    @staticmethod
    def run(out: Path, **options) -> None:
        run(out, miniature(), workers=1, **options)

    def test_whole_pipeline_then_nothing_to_do(self, tmp_path: Path) -> None:
        self.run(tmp_path)
        report = json.loads((tmp_path / "report.json").read_text())
        assert set(report["held_out_accuracy"]) == {"all_tokens", "no_image", "wrong_image"}
        assert report["stages"]["qa"]["log"][-1]["step"] == 4
        assert (tmp_path / "model" / "scorer" / "model.safetensors").exists()
        written = (tmp_path / "qa.pt").stat().st_mtime_ns
        self.run(tmp_path)
        assert (tmp_path / "qa.pt").stat().st_mtime_ns == written

    def test_killed_stage_continues_to_the_same_weights(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run(tmp_path / "whole", stages=["render", "dense"])
        self.run(tmp_path / "killed", stages=["render"])
        step, calls = optimizer.MixedOptimizer.step, []

        def step_until_killed(self, factor: float) -> float:
            calls.append(factor)
            if len(calls) == 4:  # the checkpoint is after the second step
                raise KeyboardInterrupt
            return step(self, factor)

        with monkeypatch.context() as patch:
            patch.setattr(optimizer.MixedOptimizer, "step", step_until_killed)
            with pytest.raises(KeyboardInterrupt):
                self.run(tmp_path / "killed", stages=["dense"])
        assert not (tmp_path / "killed" / "dense.json").exists()
        self.run(tmp_path / "killed", stages=["dense"])

        whole, continued = (torch.load(tmp_path / name / "dense.pt") for name in ("whole", "killed"))
        assert all(torch.equal(whole[name], continued[name]) for name in whole)
        steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "dense.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3, 4, 4]  # the last line is the validation

    def test_refuses_what_cannot_work(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match="render"):
            self.run(tmp_path, stages=["dense"])
        with pytest.raises(RuntimeError, match="another recipe"):
            run(tmp_path, Recipe(), stages=["render"])
        with pytest.raises(ValueError, match="unknown stage"):
            self.run(tmp_path, stages=["sleep"])
