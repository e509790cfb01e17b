"""The report of a dry run as plain data: what `--json` writes."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import fields, is_dataclass
from typing import Any

from whalepy.planner.forecast import DeviceForecast, Forecast, ModulePart
from whalepy.report import wording
from whalepy.report.checked import check

_LEFT_OUT = {"memory", "spans"}  # of a device: its course over the step is in `--trace` and on the page


def data(forecast: Forecast) -> dict[str, Any]:
    """Everything that the terminal prints, and more, as dicts, lists, strings, booleans and finite numbers.

    Seconds, bytes and FLOPs. Keys are the fields of Forecast, and what follows from them; None where something was not
    tried. `missing_bytes` is a list of {rank, bytes} of the ranks that run out of memory. `devices` in rank order.
    Raises PlanError for a forecast with a figure that is not a finite number.
    """
    check(forecast)
    found = _plain(forecast, {"devices"})
    found["subject"]["devices"] = [
        {"count": count, "type": kind, "memory_bytes": size} for count, kind, size in forecast.subject.devices
    ]
    found["devices"] = [_device(forecast, each) for each in sorted(forecast.devices, key=lambda each: each.rank)]
    found["modules"] = [_module(each) for each in forecast.modules]
    hidden = wording.hidden(forecast)
    return found | {
        "fits": forecast.fits,
        "throughput_samples_per_s": forecast.throughput_samples_per_s,
        "tokens_per_s": forecast.tokens_per_s,
        "gain_over_equal": forecast.gain_over_equal,
        "gradient_hidden": hidden,
        "missing_bytes": _missing(wording.missing_bytes(forecast)),
        "launch": wording.launch(forecast),
    }


def _device(forecast: Forecast, device: DeviceForecast) -> dict[str, Any]:
    """A device without its course over the step, and the part of it in which it computes."""
    return _plain(device, _LEFT_OUT) | {"busy": device.busy_s / forecast.step_time_s}


def _module(module: ModulePart) -> dict[str, Any]:
    cuts = [{"parameter": name, "size": size, "shares": list(shares)} for name, size, shares in module.split]
    return _plain(module) | {"split": cuts}


def _missing(missing: Mapping[int, int]) -> list[dict[str, int]]:
    return [{"rank": rank, "bytes": lack} for rank, lack in sorted(missing.items())]


def _plain(value: Any, left_out: Set[str] = frozenset()) -> Any:
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value) if each.name not in left_out}
    if isinstance(value, Mapping):
        return _missing(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
