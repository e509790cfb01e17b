"""Devices as rows."""

from __future__ import annotations

from dataclasses import replace

from tests import forecasts
from whalepy.report.folding import folded


def test_few_devices_have_a_row_each() -> None:
    assert [row.ranks for row in folded(forecasts.four_cards())] == ["0", "1", "2", "3"]


def test_alike_devices_share_a_row() -> None:
    rows = folded(forecasts.sixty_four())
    assert [row.ranks for row in rows] == ["0-15", "16-31", "32-39, 41-47", "40", "48-63"]
    assert [row.type for row in rows[2:4]] == ["15 V100-SXM2-32GB", "V100-SXM2-32GB"]


def test_every_device_is_in_one_row() -> None:
    forecast = forecasts.sixty_four()
    for most in (1, 4, 24):
        shown = [device.rank for row in folded(forecast, most=most) for device in row.devices]
        assert sorted(shown) == list(range(64))


def test_too_many_rows_become_one_per_type_and_stage_then_per_type() -> None:
    forecast = forecasts.sixty_four()
    every = tuple(replace(device, batch_share=device.rank) for device in forecast.devices)  # no two alike
    different = replace(forecast, devices=every)
    rows = folded(different)
    assert [row.ranks for row in rows] == ["0-15", "16-31", "32-47", "48-63"]
    assert [row.batch_shares for row in rows] == [(0, 15), (16, 31), (32, 47), (48, 63)]
    assert [row.ranks for row in folded(different, most=3)] == ["0-31", "32-63"]


def test_a_row_shows_its_extremes() -> None:
    row = folded(forecasts.sixty_four(), most=1)[1]
    assert (row.busiest.rank, row.tightest.rank) == (40, 32)
    assert row.holds(40)
    assert not row.holds(0)
