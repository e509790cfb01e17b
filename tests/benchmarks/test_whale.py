"""The scripts of Whale's figures, with a few layers in place of each model."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from benchmarks.whale import figure
from benchmarks.whale.figure import ASSUMED, Figure, Row, data_of, measured_in, show, text_of

NUMBERS = range(9, 20)


def of(number: int) -> Figure:
    return importlib.import_module(f"benchmarks.whale.figure_{number:02}").FIGURE


def test_every_figure_of_the_evaluation_has_a_script() -> None:
    assert [of(number).number for number in NUMBERS] == list(NUMBERS)


@pytest.mark.parametrize("number", [10])
def test_a_figure_is_predicted(number: int) -> None:
    rows = list(of(number).rows(True))
    predicted = [row.predicted for row in rows if row.predicted is not None]
    assert predicted and all(0 < value < 100 for value in predicted)


@pytest.mark.slow
@pytest.mark.parametrize("number", [9, 11, 12, 13, 14, 15, 16, 17, 18, 19])
def test_the_other_figures_are_predicted(number: int) -> None:
    rows = list(of(number).rows(True))
    assert any(row.predicted is not None and row.predicted > 0 for row in rows)


def made(small: bool) -> list[Row]:
    return [Row("one", 1.45, 1.3), Row("two", None, 2345.6, 0.5, "why")]


FIGURE = Figure(9, "a figure", "images/s", ("a batch",), made)


def test_a_table_says_what_was_assumed() -> None:
    lines = text_of(FIGURE, made(False)).splitlines()
    assert lines[:4] == [
        "Figure 9: a figure (images/s)",
        "         paper predicted  measured",
        "one       1.45       1.3         -",
        "two          -      2346       0.5  why",
    ]
    assert lines[4:-1] == [f"assumed: {one}" for one in (*ASSUMED, "a batch")]


def test_results_are_dated_and_the_newest_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure, "RESULTS", tmp_path)
    assert measured_in("whale-figure-09") is None
    show(FIGURE, ["--results"])
    (tmp_path / "2000-01-01-whale-figure-09.json").write_text("{}")
    found = measured_in("whale-figure-09")
    assert found is not None and found["rows"][1] == {
        "name": "two", "paper": None, "predicted": 2345.6, "measured": 0.5, "note": "why",
    }  # fmt: skip
    assert found == json.loads(json.dumps(data_of(FIGURE, made(False))))


def test_a_few_layers_have_no_figure_of_the_paper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(figure, "RESULTS", tmp_path)
    show(FIGURE, ["--small", "--results"])
    assert "1.45" not in capsys.readouterr().out and not list(tmp_path.iterdir())
