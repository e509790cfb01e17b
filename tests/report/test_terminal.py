"""The report in a terminal: golden texts, and what holds at every width."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.cells import cell_len

from tests import forecasts
from tests.golden import Golden
from whalepy.errors import PlanError
from whalepy.planner.forecast import Forecast
from whalepy.report.terminal import text

Make = Callable[[], Forecast]
every = pytest.mark.parametrize("make", forecasts.EVERY)


@every
@pytest.mark.parametrize("width", [100, 80])
def test_golden(golden: Golden, make: Make, width: int) -> None:
    golden(f"report_{make.__name__}_{width}", text(make(), width=width))


@pytest.mark.parametrize(("make", "width"), [(forecasts.four_cards, 80), (forecasts.cpus, 100)])
def test_golden_ascii(golden: Golden, make: Make, width: int) -> None:
    golden(f"report_{make.__name__}_{width}_ascii", text(make(), width=width, unicode=False))


def test_golden_narrow(golden: Golden) -> None:
    golden("report_four_cards_40", text(forecasts.four_cards(), width=40))


@every
@pytest.mark.parametrize("width", [40, 47, 59, 60, 66, 72, 80, 93, 100, 133, 200])
def test_no_line_is_too_wide_and_nothing_is_lost(make: Make, width: int) -> None:
    forecast = make()
    shown = text(forecast, width=width)
    assert max(map(cell_len, shown.splitlines())) <= width
    flat = re.sub(r"\s+", "", shown)
    wanted = [forecast.strategy, *forecast.ways_out, forecast.fidelity, forecast.subject.model, "bottleneck"]
    for word in " ".join(wanted).split():  # a long strategy is folded within its column
        assert word in flat


@every
def test_less_than_forty_columns_are_forty(make: Make) -> None:
    assert text(make(), width=1) == text(make(), width=40)


@every
@pytest.mark.parametrize("unicode", [True, False])
def test_colour_adds_only_colour(make: Make, unicode: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = text(make(), unicode=unicode)
    monkeypatch.setenv("NO_COLOR", "1")  # the caller decides, not the environment
    colored = text(make(), unicode=unicode, color=True)
    assert "\x1b[" in colored
    bare = re.sub(r"\x1b\[[0-9;]*m", "", colored)
    assert [line.rstrip() for line in bare.splitlines()] == plain.splitlines()
    assert plain.isascii() or unicode


@every
def test_the_same_text_every_time(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    first = text(make())
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert text(make()) == first


def test_names_that_would_move_the_cursor() -> None:
    known = forecasts.four_cards()
    subject = replace(known.subject, model="[red]Моя\x1b[31m\nmodel[/]")
    shown = text(replace(known, subject=subject))
    assert "[red]Моя?[31m model[/]" in shown  # neither markup nor escape codes
    assert "[red]????[31m model[/]" in text(replace(known, subject=subject), unicode=False)


def test_a_name_longer_than_a_line() -> None:
    known = forecasts.four_cards()
    shown = text(replace(known, subject=replace(known.subject, model="M" * 250)), width=80)
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.count("M") == 250


def test_a_device_alone_is_compared_with_nothing() -> None:
    known = forecasts.runnable()
    subject = replace(known.subject, devices=((1, *known.subject.devices[0][1:]),))
    alone = replace(known, subject=subject, devices=known.devices[:1], bottleneck=0, tightest=0)
    shown = text(alone)
    assert "equal shares (" not in shown
    assert "<-" not in shown
    assert "python train.py" in shown


def test_top() -> None:
    assert "8 stages" in text(forecasts.sixty_four(), top=9)
    assert "and 7 more, in --json" in text(forecasts.sixty_four(), top=2)


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("mfu", float("nan"), "forecast.mfu is nan, not a finite number"),
        ("step_time_s", 0.0, "forecast.step_time_s is 0.0: a step takes time"),
        ("bottleneck", 9, "forecast.bottleneck is 9, which is no rank"),
    ],
)
def test_a_forecast_that_cannot_be_right(field: str, value: float, what: str) -> None:
    with pytest.raises(PlanError) as found:
        text(replace(forecasts.four_cards(), **{field: value}))
    assert str(found.value) == (
        f"{what}\n  fix: this is a mistake in whalepy's planner: please report it with the command that you ran"
    )


def test_a_figure_deep_inside() -> None:
    known = forecasts.four_cards()
    broken = replace(known.devices[2], busy_s=float("inf"))
    with pytest.raises(PlanError, match=r"^forecast\.devices\[2\]\.busy_s is inf, not a finite number"):
        text(replace(known, devices=(*known.devices[:2], broken, known.devices[3])))
