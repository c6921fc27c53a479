"""The command line: what it lists, explains and refuses. The demo itself is run by tests/demo/test_demo_command.py."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from tokprune.cli.app import app
from tokprune.errors import OptionError
from tokprune.registry import list_methods

run = CliRunner().invoke


def test_lists_every_method():
    rows = json.loads(run(app, ["methods", "--json", "-"]).output)
    assert {r["name"] for r in rows} == set(list_methods())
    assert all(r["summary"] and r["paper"] for r in rows)


def test_filters():
    rows = json.loads(run(app, ["methods", "--stage", "connector", "--query-aware", "--json", "-"]).output)
    assert rows
    assert all(r["query_aware"] and r["stage"] == "connector" for r in rows)
    assert {r["name"] for r in rows} == set(list_methods("connector", query_aware=True))


def test_explains_one():
    out = run(app, ["methods", "divprune"]).output
    assert "2503.02175" in out
    assert "CVPR 2025" in out
    assert "checked against vbdi/divprune" in out
    assert json.loads(run(app, ["methods", "hired", "--json", "-"]).output)["options"]["alpha"] == 0.5


def test_the_list_reads_well_at_80_columns():
    """Every name whole, and no method takes more than six lines."""
    out = run(app, ["methods"], env={"COLUMNS": "80"}).output
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    starts = [i for i, line in enumerate(lines) if line[1:2].strip() and line.startswith(" ")]
    assert {lines[i].split()[0] for i in starts} == set(list_methods())
    assert max(b - a for a, b in itertools.pairwise(starts)) <= 8  # the next stage's heading lies between, too
    assert "…" not in out


def test_json_means_a_file_in_every_command():
    """`--json` alone in one command and `--json FILE` in another would be two languages."""
    import typer

    for name, command in typer.main.get_command(app).commands.items():
        for option in command.params:
            if "--json" in option.opts:
                assert not option.is_flag, name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["methods", "divprun"], "divprune"),
        (["methods", "--stage", "conector"], "connector"),
        (["demo", "--methods", "randon"], "random"),
        (["demo", "--ratios", "a,b"], "--ratios 0.5"),
        (["demo", "--ratios", "2"], "ratio"),
        (["demo", "--image", "x.png"], "--question"),
        (["demo", "--image", "missing.png", "--question", "what ?"], "missing.png"),
        (["show", "--image", "missing.png"], "missing.png"),
        (["demo", "--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_wrong_input_says_what_to_type(arguments, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run(app, arguments)
    assert isinstance(result.exception, OptionError)
    assert words in str(result.exception)


def test_errors_end_with_a_sentence_not_a_traceback():
    done = subprocess.run([sys.executable, "-m", "tokprune", "methods", "divprun"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "divprune" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_version():
    import tokprune

    assert tokprune.__version__ in run(app, ["--version"]).output
