"""The devices as the rows of a report: alike ones in one row, so that a table of 64 devices can be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from whalepy.planner.forecast import DeviceForecast, Forecast
from whalepy.report.wording import memory_unit, ranks

SINGLE = 8  # up to here every device has a row of its own
MOST = 24  # rows that can still be read

Key = Callable[[DeviceForecast], tuple[object, ...]]


@dataclass(frozen=True)
class Row:
    """Devices shown together, in rank order."""

    devices: tuple[DeviceForecast, ...]

    @property
    def ranks(self) -> str:
        """`0, 1, 4-7`."""
        return ranks(device.rank for device in self.devices)

    @property
    def type(self) -> str:
        """The type of the devices, with their number where there are several."""
        number = len(self.devices)
        return self.devices[0].type if number == 1 else f"{number} {self.devices[0].type}"

    @property
    def tightest(self) -> DeviceForecast:
        """The device with the largest part of its memory in use; ties to the lowest rank."""
        return max(
            self.devices, key=lambda each: (each.peak_memory_bytes / max(each.memory_capacity_bytes, 1), -each.rank)
        )

    @property
    def busiest(self) -> DeviceForecast:
        """The device that computes longest; ties to the lowest rank."""
        return max(self.devices, key=lambda each: (each.busy_s, -each.rank))

    @property
    def batch_shares(self) -> tuple[int, int]:
        """The smallest and the largest share of the batch, in rows."""
        found = [each.batch_share for each in self.devices]
        return min(found), max(found)

    def holds(self, rank: int) -> bool:
        """Whether this row shows that device."""
        return any(each.rank == rank for each in self.devices)


def folded(forecast: Forecast, *, single: int = SINGLE, most: int = MOST) -> tuple[Row, ...]:
    """Every device in exactly one row, rows in the order of their lowest rank.

    Up to `single` devices have a row each; more are folded where the figures of a row would be printed alike. Where
    that leaves more than `most` rows, one row stands for the devices of one type in one stage, then of one type.
    """
    if len(forecast.devices) <= single:
        return _grouped(forecast.devices, lambda each: (each.rank,))
    for key in (_alike(forecast), lambda each: (each.stage, each.type)):
        rows = _grouped(forecast.devices, key)
        if len(rows) <= most:
            return rows
    return _grouped(forecast.devices, lambda each: (each.type,))


def _alike(forecast: Forecast) -> Key:
    _, unit = memory_unit(device.peak_memory_bytes for device in forecast.devices)

    def key(each: DeviceForecast) -> tuple[object, ...]:
        used = round(each.peak_memory_bytes / unit, 1), round(each.memory_capacity_bytes / unit, 1)
        adds = None if each.adds is None else round(100 * each.adds)
        return each.stage, each.type, each.batch_share, *used, round(100 * each.busy_s / forecast.step_time_s), adds

    return key


def _grouped(devices: Sequence[DeviceForecast], key: Key) -> tuple[Row, ...]:
    groups: dict[tuple[object, ...], list[DeviceForecast]] = {}
    for device in sorted(devices, key=lambda each: each.rank):
        groups.setdefault(key(device), []).append(device)
    return tuple(Row(tuple(group)) for group in groups.values())
