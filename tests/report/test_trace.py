"""The trace: Chrome's trace events, which Perfetto opens."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from tests import forecasts
from whalepy.errors import PlanError
from whalepy.planner.forecast import Forecast, Span
from whalepy.report.trace import chrome_trace

Make = Callable[[], Forecast]
every = pytest.mark.parametrize("make", forecasts.EVERY)


def spans_of(trace: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


@every
def test_it_is_json_of_what_the_format_asks_for(make: Make) -> None:
    forecast = make()
    trace = chrome_trace(forecast)
    assert json.loads(json.dumps(trace, allow_nan=False)) == trace
    assert len(spans_of(trace)) == sum(len(device.spans) for device in forecast.devices)
    for event in trace["traceEvents"]:
        assert {"name", "ph", "pid", "tid"} <= set(event)
        assert event["ph"] in "MXC"
        assert event["ph"] == "M" or event["ts"] >= 0
        assert event["ph"] != "X" or event["dur"] >= 0


@every
def test_spans_of_a_thread_do_not_overlap(make: Make) -> None:
    threads: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for event in spans_of(chrome_trace(make())):
        threads[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for found in threads.values():
        assert all(a[1] <= b[0] + 1e-6 for a, b in pairwise(sorted(found)))


def test_names() -> None:
    events = chrome_trace(forecasts.sixty_four())["traceEvents"]
    named = [event["args"]["name"] for event in events if event["ph"] == "M" and "name" in event["args"]]
    assert [name for name in named if name.startswith("node")] == [f"node {k}" for k in range(8)]
    assert named[8:10] == ["device 0 A100-SXM4-80GB compute", "device 0 A100-SXM4-80GB communication"]
    assert len({event["tid"] for event in events if event["name"] == "thread_name"}) == 128
    assert {event["pid"] for event in events if event["name"] == "memory of device 63"} == {7}


def test_one_span_and_one_moment() -> None:
    known = forecasts.four_cards()
    alone = replace(known.devices[3], spans=(Span(0.5, 1.25, "bridge", "<b>"),), memory=((0.5, 1024),))
    trace = chrome_trace(replace(known, devices=(alone,)))
    assert trace["otherData"]["verdict"] == "tight"
    assert trace["traceEvents"][-2:] == [
        {"name": "<b>", "cat": "bridge", "ph": "X", "ts": 500_000.0, "dur": 750_000.0, "pid": 0, "tid": 1},
        {"name": "memory of device 3", "ph": "C", "ts": 500_000.0, "pid": 0, "tid": 0, "args": {"bytes": 1024}},
    ]


def test_a_moment_that_is_no_number() -> None:
    known = forecasts.four_cards()
    broken = replace(known.devices[0], spans=(Span(0.0, float("nan"), "forward", "x"),))
    with pytest.raises(PlanError, match=r"^forecast\.devices\[0\]\.spans\[0\]\.end_s is nan"):
        chrome_trace(replace(known, devices=(broken, *known.devices[1:])))
