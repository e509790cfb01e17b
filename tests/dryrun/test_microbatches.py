"""Few microbatches are run, and the step is that of all of them."""

from __future__ import annotations

from itertools import takewhile

import pytest

from tests.dryrun.studies import LENGTH, candidate_of, chain, ids
from whalepy.planner.work import Event, Rehearsal

ROWS, COUNT = 40, 8


def rehearsed(rows: int, monkeypatch: pytest.MonkeyPatch, run: int) -> Rehearsal:
    monkeypatch.setattr("whalepy.dryrun.study.MICROBATCHES_RUN", run)
    return candidate_of(chain(1), (2, 1), COUNT, example=ids(2 * rows)).work(0, rows)


def ahead(work: Rehearsal) -> list[tuple[str, int, int, int]]:
    """Before the first microbatch the line of the loss counts its targets, and ranks tell one another."""
    first = work.events[0].name
    events = takewhile(lambda part: isinstance(part, Event) and part.name in (first, "bridge"), work.parts)
    return [(event.name, event.bytes, event.memory, event.peak) for event in events if isinstance(event, Event)]


@pytest.mark.parametrize("rows", [ROWS, ROWS + 5])
def test_what_looks_ahead_takes_all_rows(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    few, every = (rehearsed(rows, monkeypatch, run) for run in (3, COUNT))
    assert few.inputs == every.inputs
    assert ahead(few) == ahead(every) and len(ahead(few)) > 2
    counted = 8 * rows * LENGTH  # 8 bytes per target
    assert max(size for _, size, *_ in ahead(few)) > counted
