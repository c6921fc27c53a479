"""The results folder: what is written is whole, what is damaged runs again, what cannot be written is said."""

from __future__ import annotations

import dataclasses
import errno
import json
import os

import pytest

from tests.evaluation.runs import ENVIRONMENT, run_cell
from tokprune.errors import OptionError
from tokprune.evaluation import store as store_module
from tokprune.evaluation.cells import Cell, SweepSettings, key
from tokprune.evaluation.store import Store, StoreError, dump, write_atomic

CELL = Cell("scenes", "divprune", 0.1)
SETTINGS = SweepSettings("demo", limit=40)


@pytest.fixture
def store(tmp_path):
    with_folder = Store(tmp_path / "out", SETTINGS, ENVIRONMENT).open()
    yield with_folder
    with_folder.close()


def test_round_trip(store):
    assert store.load(CELL) is None
    store.save(run_cell(CELL))
    assert store.load(CELL) == run_cell(CELL)
    lines = (store.path(CELL) / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 40
    assert json.loads(lines[3])["doc_id"] == 3
    assert not list(store.folder.rglob("*.tmp"))


def test_every_setting_makes_another_key():
    keys = {key(CELL, SETTINGS), key(Cell("scenes", "divprune", 0.2), SETTINGS)}
    for change in (
        {"model": "x"},
        {"limit": 41},
        {"batch_size": 2},
        {"device": "cuda"},
        {"dtype": "bfloat16"},
        {"seed": 1},
        {"frames": 8},
        {"positions": "keep"},
        {"model_args": {"system_prompt": "x"}},
    ):
        keys.add(key(CELL, dataclasses.replace(SETTINGS, **change)))
    assert len(keys) == 11
    assert all(k.startswith("scenes-divprune-") for k in keys)


def test_half_written_and_damaged_cells_run_again(store):
    store.save(run_cell(CELL))
    samples = store.path(CELL) / "samples.jsonl"
    whole = samples.read_bytes()
    samples.write_bytes(whole[:-40])
    assert store.load(CELL) is None
    samples.write_bytes(whole)
    assert store.load(CELL) is not None
    (store.path(CELL) / "result.json").write_text("{")
    assert store.load(CELL) is None
    (store.path(CELL) / "result.json").unlink()
    assert store.load(CELL) is None


def test_other_versions_are_refused(store):
    store.save(run_cell(CELL))
    other = Store(store.folder, SETTINGS, {**ENVIRONMENT, "torch": "3"})
    with pytest.raises(OptionError, match=r"torch 2 then, 3 now.*--out"):
        other.load(CELL)


def test_disk_full_names_the_cell_and_leaves_nothing_behind(store, monkeypatch):
    store.save(run_cell(Cell("scenes", "none", 1.0)))

    def full(source, target):
        if target.name == "samples.jsonl":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    real = os.replace
    monkeypatch.setattr(store_module.os, "replace", full)
    with pytest.raises(StoreError, match=r"scenes, divprune at 0\.1.*disk is full.*goes on from there"):
        store.save(run_cell(CELL))
    monkeypatch.undo()
    assert store.load(CELL) is None
    assert store.load(Cell("scenes", "none", 1.0)) is not None
    assert not list(store.folder.rglob("*.tmp"))
    store.save(run_cell(CELL))
    assert store.load(CELL) is not None


def test_unwritable_folder_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "out", "/proc/nowhere"):
        with pytest.raises(OptionError, match=r"cannot write the folder.*--out"):
            Store(folder, SETTINGS, ENVIRONMENT).open()


def test_two_sweeps_do_not_share_a_folder(store):
    with pytest.raises(OptionError, match="another sweep"):
        Store(store.folder, SETTINGS, ENVIRONMENT).open()
    store.close()
    Store(store.folder, SETTINGS, ENVIRONMENT).open().close()


def test_failures_are_kept_until_the_cell_works(store):
    store.save_failure(CELL, {"error": "ValueError", "reason": "no picture", "trace": ""})
    assert store.failure(CELL)["reason"] == "no picture"
    store.save(run_cell(CELL))
    assert store.failure(CELL) is None


def test_dump_is_json_with_a_line_per_sample():
    data = {"cells": [{"samples": [{"a": 1, "s": "\u00000"}, {"a": 2}], "x": [1, 2]}, {"samples": []}], "é": '"'}
    text = dump(data)
    assert json.loads(text) == data
    assert '        {"a": 2}\n' in text


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomic(path, "old")
    monkeypatch.setattr(store_module.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]
