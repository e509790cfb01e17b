"""The step of a dry run as Chrome trace events, which Perfetto and chrome://tracing open."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from whalepy.planner.forecast import DeviceForecast, Forecast
from whalepy.report.checked import check
from whalepy.report.lanes import Lane, lanes

NANOSECONDS = 3  # decimals of a microsecond
Event = dict[str, Any]


def chrome_trace(forecast: Forecast) -> dict[str, Any]:
    """One process per node, one thread per lane of a device, in rank order, and a counter of each device's memory.

    Times in microseconds, memory in bytes. Spans of one thread never overlap.
    Raises PlanError for a forecast with a figure that is not a finite number.
    """
    check(forecast)
    events: list[Event] = [
        _named("process_name", node, 0, f"node {node}") for node in sorted({each.node for each in forecast.devices})
    ]
    thread = 0
    for device in sorted(forecast.devices, key=lambda each: each.rank):
        for lane in lanes(device):
            thread += 1
            events += _thread(device, lane, thread)
        events += _memory(device)
    about = {
        "model": forecast.subject.model,
        "cluster": forecast.subject.cluster,
        "strategy": forecast.strategy,
        "verdict": forecast.verdict,
        "step_time_s": forecast.step_time_s,
    }
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}


def _named(what: str, process: int, thread: int, name: str) -> Event:
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}


def _thread(device: DeviceForecast, lane: Lane, thread: int) -> Iterator[Event]:
    """The name of a lane, its place, and its spans: each starts where its predecessor ended at the earliest."""
    yield _named("thread_name", device.node, thread, f"device {device.rank} {device.type} {lane.name}")
    yield {"name": "thread_sort_index", "ph": "M", "pid": device.node, "tid": thread, "args": {"sort_index": thread}}
    free = 0.0
    for span in lane.spans:
        start = max(_microseconds(span.start_s), free)
        free = max(_microseconds(span.end_s), start)
        yield {
            "name": span.name,
            "cat": span.kind,
            "ph": "X",
            "ts": start,
            "dur": round(free - start, NANOSECONDS),
            "pid": device.node,
            "tid": thread,
        }


def _memory(device: DeviceForecast) -> Iterator[Event]:
    name = f"memory of device {device.rank}"
    for moment, size in device.memory:
        at = _microseconds(moment)
        yield {"name": name, "ph": "C", "ts": at, "pid": device.node, "tid": 0, "args": {"bytes": size}}


def _microseconds(moment_s: float) -> float:
    return round(moment_s * 1e6, NANOSECONDS)
