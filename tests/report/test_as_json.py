"""The report as JSON: the keys that users rely on, and everything that the terminal prints."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest

from tests import forecasts
from whalepy.planner.forecast import Forecast
from whalepy.report.as_json import data
from whalepy.report.terminal import text

Make = Callable[[], Forecast]
every = pytest.mark.parametrize("make", forecasts.EVERY)

KEYS = """
    verdict fits step_time_s throughput_samples_per_s tokens_per_s mfu equal_shares_step_time_s microbatches
    schedule bottleneck assumptions alternatives stages devices breakdown
"""
DEVICE = "rank type batch_share peak_memory_bytes memory_capacity_bytes busy_s"
BREAKDOWN = ("compute_s", "bubble_s", "bridge_s", "gradient_s")


@every
def test_the_keys(make: Make) -> None:
    found = data(make())
    assert set(KEYS.split()) <= set(found)
    assert {field.name for field in fields(Forecast)} <= set(found)
    assert all(set(DEVICE.split()) <= set(device) for device in found["devices"])
    assert set(BREAKDOWN) <= set(found["breakdown"])
    assert [device["rank"] for device in found["devices"]] == sorted(device["rank"] for device in found["devices"])
    assert sum(found["breakdown"][key] for key in BREAKDOWN) == pytest.approx(found["step_time_s"], rel=0.05)


@every
def test_it_is_json_of_finite_numbers(make: Make) -> None:
    found = data(make())
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_figures() -> None:
    found = data(forecasts.four_cards())
    assert found["verdict"] == "tight"
    assert found["fits"] is True
    assert found["throughput_samples_per_s"] == pytest.approx(64 / 3.42)
    assert found["tokens_per_s"] == pytest.approx(64 * 2048 / 3.42)
    assert found["gain_over_equal"] == pytest.approx(4.89 / 3.42)
    assert found["gradient_hidden"] == pytest.approx(1 - 0.17 / 1.41)
    assert [device["batch_share"] for device in found["devices"]] == [24, 24, 8, 8]
    assert [each["rank"] for each in found["alternatives"][2]["missing_bytes"]] == [2, 3]
    assert found["missing_bytes"] == []
    assert found["launch"] is None
    assert found["subject"]["devices"][1] == {"count": 2, "type": "RTX-2080-Ti", "memory_bytes": 11539054592}
    assert found["modules"][3]["split"] == [{"parameter": "weight:0", "size": 2048, "shares": [24, 24, 8, 8]}]
    assert "spans" not in found["devices"][0]


def test_where_nothing_fits() -> None:
    found = data(forecasts.nothing_fits())
    assert found["fits"] is False
    assert found["step_time_s"] == 3.3
    assert [each["rank"] for each in found["missing_bytes"]] == [0, 1, 2, 3]
    assert found["ways_out"] == ["--zero 3", "--recompute full --batch-size 32"]


def test_without_tokens() -> None:
    assert data(forecasts.cpus())["tokens_per_s"] is None


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    else:
        yield value


# A printed figure is one of the data in some unit, rounded; or follows from two of them.
UNITS = (1, 100, 1e3, 1e6, 1e-3, 1e-6, 1e-9, 2.0**-10, 2.0**-20, 2.0**-30)


@pytest.mark.parametrize("make", [forecasts.four_cards, forecasts.runnable, forecasts.cpus, forecasts.nothing_fits])
def test_every_printed_figure_is_in_the_data(make: Make) -> None:
    forecast = make()
    found = data(forecast)
    strings = " ".join(value for value in leaves(found) if isinstance(value, str))
    numbers = [float(value) for value in leaves(found) if isinstance(value, int | float)]
    numbers += [each.step_time_s / forecast.step_time_s - 1 for each in forecast.alternatives]
    shown = text(forecast, width=200)
    for figure in re.findall(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?(?![\w:-])", shown):
        if figure.rstrip(",") in strings:
            continue
        value = float(figure.replace(",", ""))
        digits = len(figure.partition(".")[2])
        near = 0.51 * 10.0**-digits if digits or value < 1000 else 1.0
        assert any(abs(number * unit - value) <= near for number in numbers for unit in UNITS), figure
